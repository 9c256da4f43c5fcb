"""Augmentations as actions: crop, flip, colour jitter, grayscale, blur, solarise (CIFAR-100 of the paper)."""

import math
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.views import color_jitter_, crop, gaussian_blur, grayscale_, solarize
from ..config import ActionsConfig, AugmentConfig
from ..draws import chance, integers, uniform
from .affine import mirrored_sweeps
from .base import Factor, Sequence, Sweeps, grid

CROP_TRIES = 10  # torchvision's
RATIO_LEVELS = 4096  # the crop's aspect ratio takes this many log-uniform values, 0.014 % apart
CPU_CHUNK = 32  # sequences rendered at a time, so that their planes stay in a core's cache


class Augment(Sequence):
    """Each view is a crop of the image, resized and perhaps mirrored, then jittered, grayed, blurred and solarised.

    Parameters: the crop's top, left, height and width in pixels; factors of brightness, contrast and saturation; hue
    shift in turns; sigma of the blur in pixels (0 without); flip, grayscale and solarise as 0 or 1; number of the
    jitter's order. Where no jitter is drawn its factors are 1, 1, 1, 0. In the target view, blur and
    solarise have other probabilities.

    Actions: differences of the first nine, or with `full_actions` of all but the order. The paper leaves flip,
    grayscale and solarise out.
    """

    num_draws = CROP_TRIES + 13
    param_names = (
        *("top", "left", "height", "width", "brightness", "contrast", "saturation", "hue", "sigma"),
        *("flip", "grayscale", "solarize", "order"),
    )

    columns = {
        "crop": (0, 1, 2, 3),
        "jitter": (4, 5, 6, 7, 12),
        "blur": (8,),
        "flip": (9,),
        "grayscale": (10,),
        "solarize": (11,),
    }
    whole = (0, 1, 2, 3)
    choices = (9, 10, 11, 12)

    config: AugmentConfig

    def __init__(
        self, config: AugmentConfig, actions: ActionsConfig, image_size: tuple[int, int], device: torch.device
    ):
        super().__init__(config, actions, image_size, device)
        self.factors = {"crop": slice(0, 4), "jitter": slice(4, 8), "blur": slice(8, 9)}
        if config.full_actions:
            self.factors |= {"flip": slice(9, 10), "grayscale": slice(10, 11), "solarize": slice(11, 12)}
        height, width = self.image_size
        self.kernel_size = 2 * max(0, round((min(height, width) - 10) / 20)) + 1
        # a crop is round(sqrt(area * ratio)) wide and round(sqrt(area / ratio)) high. Integers give the same bits
        # everywhere: the product, in fixed point of 2**-16, is compared with the squares of k - 1/2
        log_low, log_high = map(math.log, config.crop_ratio)
        step = (log_high - log_low) / RATIO_LEVELS
        logs = [log_low + (level + 0.5) * step for level in range(RATIO_LEVELS)]
        self.wide = torch.tensor([round(math.exp(log) * 2**16) for log in logs], device=device)
        self.tall = torch.tensor([round(math.exp(-log) * 2**16) for log in logs], device=device)
        self.width_steps = _steps(width, height * width).to(device)
        self.height_steps = _steps(height, height * width).to(device)

    def params(self, words: Tensor) -> Tensor:
        config = self.config
        height, width, fits = self._crop_size(words[..., :CROP_TRIES])
        rest = words[..., CROP_TRIES:].unbind(-1)  # [B, V] each
        room, wide_room = self.image_size[0] - height, self.image_size[1] - width
        top = torch.where(fits, integers(rest[0], 0, room), room // 2)
        left = torch.where(fits, integers(rest[1], 0, wide_room), wide_room // 2)
        flip = chance(rest[2], config.flip)
        jittered = chance(rest[3], config.jitter) > 0
        ranges = (config.brightness, config.contrast, config.saturation, config.hue)
        factors = [
            torch.where(jittered, uniform(word, *span), 0.0 if span is config.hue else 1.0)
            for word, span in zip(rest[4:8], ranges, strict=True)
        ]
        order = integers(rest[8], 0, 23)
        gray = chance(rest[9], config.grayscale)
        blurred = _observed_and_target(rest[10], config.blur) > 0
        sigma = torch.where(blurred, uniform(rest[11], *config.blur_sigma), 0.0)
        inverted = _observed_and_target(rest[12], config.solarize)
        columns = [top, left, height, width, *factors, sigma, flip, gray, inverted, order]
        return torch.stack([column.float() for column in columns], dim=-1)

    @cached_property
    def still(self) -> Tensor:
        height, width = self.image_size
        rest = {"height": float(height), "width": float(width), "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}
        return torch.tensor([rest.get(name, 0.0) for name in self.param_names], device=self.device)

    def _crop_size(self, words: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Height and width, int64 [B, V], of the first try that fits, or else of the largest crop; whether one fits."""
        low, high = (round(bound * 2**16) for bound in self.config.crop_area)
        area = low + ((words & 0xFFFF) * (high - low) >> 16)
        level = words >> 20
        width = torch.bucketize(area * self.wide[level], self.width_steps, right=True)  # [B, V, tries]
        height = torch.bucketize(area * self.tall[level], self.height_steps, right=True)
        rows, columns = self.image_size
        fits = (width > 0) & (width <= columns) & (height > 0) & (height <= rows)
        first = fits.int().argmax(-1, keepdim=True)
        height, width, fits = (value.gather(-1, first)[..., 0] for value in (height, width, fits))
        narrowest, widest = self.config.crop_ratio
        full_height = max(1, min(rows, round(columns / narrowest)))
        full_width = max(1, min(columns, round(rows * widest)))
        return torch.where(fits, height, full_height), torch.where(fits, width, full_width), fits

    def render(self, images: Tensor, params: Tensor) -> Tensor:
        if images.device.type != "cpu" or torch.compiler.is_compiling():
            return self._render(images, params)
        parts = zip(images.split(CPU_CHUNK), params.split(CPU_CHUNK), strict=True)
        return torch.cat([self._render(*part) for part in parts])

    def _render(self, images: Tensor, params: Tensor) -> Tensor:
        top, left, height, width, *_ = params.unbind(-1)
        flip = params[..., 9]
        planes = crop(images, top, left, height, width, flip)  # [3, B*V, H, W]
        *jitter, sigma, _, gray, inverted, order = params[..., 4:].flatten(0, 1).unbind(-1)
        color_jitter_(planes, *jitter, order=order)
        grayscale_(planes, gray)
        planes = gaussian_blur(planes, sigma, self.kernel_size)
        planes = solarize(planes, inverted)
        return planes.unflatten(1, params.shape[:2]).permute(1, 2, 0, 3, 4)

    def encode(self, params: Tensor) -> Tensor:
        return params[..., : self.action_dim]

    def sweeps(self) -> Sweeps:
        """Affine moves, colours, blur, and the place and size of the crop."""
        height, width = self.image_size
        at = {name: column for column, name in enumerate(self.param_names)}
        whole = self.still.tolist()
        tone = [0.6 + 0.1 * step for step in range(9)]  # 1 in the middle
        hues = [-0.1 + 0.025 * step for step in range(9)]
        sigmas = [0.25 * step for step in range(9)]
        factors = [
            Factor(name, "factor", torch.tensor(tone), 4, grid(whole, at[name], tone), 1)
            for name in ("brightness", "contrast", "saturation")
        ]
        factors.append(Factor("hue", "turns", torch.tensor(hues), 4, grid(whole, at["hue"], hues), 1))
        factors.append(Factor("blur", "sigma, pixels", torch.tensor(sigmas), 0, grid(whole, at["sigma"], sigmas), 1))
        # a crop of three quarters moves about the middle; a centred crop grows to the whole image
        smaller = min(height, width)
        side, room = max(3 * smaller // 4, 1), smaller // 4
        places = [float(step) for step in range(room + 1)]
        middle = float(room // 2)
        box = [middle, middle, float(side), float(side), *whole[4:]]
        moved = torch.tensor(places) - middle
        factors.append(Factor("crop_x", "pixels", moved, room // 2, grid(box, at["left"], places), 1))
        factors.append(Factor("crop_y", "pixels", moved, room // 2, grid(box, at["top"], places), 1))
        sizes = [float(smaller - 2 * step) for step in range(smaller // 4, -1, -1)]
        boxes = [[(height - size) // 2, (width - size) // 2, size, size, *whole[4:]] for size in sizes]
        factors.append(Factor("crop_size", "pixels", torch.tensor(sizes), len(sizes) - 1, torch.tensor(boxes), 1))
        return [*mirrored_sweeps(self.image_size, self.device), (self, factors)]


def _steps(size: int, area: int) -> Tensor:
    """Fixed-point fractions of the image's area at which a side grows to 1, 2, ..., size + 1 pixels."""
    return torch.tensor([math.ceil((k - 0.5) ** 2 / area * 2**32) for k in range(1, size + 2)])


def _observed_and_target(word: Tensor, probabilities: list[float]) -> Tensor:
    observed, target = probabilities
    return torch.cat([chance(word[:, :-1], observed), chance(word[:, -1:], target)], dim=1)
