"""Factor sweeps: one factor of variation moves over a grid, the others stay, and the encoder says what changes.

The grids are the same for all runs of a kind, so that figures can be compared, and each holds the identity. Views are
rendered from raw images by the project's own sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ...loaders.config import SequenceConfig
from ...loaders.loader import SequenceLoader
from ...loaders.sequences import Sequence, build_sequence
from ..models.seq_jepa import SeqJEPA

__all__ = ["Factor", "Sweep", "factors_of", "sweep"]

ANCHORS_AT_A_TIME = 16


class Factor(NamedTuple):
    """A grid along one factor. S steps, P parameters of the sequence."""

    name: str
    unit: str
    values: Tensor  # [S]
    identity: int  # step at which the image is as it is
    params: Tensor  # [S, P]
    dims: int  # of the subspace that an equivariant encoder would give it
    closed: bool = False  # whether the last step is next to the first: an angle


@dataclass(frozen=True)
class Sweep:
    """Features along a factor, and the directions in which it moves them."""

    factor: Factor
    z: Tensor  # [N, S, D] of N anchors, on the CPU

    @cached_property
    def moved(self) -> Tensor:
        """Displacements, float64 [N, S, D]: features less their anchor's mean over the sweep."""
        z = self.z.double()
        return z - z.mean(1, keepdim=True)

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [D], falling, and eigenvectors [D, D], as columns, of the displacements' covariance."""
        rows = self.moved.flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        return values.flip(0).clamp(min=0), vectors.flip(1)

    @property
    def energy(self) -> float:
        """Mean squared displacement: 0 where the factor moves nothing."""
        return self.moved.square().sum(-1).mean().item()


def factors_of(
    config: SequenceConfig, image_size: tuple[int, int], device: torch.device
) -> list[tuple[Sequence, list[Factor]]]:
    """The sequences that render a task's sweeps, each with its grids.

    Every task is swept along rotation, shifts and scale, mirrored at the border unless its own sequences are black
    there, if its images have two rows and columns; right-angle rotations also along the four turns that they are
    trained on, and augmentations along theirs.

    Args:
        config: of the task's sequences.
        image_size: (H, W).
        device: where views are rendered.
    """
    found = []
    if min(image_size) > 1:
        padding = config.padding if config.kind == "affine" else "reflect"
        affine = build_sequence(SequenceConfig(kind="affine", padding=padding), image_size, device=device)
        found.append((affine, _affine_moves(image_size, device)))
    if config.kind == "rotation":
        turns = [-180.0, -90.0, 0.0, 90.0]
        grid = _grid([0.0], 0, turns, device)
        factor = Factor("right_angles", "degrees", torch.tensor(turns), 2, grid, 2, closed=True)
        found.append((build_sequence(SequenceConfig(kind="rotation"), image_size, device=device), [factor]))
    if config.kind == "augment":
        sequence = build_sequence(SequenceConfig(kind="augment"), image_size, device=device)
        found.append((sequence, _augmentations(image_size, device)))
    return found


def _grid(base: list[float], column: int, values: list[float], device: torch.device) -> Tensor:
    """Parameters [S, P]: `base`, but for one column."""
    params = torch.tensor(base, device=device).repeat(len(values), 1)
    params[:, column] = torch.tensor(values, device=device)
    return params


def _affine_moves(image_size: tuple[int, int], device: torch.device) -> list[Factor]:
    still = [0.0, 0.0, 0.0, 0.0]  # angle, shifts, log scale
    angles = [15.0 * step for step in range(-12, 12)]  # -180 to 165: 180 is -180 again
    reach = min(image_size) // 4
    shifts = [float(step) for step in range(-reach, reach + 1)]
    logs = [math.log(2) * step / 8 for step in range(-8, 5)]  # a half to 1.41
    return [
        Factor("rotation", "degrees", torch.tensor(angles), 12, _grid(still, 0, angles, device), 2, closed=True),
        Factor("translation_x", "pixels", torch.tensor(shifts), reach, _grid(still, 1, shifts, device), 1),
        Factor("translation_y", "pixels", torch.tensor(shifts), reach, _grid(still, 2, shifts, device), 1),
        Factor("scale", "log", torch.tensor(logs), 8, _grid(still, 3, logs, device), 1),
    ]


def _augmentations(image_size: tuple[int, int], device: torch.device) -> list[Factor]:
    height, width = image_size
    # top, left, height, width, brightness, contrast, saturation, hue, sigma, flip, grayscale, solarise, order
    whole = [0.0, 0.0, float(height), float(width), 1.0, 1.0, 1.0, 0.0, *[0.0] * 5]
    tone = [0.6 + 0.1 * step for step in range(9)]  # 1 in the middle
    hues = [-0.1 + 0.025 * step for step in range(9)]
    sigmas = [0.25 * step for step in range(9)]
    found = []
    for column, name in enumerate(("brightness", "contrast", "saturation"), start=4):
        found.append(Factor(name, "factor", torch.tensor(tone), 4, _grid(whole, column, tone, device), 1))
    found.append(Factor("hue", "turns", torch.tensor(hues), 4, _grid(whole, 7, hues, device), 1))
    found.append(Factor("blur", "sigma, pixels", torch.tensor(sigmas), 0, _grid(whole, 8, sigmas, device), 1))
    # a crop of three quarters moves about the middle; a centred crop grows to the whole image
    side, room = max(3 * min(height, width) // 4, 1), min(height, width) // 4
    places = [float(step) for step in range(room + 1)]
    middle = float(room // 2)
    box = [middle, middle, float(side), float(side), *whole[4:]]
    moved = torch.tensor(places) - middle
    found.append(Factor("crop_x", "pixels", moved, room // 2, _grid(box, 1, places, device), 1))
    found.append(Factor("crop_y", "pixels", moved, room // 2, _grid(box, 0, places, device), 1))
    sizes = [float(min(height, width) - 2 * step) for step in range(min(height, width) // 4, -1, -1)]
    params = torch.tensor([whole] * len(sizes), device=device)
    for row, size in zip(params, sizes, strict=True):
        row[:4] = torch.tensor([(height - size) // 2, (width - size) // 2, size, size])
    found.append(Factor("crop_size", "pixels", torch.tensor(sizes), len(sizes) - 1, params, 1))
    return found


@torch.no_grad()
def sweep(
    model: SeqJEPA, loader: SequenceLoader, config: SequenceConfig, anchors: int, accelerator: Accelerator
) -> dict[str, Sweep]:
    """Features of the first images of `loader` along each factor of the task.

    Args:
        model: in eval mode.
        loader: of the images.
        config: of the task's sequences.
        anchors: number of images; fewer if there are not so many.
        accelerator: precision.
    """
    pixels = loader.pixels(anchors)
    found = {}
    for sequence, factors in factors_of(config, pixels.shape[1:3], pixels.device):
        for factor in factors:
            parts = []
            for part in pixels.split(ANCHORS_AT_A_TIME):
                views = sequence.render(part, factor.params[None].expand(len(part), -1, -1))  # [n, S, C, H, W]
                with accelerator.autocast():
                    parts.append(model.encode((views - loader.mean) / loader.std).float())
            # few rows in double precision: a task for the CPU
            found[factor.name] = Sweep(factor, torch.cat(parts).cpu())
    return found
