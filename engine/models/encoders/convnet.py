"""A convnet for very small images."""

from itertools import pairwise

from torch import Tensor, nn

from .base import ImageEncoder
from .config import ConvNetConfig


class ConvNet(ImageEncoder, nn.Sequential):
    """Four convolutions with batch norm, of which the last three halve the image; for images of 16 to 28 pixels."""

    def __init__(self, config: ConvNetConfig):
        channels = [3, config.width, config.width, 2 * config.width, 4 * config.width]
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(channels)):
            layers += [
                nn.Conv2d(inputs, outputs, kernel_size=3, stride=1 if number == 0 else 2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def blocks(self) -> list[nn.Module]:
        layers = list(self)
        return [nn.Sequential(*layers[start : start + 3]) for start in range(0, 12, 3)]

    def features(self, images: Tensor) -> Tensor:
        return nn.Sequential.forward(self, images)
