"""Encoders: images [N, 3, H, W] to features [N, D]. A new one is one function and one line in `ENCODERS`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from torch import nn
from torchvision.models import resnet18

from .config import ModelConfig

__all__ = ["ENCODERS", "build_encoder"]


def _resnet18(config: ModelConfig) -> tuple[nn.Module, int]:
    """ResNet-18 with the CIFAR stem (3x3 convolution, no max-pooling) and no classifier."""
    net = resnet18(weights=None, zero_init_residual=True)
    net.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    net.fc = nn.Identity()
    return net, 512


def _convnet(config: ModelConfig) -> tuple[nn.Module, int]:
    """Four convolutions with batch norm, of which the last three halve the image; for images of 16 to 28 pixels."""
    channels = [3, config.width, config.width, 2 * config.width, 4 * config.width]
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(channels)):
        layers += [
            nn.Conv2d(inputs, outputs, kernel_size=3, stride=1 if number == 0 else 2, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), channels[-1]


ENCODERS: dict[str, Callable[[ModelConfig], tuple[nn.Module, int]]] = {
    "resnet18": _resnet18,
    "convnet": _convnet,
}


def build_encoder(config: ModelConfig) -> tuple[nn.Module, int]:
    """The encoder that `config.encoder` names, and its number of features."""
    return ENCODERS[config.encoder](config)
