"""Rotations by right angles: exact permutations of the pixels (the CIFAR-10 rotations of the reference code)."""

import torch
from torch import Tensor

from ...configs.errors import InputError
from ..config import ActionsConfig, RotationConfig
from ..draws import integers
from .affine import mirrored_sweeps
from .base import Factor, Sequence, Sweeps, grid


class Rotation(Sequence):
    """View 0 stands upright; each further view is turned counter-clockwise by an angle drawn from `angles`.

    Parameters: the angle in degrees. Actions: (sin, cos) of the angle from one view to the next.
    """

    num_draws = 1
    param_names = ("angle",)
    factors = {"rotation": slice(0, 2)}

    config: RotationConfig

    def __init__(
        self, config: RotationConfig, actions: ActionsConfig, image_size: tuple[int, int], device: torch.device
    ):
        super().__init__(config, actions, image_size, device)
        height, width = self.image_size
        if height != width:
            raise InputError(f"rotation needs square images; these are {width}x{height}", "sequence.kind")
        # made once: a copy to the device in each step would wait for the host
        self.angles = torch.tensor(config.angles, dtype=torch.float32, device=self.device)

    def params(self, words: Tensor) -> Tensor:
        choice = integers(words, 0, len(self.angles) - 1).long()  # [B, V, 1]
        angles = self.angles[choice]
        angles[:, 0] = 0.0
        return angles

    def render(self, images: Tensor, params: Tensor) -> Tensor:
        num_images, height, width, channels = images.shape
        num_views = params.shape[1]
        pixel = torch.arange(height * width, device=images.device).view(height, width)
        turned = torch.stack([torch.rot90(pixel, turns) for turns in range(4)]).flatten(1)  # [4, H*W]
        source = turned[_quarters(params[..., 0])]  # [B, V, H*W]
        flat = images.permute(0, 3, 1, 2).flatten(2)[:, None]  # [B, 1, C, H*W]
        views = flat.expand(-1, num_views, -1, -1).gather(3, source[:, :, None].expand(-1, -1, channels, -1))
        return views.view(num_images, num_views, channels, height, width).float() / 255

    def encode(self, params: Tensor) -> Tensor:
        quarter = _quarters(params)  # [B, V, 1]
        # exact zeros and ones: float32's sin(pi) is not 0, and a constant must have no deviation
        sin = (quarter == 1).float() - (quarter == 3).float()
        cos = (quarter == 0).float() - (quarter == 2).float()
        return torch.cat([sin, cos], dim=-1)

    def relative(self, params: Tensor) -> Tensor:
        return self.encode(params.diff(dim=1))

    def sweeps(self) -> Sweeps:
        """Affine moves, which do not occur in training, and the four right angles, which do."""
        turns = [-180.0, -90.0, 0.0, 90.0]
        factor = Factor("right_angles", "degrees", torch.tensor(turns), 2, grid([0.0], 0, turns), 2, closed=True)
        return [*mirrored_sweeps(self.image_size, self.device), (self, [factor])]


def _quarters(degrees: Tensor) -> Tensor:
    """Right angles as 0, 1, 2, 3 quarter turns."""
    return degrees.div(90).long() % 4
