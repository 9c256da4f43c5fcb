"""The Gaussian regulariser of eb_jepa (facebookresearch/eb_jepa, eb_jepa/losses.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..internal.buffers import BufferedModule
from ..internal.checks import check_count, check_finite, plain
from ..internal.transforms import count_up
from ..sigreg import joint_sigreg
from .common import agree, exact, mean_of_rows, world


class BCS(BufferedModule):
    """Mean square distance between two views + lmbd * mean over the views of SIGReg / N, with ten knots on [-3, 3].

    Both views share their directions, which are new at each call. Statistics cover the samples of all processes.

    Differs from the original: directions come from a counter-based generator. Its seed, the number of calls, is the
    buffer `step`, which is not in state dicts, as in the original.

    Args:
        num_slices: number of directions.
        lmbd: weight of SIGReg.
    """

    step: Tensor

    def __init__(self, num_slices: int = 256, lmbd: float = 10.0):
        super().__init__()
        check_count(1, num_slices=num_slices)
        check_finite(lmbd=lmbd)
        self.num_slices, self.lmbd = num_slices, lmbd
        self.hold("step", 0, dtype=torch.int64, persistent=False)

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """`loss`, `bcs_loss` and `invariance_loss` of samples z1 and z2 [N, D]."""
        if self.step.device != z1.device:
            self.step = self.step.to(z1.device)  # the original has no buffers, so its users do not move it
        group = world()
        z = exact(torch.stack([z1, z2]))
        statistic, samples = joint_sigreg(
            z, self.num_slices, t_max=3.0, num_points=10, span="full", seed=agree(self.step, group), group=group
        )
        count_up(self.step)
        bcs = (statistic / samples).mean()
        invariance = mean_of_rows((z[0] - z[1]).square())
        return {"loss": invariance + plain(self.lmbd) * bcs, "bcs_loss": bcs, "invariance_loss": invariance}
