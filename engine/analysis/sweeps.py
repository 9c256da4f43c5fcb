"""Factor sweeps: one factor of variation moves over a grid, the others stay, and the encoder says what changes.

Which factors there are, and their grids, is the sequence's own (`Sequence.sweeps`).
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from ...loaders.loader import SequenceLoader
from ...loaders.sequences import Factor
from ..models.seq_jepa import SeqJEPA

ANCHORS_AT_A_TIME = 16


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


@torch.no_grad()
def sweep(model: SeqJEPA, loader: SequenceLoader, anchors: int, accelerator: Accelerator) -> dict[str, Sweep]:
    """Features of the first images of `loader`, at most `anchors`, along each factor of its sequence.

    The model is in eval mode; the accelerator sets the precision.
    """
    pixels = loader.pixels(anchors)
    found = {}
    for sequence, factors in loader.sequence.sweeps():
        for factor in factors:
            params = factor.params.to(pixels.device)
            parts = []
            for part in pixels.split(ANCHORS_AT_A_TIME):
                views = sequence.render(part, params[None].expand(len(part), -1, -1))  # [n, S, C, H, W]
                with accelerator.autocast():
                    parts.append(model.encoder((views - loader.mean) / loader.std).float())
            # few rows in double precision: a task for the CPU
            found[factor.name] = Sweep(factor, torch.cat(parts).cpu())
    return found
