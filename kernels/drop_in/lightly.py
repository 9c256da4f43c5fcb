"""The EMP-SSL and LeJEPA losses of lightly (lightly-ai/lightly 1.6, loss/emp_ssl_loss.py and loss/lejepa_loss.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..coding_rate import coding_rate
from ..internal.buffers import BufferedModule
from ..internal.checks import check_count, check_finite, check_positive, plain
from ..sigreg import sigreg
from .common import agree, exact, hold_knots, mean_of_rows, world


class EMPSSLLoss(nn.Module):
    """+½ mean over views of R(Z; d / (B eps)) - inv_coef * mean cosine of a row and its mean over views.

    The sign of the rate is that of lightly, the opposite of EMP-SSL's own code and paper: minimising this loss lowers
    the rate. `emp_ssl.TotalCodingRate` has the other sign.

    Args:
        tcr_eps: distortion.
        inv_coef: weight of the cosine.
    """

    def __init__(self, tcr_eps: float = 0.2, inv_coef: float = 200.0):
        super().__init__()
        check_positive(tcr_eps=tcr_eps)
        check_finite(inv_coef=inv_coef)
        self.tcr_eps, self.inv_coef = tcr_eps, inv_coef

    def forward(self, z_views: Sequence[Tensor]) -> Tensor:
        """Loss of rows [B, d] of each view."""
        z = exact(torch.stack(tuple(z_views)))
        mean = z.mean(0)
        # not F.cosine_similarity, whose gradient takes four times as long
        cosine = (z * mean).sum(-1) / (_length(z) * _length(mean))
        return coding_rate(z, eps=self.tcr_eps, center=False).mean() / 2 - plain(self.inv_coef) * cosine.mean()


def _length(z: Tensor) -> Tensor:
    return torch.linalg.vector_norm(z, dim=-1).clamp(min=1e-8)


class SIGReg(BufferedModule):
    """LeJEPA's statistic, with the factor N, averaged over random directions.

    Differs from the original: directions come from a counter-based generator, whose seed is drawn from torch's. The
    buffers `t`, `phi` and `weights` only keep state dicts compatible.

    Args:
        knots: number of knots on [0, t_max].
        t_max: largest knot.
        num_vectors: number of directions.
        gather_distributed: whether the samples of all processes form one batch.
    """

    def __init__(
        self, *, knots: int = 17, t_max: float = 3.0, num_vectors: int = 1024, gather_distributed: bool = False
    ):
        super().__init__()
        check_count(2, knots=knots)
        check_count(1, num_vectors=num_vectors)
        check_positive(t_max=t_max)
        self.knots, self.t_max, self.num_vectors = knots, t_max, num_vectors
        self.gather_distributed = gather_distributed
        hold_knots(self, t_max, knots)

    def forward(self, proj: Tensor) -> Tensor:
        """Mean statistic, 0-dim, of samples [..., N, C]."""
        group = world() if self.gather_distributed else None
        seed = torch.randint(2**62, (), device=proj.device)
        statistic = sigreg(
            proj,
            num_slices=self.num_vectors,
            t_max=self.t_max,
            num_points=self.knots,
            seed=agree(seed, group),
            group=group,
        )
        return statistic.mean()


class LeJEPALoss(nn.Module):
    """lambda_param * SIGReg of all views + (1 - lambda_param) * mean square distance to the mean global view.

    Args:
        lambda_param: weight of SIGReg, in [0, 1].
        gather_distributed, sigreg_knots, sigreg_t_max, sigreg_num_vectors: as in `SIGReg`.
    """

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
    ):
        super().__init__()
        check_finite(lambda_param=lambda_param)
        if not 0 <= lambda_param <= 1:
            raise ValueError(f"lambda_param must be in [0, 1], got {lambda_param}")
        self.lambda_param = lambda_param
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
        )

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        """Loss of projections [V_local, N, D] and [V_global, N, D]."""
        shapes = local_proj.shape, global_proj.shape
        # N may be 0, since a process may have no samples; if it is the only process, `sigreg` raises an error
        if any(len(shape) != 3 or 0 in (shape[0], shape[2]) for shape in shapes) or shapes[0][1:] != shapes[1][1:]:
            raise ValueError(
                "local_proj and global_proj must be [V, N, D] with at least one view each and the same N and D, "
                f"got {list(shapes[0])} and {list(shapes[1])}"
            )
        views = exact(torch.cat([global_proj, local_proj]))
        distance = mean_of_rows((views - views[: len(global_proj)].mean(0)).square())
        weight = plain(self.lambda_param)
        return weight * self.sigreg(views) + (1 - weight) * distance
