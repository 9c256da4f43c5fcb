"""An EMA teacher."""

import copy

import torch
from torch import Tensor, nn

from ....kernels import cosine_decay, ema_update_
from ....loaders.batch import Views
from ..config import EMATargetConfig
from .base import Target


class EMATeacher(Target):
    """The target comes from a teacher, whose weights are a moving average of the encoder's.

    In training the teacher normalises over the batch of target views, as in the reference code. For evaluation its
    batch-norm statistics are its own (`ignore`), the encoder's (`copy`) or averaged like the weights (`average`).
    """

    def __init__(self, config: EMATargetConfig, encoder: nn.Module):
        super().__init__()
        self.config = config
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def features(self, encoder: nn.Module, views: Views) -> Tensor:
        return self.teacher(views)

    def pairs(self, encoder: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        return list(zip(encoder.parameters(), self.teacher.parameters(), strict=True))

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        if self.config.schedule == "constant":
            return torch.full((), self.config.decay, dtype=torch.float64, device=step.device)
        return cosine_decay(step, start=self.config.decay, total_steps=total_steps)

    @torch.no_grad()
    def update(self, encoder: nn.Module, decay: Tensor, *, weights: bool = True) -> None:
        pairs: list[tuple[Tensor, Tensor]] = [*self.pairs(encoder)] if weights else []
        if self.config.buffers != "ignore":
            for student, teacher in zip(encoder.buffers(), self.teacher.buffers(), strict=True):
                if self.config.buffers == "average" and teacher.is_floating_point():
                    pairs.append((student, teacher))
                else:
                    teacher.copy_(student)
        ema_update_([teacher for _, teacher in pairs], [student for student, _ in pairs], decay)
