"""eb_jepa's Gaussian regulariser (facebookresearch/eb_jepa, eb_jepa/losses.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..internal.buffers import BufferedModule
from ..internal.checks import check_count, check_finite, plain
from ..internal.transforms import count_up
from ..sigreg import joint_sigreg
from .common import agree, exact, mean_of_rows, world


class BCS(BufferedModule):
    """Mean square distance of two views + lmbd * SIGReg without the factor N, ten knots on [-3, 3], mean of the views.

    Both views have the same directions, new ones at each call, and statistics are of the samples of all processes.

    Differs from the original: directions come from a counter-based generator; its seed, the number of calls, is a
    buffer `step`, which state dicts leave out, as they did.

    Args:
        num_slices: directions.
        lmbd: weight.
    """

    def __init__(self, num_slices: int = 256, lmbd: float = 10.0):
        super().__init__()
        check_count(1, num_slices=num_slices)
        check_finite(lmbd=lmbd)
        self.num_slices, self.lmbd = num_slices, lmbd
        self.hold("step", 0, dtype=torch.int64, persistent=False)

    def forward(self, z1: Tensor, z2: Tensor) -> dict[str, Tensor]:
        """`loss`, `bcs_loss` and `invariance_loss` of samples z1 and z2 [N, D]."""
        if self.step.device != z1.device:
            self.step = self.step.to(z1.device)  # the original has nothing to move, so its users move nothing
        group = world()
        z = exact(torch.stack([z1, z2]))
        statistic, samples = joint_sigreg(
            z, self.num_slices, t_max=3.0, num_points=10, span="full", seed=agree(self.step, group), group=group
        )
        count_up(self.step)
        bcs = (statistic / samples).mean()
        invariance = mean_of_rows((z[0] - z[1]).square())
        return {"loss": invariance + plain(self.lmbd) * bcs, "bcs_loss": bcs, "invariance_loss": invariance}
