"""The loss of SimDINO (RobinWu218/SimDINO, simdino/main_dino.py): teacher and student agree, each view spreads out.

    loss = -coeff * comp - expa
    comp = mean cosine of teacher view t and student view s over the pairs t ≠ s
    expa = γ/2 * mean over views of R(Z; p / (n eps)),    γ = 1/p + 1/n

for rows Z [n, p] of a view, not centred, where n counts the rows of all processes. Source: arXiv 2502.10385.
"""

from __future__ import annotations

import functools
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..coding_rate import joint_rate
from ..collectives import name_of
from ..internal.checks import check_count, check_finite, check_positive, plain
from .common import exact, mean_of_rows, world


def compression(student: Tensor, teacher: Tensor, no_diag: bool = True) -> tuple[Tensor, Tensor]:
    """Mean inner product of teacher and student rows over pairs of views, and the sum over global views divided by T.

    Args:
        student: [S, m, p]; the first T views are those of the teacher.
        teacher: [T, m, p].
        no_diag: whether to leave out pairs of equal views; the divisor of the mean does not count them in any case.
    """
    T, S = len(teacher), len(student)
    same = min(T, S)
    # sum over views first, so that there is no product for each pair
    pairs = mean_of_rows((teacher.sum(0) * student.sum(0)).sum(-1))
    pairs_global = mean_of_rows((teacher.sum(0) * student[:T].sum(0)).sum(-1))
    diagonal = mean_of_rows((teacher[:same] * student[:same]).sum((0, -1))) if no_diag else 0
    return (pairs - diagonal) / (T * S - same), ((pairs_global - diagonal) / T).detach()


class Expansion(nn.Module):
    """Settings of the losses of SimDINO v1 and v2, and the expansion term, which they share."""

    def __init__(self, expa_type: int, reduce_cov: int, eps: float, coeff: float, local_gram: bool):
        super().__init__()
        if expa_type not in (0, 1):
            raise ValueError(f"expa_type must be 0 (student) or 1 (its mean with the teacher), got {expa_type}")
        if reduce_cov not in (0, 1):
            raise ValueError(f"reduce_cov must be 0 or 1 (the Gram matrix of all processes), got {reduce_cov}")
        check_positive(eps=eps)
        check_finite(coeff=coeff)
        self.expa_type, self.reduce_cov, self.local_gram = expa_type, reduce_cov, local_gram
        self.eps, self.coeff = eps, coeff

    def expansion(self, student: Tensor, teacher: Tensor) -> Tensor:
        """γ/2 times the mean rate of the views, of student [S, m, p] and teacher [T, m, p] as in `compression`."""
        views = student[: len(teacher)]
        if self.expa_type == 1:
            views = (views + teacher) / 2
        group, eps = world(), plain(self.eps)
        _, processes = name_of(group)
        if self.reduce_cov == 1 or processes == 1:
            rates, _, rows = joint_rate(views, None, eps, False, None, group)
        else:
            if not self.local_gram and not torch.compiler.is_compiling():
                _announce_local_gram(processes)
            if not views.shape[1]:  # a process without rows contributes a gradient of zero to the average
                return views.sum()
            rates, _, rows = joint_rate(views, None, eps * processes, False, None, None)
            rows = rows * processes
        gamma = 1 / views.shape[-1] + 1 / rows
        return (gamma / 2 * rates).mean()


@functools.cache
def _announce_local_gram(processes: int) -> None:
    warnings.warn(
        f"SimDINO's reduce_cov=0 on {processes} processes divides local Gram matrices by the number of all rows, as if "
        "eps were larger by the number of processes. reduce_cov=1 is the rate of the whole batch; if 0 is meant, "
        "local_gram=True silences this",
        stacklevel=6,
    )


class MCRLoss(Expansion):
    """The loss of SimDINO v1. `eps` and `coeff` may be set at any time, to numbers or 0-dim tensors.

    Args:
        ncrops: number of the student's views.
        reduce_cov: 1 for the rate of all processes' rows. 0, the original's default, divides the Gram matrix of each
            process by the number of all rows, as if eps were multiplied by the number of processes; with several
            processes this gives a warning, once.
        expa_type: 0 to expand the student's first two views, 1 to expand their mean with the teacher's views.
        eps: distortion.
        coeff: weight of the compression.
        local_gram: True silences the warning about reduce_cov=0.
    """

    def __init__(
        self,
        ncrops: int,
        reduce_cov: int = 0,
        expa_type: int = 0,
        eps: float = 0.5,
        coeff: float = 1.0,
        *,
        local_gram: bool = False,
    ):
        super().__init__(expa_type, reduce_cov, eps, coeff, local_gram)
        check_count(1, ncrops=ncrops)
        self.ncrops = ncrops

    def forward(self, student_feat: Tensor, teacher_feat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, and detached compression and expansion, of rows [ncrops * m, p] and [2 * m, p], ordered by view."""
        student = exact(student_feat).unflatten(0, (self.ncrops, len(student_feat) // self.ncrops))
        teacher = exact(teacher_feat).unflatten(0, (2, len(teacher_feat) // 2))
        # 1e-8 is the smallest norm in the original's cosine similarity
        comp, _ = compression(F.normalize(student, dim=-1, eps=1e-8), F.normalize(teacher, dim=-1, eps=1e-8))
        expa = self.expansion(student, teacher)
        return -plain(self.coeff) * comp - expa, comp.detach(), expa.detach()
