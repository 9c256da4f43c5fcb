"""Where the target of the prediction comes from. A new source is one class and one line in `TARGETS`."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from seqjepa.engine.config import TargetConfig
from seqjepa.kernels import ema_update_

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

    def decay(self, progress: float) -> float:
        """Decay at `progress` in [0, 1] of the training."""
        if self.config.schedule == "constant":
            return self.config.decay
        return 1 - (1 - self.config.decay) * (1 + math.cos(math.pi * progress)) / 2

    @torch.no_grad()
    def update(self, encoder: nn.Module, progress: float) -> None:
        """Follow the encoder by one step; called after the optimiser's."""
        decay = self.decay(progress)
        ema_update_(self.teacher.parameters(), encoder.parameters(), decay)
        if self.config.buffers == "ignore":
            return
        pairs = list(zip(self.teacher.buffers(), encoder.buffers(), strict=True))
        floating = [pair for pair in pairs if pair[0].is_floating_point()]
        if self.config.buffers == "average":
            ema_update_((t for t, _ in floating), (s for _, s in floating), decay)
        for teacher, student in pairs:
            if self.config.buffers == "copy" or not teacher.is_floating_point():
                teacher.copy_(student)


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

    def update(self, encoder: nn.Module, progress: float) -> None:
        """Nothing to follow."""


TARGETS: dict[str, type[nn.Module]] = {"ema": EMATeacher, "stop_gradient": StopGradient}


def build_target(config: TargetConfig, encoder: nn.Module) -> nn.Module:
    """The source of targets that `config.kind` names; its initial state follows `encoder`."""
    return TARGETS[config.kind](config, encoder)
