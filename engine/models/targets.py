"""Sources of the prediction's target. A new source is one class and one line in `TARGETS`."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...kernels import cosine_decay, ema_update_
from ..runtime.distributed import joined_mean
from .config import TargetConfig

__all__ = ["TARGETS", "EMATeacher", "OnlineTarget", "Sharpening", "build_target", "encode"]


def encode(encoder: nn.Module, views: Tensor) -> Tensor:
    """Features [B, N, D] of views [B, N, C, H, W]."""
    flat = views.flatten(0, 1).contiguous(memory_format=torch.channels_last)
    return encoder(flat).unflatten(0, views.shape[:2])


class Sharpening(nn.Module):
    """Turns targets into distributions: softmax((target - center) / temperature); center is their running mean.

    In training the center is updated before it is used, as in the reference code.
    Source: DINO (arXiv 2104.14294), section 3.1.
    """

    def __init__(self, width: int, temperature: float, momentum: float):
        super().__init__()
        self.temperature, self.momentum = temperature, momentum
        self.register_buffer("center", torch.zeros(width))
        self.group: ProcessGroup | None = None  # processes whose targets form one batch

    def forward(self, targets: Tensor) -> Tensor:
        """Distributions of targets [B, N, E], in float32."""
        targets = targets.float()
        if self.training:
            mean = joined_mean(targets.detach().mean((0, 1)), self.group)
            self.center.lerp_(mean, 1 - self.momentum)
        return ((targets - self.center) / self.temperature).softmax(-1)


class EMATeacher(nn.Module):
    """The target comes from a teacher, whose weights are a moving average of the encoder's.

    In training the teacher normalises over the batch of target views, as in the reference code. For evaluation its
    batch-norm statistics are its own (`ignore`), the encoder's (`copy`) or averaged like the weights (`average`).
    """

    joint = False
    detached = True

    def __init__(self, config: TargetConfig, encoder: nn.Module):
        super().__init__()
        self.config = config
        self.teacher = copy.deepcopy(encoder).requires_grad_(False)

    @torch.no_grad()
    def features(self, encoder: nn.Module, views: Tensor) -> Tensor:
        """Features [B, N, D] of target views [B, N, C, H, W]."""
        return encode(self.teacher, views)

    def pairs(self, encoder: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """Pairs of a weight of the encoder and the weight of the teacher that follows it."""
        return list(zip(encoder.parameters(), self.teacher.parameters(), strict=True))

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        """Decay at a training step, on the device: float64, 0-dim."""
        if self.config.schedule == "constant":
            return torch.full((), self.config.decay, dtype=torch.float64, device=step.device)
        return cosine_decay(step, start=self.config.decay, total_steps=total_steps)

    @torch.no_grad()
    def update(self, encoder: nn.Module, decay: Tensor, *, weights: bool = True) -> None:
        """Move the teacher one step towards the encoder; called after the optimiser's step.

        Args:
            encoder: the encoder that the teacher follows.
            decay: weight of the teacher in the average.
            weights: False if the optimiser has already updated the weights, so that only buffers are left.
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


class OnlineTarget(nn.Module):
    """The target is the encoder's own feature, without gradient (`stop_gradient`) or with it (`shared`).

    With `batch_statistics=joint` all views are encoded together, so that target and observed views share batch
    statistics; with `own` the target views are a batch of their own, as in the reference code.
    """

    def __init__(self, config: TargetConfig, encoder: nn.Module):
        super().__init__()
        self.joint = config.batch_statistics == "joint"
        self.detached = config.kind == "stop_gradient"

    def features(self, encoder: nn.Module, views: Tensor) -> Tensor:
        """Features [B, N, D] of target views [B, N, C, H, W] that are encoded separately."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return encode(encoder, views)

    def pairs(self, encoder: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
        """No pairs, because there is no teacher."""
        return []

    def decay(self, step: Tensor, total_steps: int) -> Tensor:
        """Decay of 1, because there is no teacher."""
        return torch.ones((), dtype=torch.float64, device=step.device)

    def update(self, encoder: nn.Module, decay: Tensor, *, weights: bool = True) -> None:
        """Do nothing, because there is no teacher."""


TARGETS: dict[str, type[nn.Module]] = {"ema": EMATeacher, "stop_gradient": OnlineTarget, "shared": OnlineTarget}


def build_target(config: TargetConfig, encoder: nn.Module) -> nn.Module:
    """Build the source of targets that `config.kind` names; its initial state is taken from `encoder`."""
    return TARGETS[config.kind](config, encoder)
