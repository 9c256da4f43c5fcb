"""Affine moves: rotation, translation and scale in one grid sample (as on MNIST and CIFAR in the reference code)."""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ...configs.errors import InputError
from ..config import ActionsConfig, AffineConfig
from ..draws import integers, uniform
from .base import Factor, Sequence, Sweeps, grid


class Affine(Sequence):
    """View 0 is the image itself; each further view is scaled, then turned, then shifted, about the centre.

    Parameters: angle in degrees (counter-clockwise), shift along x and y in pixels (right and down positive), natural
    logarithm of the scale. Actions: sin and cos of the turn, shift over the largest shift, and log-scale,
    each from one view to the next. What lies outside the image is black (`padding: zeros`, the background of digits) or
    the image mirrored at its outermost pixels (`reflect`).

    The reference code resizes to whole pixels, then rotates to the nearest; one bilinear sample of the composed
    matrix leaves the scale exact and interpolates once.
    """

    num_draws = 4
    param_names = ("angle", "shift x", "shift y", "log scale")
    factors = {
        "rotation": slice(0, 2),
        "translation_x": slice(2, 3),
        "translation_y": slice(3, 4),
        "scale": slice(4, 5),
    }

    columns = {"rotation": (0,), "translation_x": (1,), "translation_y": (2,), "scale": (3,)}
    whole = (1, 2)

    config: AffineConfig

    def __init__(self, config: AffineConfig, actions: ActionsConfig, image_size: tuple[int, int], device: torch.device):
        super().__init__(config, actions, image_size, device)
        height, width = self.image_size
        if min(height, width) < 2:  # coordinates from -1 to 1 need two pixels
            raise InputError(
                f"images are {width}x{height}, sequence.kind=affine needs two rows and columns", "data.root"
            )

    def params(self, words: Tensor) -> Tensor:
        config = self.config
        params = torch.stack(
            [
                uniform(words[..., 0], *config.rotation),
                integers(words[..., 1], *config.translation),
                integers(words[..., 2], *config.translation),
                uniform(words[..., 3], *map(math.log, config.scale)),
            ],
            dim=-1,
        )  # [B, V, 4]
        params[:, 0] = 0.0
        return params

    @cached_property
    def still(self) -> Tensor:
        return torch.zeros(4, device=self.device)

    def render(self, images: Tensor, params: Tensor) -> Tensor:
        num_images, height, width, _ = images.shape
        num_views = params.shape[1]
        turn, shift_x, shift_y, log_scale = params.unbind(-1)  # [B, V] each
        sin, cos = torch.deg2rad(turn).sin(), torch.deg2rad(turn).cos()
        zoom = torch.exp(-log_scale)
        # output pixel p is sampled from the input at scale^-1 R^-1 (p - shift), in pixels from the centre; y points
        # down, so a counter-clockwise turn by t is [[cos, sin], [-sin, cos]]. No matmul: TF32 would round coordinates.
        x = torch.arange(width, device=images.device) - (width - 1) / 2 - shift_x[..., None]  # [B, V, W]
        y = torch.arange(height, device=images.device) - (height - 1) / 2 - shift_y[..., None]  # [B, V, H]
        x, y = x[:, :, None, :], y[:, :, :, None]
        sin, cos = (sin * zoom)[..., None, None], (cos * zoom)[..., None, None]
        # align_corners: -1 and 1 are the centres of the outermost pixels, which is also where `reflect` mirrors
        grid = torch.stack([(cos * x - sin * y) * (2 / (width - 1)), (sin * x + cos * y) * (2 / (height - 1))], dim=-1)

        pixels = images.permute(0, 3, 1, 2).float() / 255  # [B, C, H, W]
        pixels = pixels[:, None].expand(-1, num_views, -1, -1, -1).flatten(0, 1)
        padding = {"zeros": "zeros", "reflect": "reflection"}[self.config.padding]
        views = F.grid_sample(pixels, grid.flatten(0, 1), align_corners=True, padding_mode=padding)
        return views.unflatten(0, (num_images, num_views))

    def encode(self, params: Tensor) -> Tensor:
        turn = torch.deg2rad(params[..., :1])
        largest_shift = max(1, *map(abs, self.config.translation))
        return torch.cat([turn.sin(), turn.cos(), params[..., 1:3] / largest_shift, params[..., 3:]], dim=-1)

    def relative(self, params: Tensor) -> Tensor:
        return self.encode(params.diff(dim=1))

    def sweeps(self) -> Sweeps:
        """Rotation, shifts and scale."""
        still = [0.0, 0.0, 0.0, 0.0]
        angles = [15.0 * step for step in range(-12, 12)]  # -180 to 165: 180 is -180 again
        reach = min(self.image_size) // 4
        shifts = [float(step) for step in range(-reach, reach + 1)]
        logs = [math.log(2) * step / 8 for step in range(-8, 5)]  # a half to 1.41
        factors = [
            Factor("rotation", "degrees", torch.tensor(angles), 12, grid(still, 0, angles), 2, closed=True),
            Factor("translation_x", "pixels", torch.tensor(shifts), reach, grid(still, 1, shifts), 1),
            Factor("translation_y", "pixels", torch.tensor(shifts), reach, grid(still, 2, shifts), 1),
            Factor("scale", "log", torch.tensor(logs), 8, grid(still, 3, logs), 1),
        ]
        return [(self, factors)]


def mirrored_sweeps(image_size: tuple[int, int], device: torch.device) -> Sweeps:
    """Affine sweeps of images that are mirrored at their border; other kinds of sequences add them to their own."""
    if min(image_size) < 2:  # such images have no affine moves
        return []
    return Affine(AffineConfig(padding="reflect"), ActionsConfig(), image_size, device).sweeps()
