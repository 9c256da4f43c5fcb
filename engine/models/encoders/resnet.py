"""ResNet-18 for small images."""

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

from ..config import ResNet18Config
from .base import ImageEncoder


class ResNet18(ImageEncoder, ResNet):
    """ResNet-18 with the CIFAR stem (3x3 convolution, no max-pooling) and no classifier."""

    def __init__(self, config: ResNet18Config):
        super().__init__(BasicBlock, [2, 2, 2, 2], zero_init_residual=True)
        self.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.fc = nn.Identity()

    def blocks(self) -> list[nn.Module]:
        first, *others = (block for layer in (self.layer1, self.layer2, self.layer3, self.layer4) for block in layer)
        return [nn.Sequential(self.conv1, self.bn1, self.relu, self.maxpool, first), *others]

    def features(self, images: Tensor) -> Tensor:
        return ResNet.forward(self, images)
