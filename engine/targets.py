"""Where the target of the prediction comes from. A new source is one class and one line in `TARGETS`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from seqjepa.engine.config import TargetConfig
from seqjepa.kernels import cosine_decay, ema_update_

__all__ = ["TARGETS", "EMATeacher", "StopGradient", "build_target", "encode"]


def encode(encoder: nn.Module, views: Tensor) -> Tensor:
    """Features [B, N, D] of views [B, N, C, H, W]."""
    flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return encoder(flat).unflatten(0, views.shape[:2])


class EMATeacher(nn.Module):
    """The target is the feature of a teacher, whose weights are a moving average of the encoder's.

    In training the teacher normalises by the batch of target views, as in the reference. For evaluation its
    batch-norm statistics are its own (`ignore`), the encoder's (`copy`) or averaged like the weights (`average`).
    """

    def __init__(self, config: TargetConfig, encoder: nn.Module):
        super().__init__()
        self.config = config
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)

    def forward(self, encoder: nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
        z = encode(encoder, views[:, :-1])
        with torch.no_grad():
            target = encode(self.teacher, views[:, -1:])[:, 0]
        return z, target

    def pairs(self, encoder: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Each weight of the encoder, and the teacher's that follows it."""
        return list(zip(encoder.parameters(), self.teacher.parameters(), strict=True))

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        """Decay at a step of the training, on the device: float64, 0-dim."""
        if self.config.schedule == "constant":
            return torch.full((), self.config.decay, dtype=torch.float64, device=step.device)
        return cosine_decay(step, start=self.config.decay, total_steps=total_steps)

    @torch.no_grad()
    def update(self, encoder: nn.Module, decay: Tensor, *, weights: bool = True) -> None:
        """Follow the encoder by one step; called after the optimiser's.

        Args:
            encoder: whose teacher this is.
            decay: weight of the teacher.
            weights: False where the optimiser has moved the weights already, and only buffers are left.
        """
        pairs = self.pairs(encoder) if weights else []
        if self.config.buffers != "ignore":
            for student, teacher in zip(encoder.buffers(), self.teacher.buffers(), strict=True):
                if self.config.buffers == "average" and teacher.is_floating_point():
                    pairs.append((student, teacher))
                else:
                    teacher.copy_(student)
        if self.config.update == "kernel":
            ema_update_([teacher for _, teacher in pairs], [student for student, _ in pairs], decay)
        else:
            for student, teacher in pairs:
                teacher.lerp_(student, (1 - decay).to(teacher.dtype))


class StopGradient(nn.Module):
    """The target is the encoder's own feature, without gradient.

    All views pass together, so that target and observed views share batch statistics (defect D22 of the
    reference: the target's came from a batch of its own).
    """

    def __init__(self, config: TargetConfig, encoder: nn.Module):
        super().__init__()

    def forward(self, encoder: nn.Module, views: Tensor) -> tuple[Tensor, Tensor]:
        z = encode(encoder, views)
        return z[:, :-1], z[:, -1].detach()

    def pairs(self, encoder: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """There is no teacher."""
        return []

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        """Decay of no teacher."""
        return torch.ones((), dtype=torch.float64, device=step.device)

    def update(self, encoder: nn.Module, decay: Tensor, *, weights: bool = True) -> None:
        """Nothing to follow."""


TARGETS: dict[str, type[nn.Module]] = {"ema": EMATeacher, "stop_gradient": StopGradient}


def build_target(config: TargetConfig, encoder: nn.Module) -> nn.Module:
    """The source of targets that `config.kind` names; its initial state follows `encoder`."""
    return TARGETS[config.kind](config, encoder)
