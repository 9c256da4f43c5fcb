"""An EMA teacher."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels import cosine_decay, ema_update_
from ....kernels.precision import widest
from ....loaders.batch import Views
from .base import Target
from .config import EMATargetConfig


class EMATeacher(Target):
    """The target comes from a teacher, whose weights are a moving average of those of the encoder and the projector.

    In training the teacher normalises over the batch of target views, as in the reference code. For evaluation its
    batch-norm statistics are its own (`ignore`), the encoder's (`copy`) or averaged like the weights (`average`).
    """

    def __init__(self, config: EMATargetConfig, encoder: nn.Module, projector: nn.Module | None = None):
        super().__init__()
        self.config = config
        self.teacher: Any = copy.deepcopy(encoder).requires_grad_(False)
        self.projector = None if projector is None else copy.deepcopy(projector).requires_grad_(False)

    @torch.no_grad()
    def features(self, encoder: nn.Module, views: Views) -> Tensor:
        return self.teacher(views)

    @torch.no_grad()
    def project(self, projector: nn.Module, features: Tensor) -> Tensor:
        assert self.projector is not None
        return self.projector(features)

    def followed(self, students: tuple[nn.Module | None, ...]) -> list[tuple[nn.Module, nn.Module]]:
        """The encoder and the projector, each with its copy."""
        copies = (self.teacher, self.projector)
        return [(ours, theirs) for ours, theirs in zip(students, copies, strict=False) if ours and theirs]

    def pairs(self, *students: nn.Module | None) -> list[tuple[nn.Parameter, Tensor]]:
        parts = self.followed(students)
        return [pair for ours, theirs in parts for pair in zip(ours.parameters(), theirs.parameters(), strict=True)]

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        if self.config.schedule == "constant":
            return torch.full((), self.config.decay, dtype=widest(step.device), device=step.device)
        return cosine_decay(step, start=self.config.decay, total_steps=total_steps)

    @torch.no_grad()
    def update(self, decay: Tensor, *students: nn.Module | None, weights: bool = True) -> None:
        pairs: list[tuple[Tensor, Tensor]] = [*self.pairs(*students)] if weights else []
        for ours, theirs in self.followed(students) if self.config.buffers != "ignore" else ():
            for student, teacher in zip(ours.buffers(), theirs.buffers(), strict=True):
                if self.config.buffers == "average" and teacher.is_floating_point():
                    pairs.append((student, teacher))
                else:
                    teacher.copy_(student)
        ema_update_([teacher for _, teacher in pairs], [student for student, _ in pairs], decay)
