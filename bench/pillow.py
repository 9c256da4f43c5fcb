"""Action sequences as users of torchvision write them: from a Pillow image to its views and their actions."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import pairwise

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import ColorJitter, GaussianBlur, InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

from seqjepa.loaders.config import SequenceConfig
from seqjepa.loaders.images.base import Images

__all__ = ["PillowSequences", "pillow_sequence"]

Drawn = tuple[Tensor, Tensor]


class PillowSequences(Dataset):
    """One sequence per image: (views [V, 3, H, W], parameters, label), with `parameters` as in `pillow_sequence`."""

    def __init__(self, images: Images, config: SequenceConfig):
        self.pixels, self.labels = images.pixels, images.labels.tolist()
        self.draw = pillow_sequence(config, *images.statistics())

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, int]:
        return *self.draw(Image.fromarray(self.pixels[position])), self.labels[position]


def pillow_sequence(config: SequenceConfig, mean: tuple, std: tuple) -> Callable[[Image.Image], Drawn]:
    """A function that draws an image's sequence: normalised views [V, 3, H, W], and numbers that give their actions.

    For rotations and affine maps these are the actions [V - 1, A]; for augmentations, the nine absolute parameters
    [V, 9], whose differences the reference code takes on the device. A gray image stays gray until its views are
    tensors.
    """

    def finish(view: Image.Image) -> Tensor:
        return F.normalize(F.to_tensor(view).expand(3, -1, -1), mean, std)

    if config.kind == "augment":
        augment = _Augmentation(config)

        def augmented(image: Image.Image) -> Drawn:
            drawn = [augment(image, target=number == config.num_observed) for number in range(config.num_observed + 1)]
            views, params = zip(*drawn, strict=True)
            return torch.stack([finish(view) for view in views]), torch.tensor(params)

        return augmented

    move = _turned if config.kind == "rotation" else _moved

    def sequence(image: Image.Image) -> Drawn:
        views, places = [finish(image)], [(0.0, 0.0, 0.0, 0.0)]
        for _ in range(config.num_observed):
            view, place = move(image, config)
            views.append(finish(view))
            places.append(place)
        moves = []
        for (angle, *rest), (next_angle, *next_rest) in pairwise(places):
            turn = math.radians(next_angle - angle)
            shifts = [] if config.kind == "rotation" else [b - a for a, b in zip(rest, next_rest, strict=True)]
            moves.append([math.sin(turn), math.cos(turn), *shifts])
        return torch.stack(views), torch.tensor(moves)

    return sequence


def _turned(image: Image.Image, config: SequenceConfig) -> tuple[Image.Image, tuple[float, ...]]:
    angle = random.choice(config.angles)
    return F.rotate(image, angle), (angle, 0.0, 0.0, 0.0)


def _moved(image: Image.Image, config: SequenceConfig) -> tuple[Image.Image, tuple[float, ...]]:
    size = image.size[::-1]
    if config.padding == "reflect":
        image = F.pad(image, [8, 8, 8, 8], padding_mode="reflect")
    angle, scale = random.uniform(*config.rotation), random.uniform(*config.scale)
    shift = [random.randint(*config.translation) for _ in range(2)]
    moved = F.affine(image, angle, shift, scale, [0.0], InterpolationMode.BILINEAR)
    unit = max(*map(abs, config.translation), 1)
    return F.center_crop(moved, size), (angle, shift[0] / unit, shift[1] / unit, math.log(scale))


class _Augmentation:
    """Makes a view by torchvision's functions on Pillow images, with its parameters of crop, jitter and blur."""

    def __init__(self, config: SequenceConfig):
        self.config = config
        self.spans = (config.brightness, config.contrast, config.saturation, config.hue)
        self.kernel_size = [3, 3]  # at 32 pixels

    def __call__(self, image: Image.Image, *, target: bool) -> tuple[Image.Image, list[float]]:
        config = self.config
        top, left, height, width = RandomResizedCrop.get_params(image, config.crop_area, config.crop_ratio)
        size = image.size[::-1]
        view = F.resized_crop(image, top, left, height, width, size, InterpolationMode.BICUBIC)
        if random.random() < config.flip:
            view = F.hflip(view)
        factors = [1.0, 1.0, 1.0, 0.0]
        if random.random() < config.jitter:
            order, *factors = ColorJitter.get_params(*self.spans)
            adjust = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
            for number in order:
                view = adjust[number](view, factors[number])
        if random.random() < config.grayscale:
            view = F.rgb_to_grayscale(view, num_output_channels=3)
        sigma = 0.0
        if random.random() < config.blur[target]:
            sigma = GaussianBlur.get_params(*config.blur_sigma)
            view = F.gaussian_blur(view, self.kernel_size, [sigma, sigma])
        if random.random() < config.solarize[target]:
            view = F.solarize(view, 128)
        return view, [float(number) for number in (top, left, height, width, *factors, sigma)]
