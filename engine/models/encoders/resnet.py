"""ResNet-18 for small images."""

from typing import Any

from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from .base import ImageEncoder
from .config import ResNet18Config


class ResNet18CIFAR(ResNet):
    """timm's ResNet-18 with a 3x3 convolution and no max-pooling at the start."""

    def __init__(self, **settings: Any):
        block: Any = BasicBlock  # which timm declares as an instance
        super().__init__(block, (2, 2, 2, 2), **settings)
        self.conv1 = nn.Conv2d(settings.get("in_chans", 3), 64, kernel_size=3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        widths = {"act1": (64, 1), "layer1": (64, 1), "layer2": (128, 2), "layer3": (256, 4), "layer4": (512, 8)}
        self.feature_info = [
            {"num_chs": width, "reduction": reduction, "module": name} for name, (width, reduction) in widths.items()
        ]


class ResNet18(ImageEncoder, ResNet18CIFAR):
    """ResNet-18 with the stem for small images and no classifier."""

    def __init__(self, config: ResNet18Config):
        super().__init__()
        self.fc = nn.Identity()

    def blocks(self) -> list[nn.Module]:
        layers: list[Any] = [self.layer1, self.layer2, self.layer3, self.layer4]
        first, *others = (block for layer in layers for block in layer)
        return [nn.Sequential(self.conv1, self.bn1, self.act1, self.maxpool, first), *others]

    def features(self, images: Tensor) -> Tensor:
        return ResNet18CIFAR.forward(self, images)
