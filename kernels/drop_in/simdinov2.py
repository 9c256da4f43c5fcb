"""The loss of SimDINO v2 (RobinWu218/SimDINO, simdinov2/loss/dino_clstoken_loss.py): inner products, not cosines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..internal.checks import plain
from .common import exact
from .simdino import Expansion, compression


class MCRLoss(Expansion):
    """The loss of SimDINO v2. `eps` and `coeff` may be set at any time, to numbers or 0-dim tensors.

    Differs from the original: center=True raises an error. The original's base class then keeps a centre, which this
    loss never reads.

    Args:
        out_dim: width of the features; unused, and so are further arguments, such as the original's schedules.
        expa_type: 0 to expand the student's first views, 1 to expand their mean with the teacher's views.
        reduce_cov, local_gram: as in `simdino.MCRLoss`.
        eps: distortion.
        coeff: weight of the compression.
        center: must be False.
    """

    def __init__(
        self,
        out_dim: int,
        expa_type: int = 0,
        reduce_cov: int = 0,
        eps: float = 0.05,
        coeff: float = 1,
        center: bool = False,
        *args,
        local_gram: bool = False,
        **kwargs,
    ):
        super().__init__(expa_type, reduce_cov, eps, coeff, local_gram)
        if center:
            raise ValueError("center=True keeps a centre that SimDINO's loss never reads: leave it False")

    def forward(
        self,
        student_feat_list: Sequence[Tensor],
        teacher_feat_list: Sequence[Tensor],
        no_diag: bool = True,
        normalized: bool = True,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss, and its detached parts.

        Args:
            student_feat_list: rows [m, p] of each of S views; the teacher's T views come first.
            teacher_feat_list: rows [m, p] of each of T views.
            no_diag: whether to leave pairs of equal views out of the compression.
            normalized: whether the rows have unit length already.

        Returns:
            The loss, and a dict of `loss`, `comp_loss`, `global_comp_loss` and `expa_loss`.
        """
        student = exact(torch.stack(tuple(student_feat_list)))
        teacher = exact(torch.stack(tuple(teacher_feat_list)))
        if not normalized:
            student, teacher = F.normalize(student, dim=-1), F.normalize(teacher, dim=-1)
        comp, global_comp = compression(student, teacher, no_diag)
        expa = self.expansion(student, teacher)
        loss = -plain(self.coeff) * comp - expa
        parts = {"loss": loss, "comp_loss": comp, "global_comp_loss": global_comp, "expa_loss": expa}
        return loss, {name: part.detach() for name, part in parts.items()}
