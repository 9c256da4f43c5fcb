"""A convnet for grids of colours."""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ....loaders.grids.moves import OUTSIDE
from .base import ImageEncoder
from .config import GridConvNetConfig


class GridConvNet(ImageEncoder):
    """Four convolutions with batch norm on eleven planes, one for each colour and one for what is outside."""

    def __init__(self, config: GridConvNetConfig):
        super().__init__()
        widths = [OUTSIDE + 1, config.width, config.width, 2 * config.width, 4 * config.width]
        layers: list[nn.Module] = []
        for number, (inputs, outputs) in enumerate(pairwise(widths)):
            stride = 2 if number > 1 else 1
            layers += [nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(outputs)]
            layers.append(nn.ReLU(inplace=True))
        self.layers = nn.Sequential(*layers)

    def features(self, images: Tensor) -> Tensor:
        planes = F.one_hot(images[:, 0].round().long(), OUTSIDE + 1).movedim(-1, 1).to(images.dtype)
        return self.layers(planes).mean((2, 3))
