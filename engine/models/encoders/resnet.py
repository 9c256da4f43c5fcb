"""ResNet-18 for small images."""

from typing import Any

from torch import Tensor, nn

from ...timm_models import ResNet18CIFAR
from ..config import ResNet18Config
from .base import ImageEncoder


class ResNet18(ImageEncoder, ResNet18CIFAR):
    """timm's ResNet-18 with the CIFAR stem (3x3 convolution, no max-pooling) and no classifier."""

    def __init__(self, config: ResNet18Config):
        super().__init__()
        self.fc = nn.Identity()

    def blocks(self) -> list[nn.Module]:
        layers: list[Any] = [self.layer1, self.layer2, self.layer3, self.layer4]
        first, *others = (block for layer in layers for block in layer)
        return [nn.Sequential(self.conv1, self.bn1, self.act1, self.maxpool, first), *others]

    def features(self, images: Tensor) -> Tensor:
        return ResNet18CIFAR.forward(self, images)
