"""LeJEPA's SIGReg (rbalestr-lab/lejepa, univariate/epps_pulley.py and multivariate/slicing.py, from 2025-12 on).

Source: arXiv 2511.08544. Before its commit fd27093, `EppsPulley` was another statistic, without the factor N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..collectives import name_of
from ..internal.buffers import BufferedModule
from ..internal.checks import check_count, check_positive
from ..internal.transforms import count_up, transformed
from ..sigreg import sigreg
from .common import agree, exact, hold_knots, world


class EppsPulley(BufferedModule):
    """Epps-Pulley statistic of one-dimensional samples. `SlicingUnivariateTest` only reads its settings.

    Args:
        t_max: largest knot.
        n_points: number of knots on [0, t_max], odd, at least 3.
        integration: must be `trapezoid`.
    """

    t: Tensor
    phi: Tensor
    weights: Tensor

    def __init__(self, t_max: float = 3, n_points: int = 17, integration: str = "trapezoid"):
        super().__init__()
        check_positive(t_max=t_max)
        check_count(3, n_points=n_points)
        if n_points % 2 == 0 or integration != "trapezoid":
            raise ValueError(
                f"n_points must be odd and integration 'trapezoid', got n_points={n_points}, "
                f"integration={integration!r}"
            )
        self.t_max, self.n_points, self.integration = t_max, n_points, integration
        hold_knots(self, t_max, n_points)

    def forward(self, x: Tensor) -> Tensor:
        """Statistics [..., K] of x [..., N, K] over the samples of all processes, in plain torch."""
        name, processes = name_of(world())
        angle = exact(x)[..., None] * self.t
        sums = torch.stack([angle.cos().sum(-3), angle.sin().sum(-3)])  # [2, ..., K, n_points]
        samples = x.shape[-2]
        if name:
            if transformed():
                raise RuntimeError("EppsPulley over several processes supports neither torch.func nor forward mode")
            joint = torch.cat([sums.detach().flatten(), sums.new_full((1,), samples)])
            torch.distributed.all_reduce(joint)
            samples = joint[-1]
            # the factor makes up for data-parallel training, which averages gradients over processes
            sums = joint[:-1].view_as(sums) + processes * (sums - sums.detach())
        mean = sums / samples
        error = (mean[0] - self.phi) ** 2 + mean[1] ** 2
        return samples * (error * self.weights).sum(-1)


class SlicingUnivariateTest(BufferedModule):
    """Mean of a statistic over random directions, new ones at each call, for the samples of all processes.

    Differs from the original: directions come from a counter-based generator whose seed is the buffer `global_step`,
    which is not read on the host. Only `EppsPulley` and the settings below are supported.

    Args:
        univariate_test: this module's `EppsPulley`.
        num_slices: number of directions.
        reduction: must be `mean`.
        sampler: must be `gaussian`.
        clip_value: must be None.
    """

    global_step: Tensor

    def __init__(
        self,
        univariate_test: EppsPulley,
        num_slices: int,
        reduction: str = "mean",
        sampler: str = "gaussian",
        clip_value: float | None = None,
    ):
        super().__init__()
        if not isinstance(univariate_test, EppsPulley):
            raise ValueError(f"univariate_test must be this module's EppsPulley, got {type(univariate_test).__name__}")
        if reduction != "mean" or sampler != "gaussian" or clip_value is not None:
            raise ValueError(
                "only reduction='mean', sampler='gaussian' and clip_value=None are supported, "
                f"got {reduction!r}, {sampler!r} and {clip_value}"
            )
        check_count(1, num_slices=num_slices)
        self.univariate_test, self.num_slices = univariate_test, num_slices
        self.reduction, self.sampler, self.clip_value = reduction, sampler, clip_value
        self.hold("global_step", 0, dtype=torch.int64)

    def forward(self, x: Tensor) -> Tensor:
        """Mean statistic, 0-dim, of samples x [..., N, D]."""
        group = world()
        statistic = sigreg(
            x,
            num_slices=self.num_slices,
            t_max=self.univariate_test.t_max,
            num_points=self.univariate_test.n_points,
            seed=agree(self.global_step, group),
            group=group,
        )
        count_up(self.global_step)
        return statistic.mean()
