"""AdamW with decay where it belongs, and a learning rate that is a function of the step."""

import math
from collections.abc import Iterable

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ...kernels import AdamWEMA
from .config import OptimConfig


def build_optimizer(
    model: nn.Module, config: OptimConfig, lr: Tensor, teacher: Iterable[tuple[nn.Parameter, Tensor]] = ()
) -> Optimizer:
    """AdamW over the trainable parameters. Only matrices and kernels decay, but for what a part lists in `no_decay`.

    Args:
        model: module with the parameters.
        config: config of the optimiser.
        lr: 0-dim, float64 if the device has it, on the device; `set_rate` writes it, the optimiser reads it.
        teacher: pairs of a parameter and the tensor that follows it; `adamw` leaves them alone.
    """
    parts = {f"{name}." if name else "": part for name, part in model.named_modules()}
    spared = {f"{prefix}{name}" for prefix, part in parts.items() for name in getattr(part, "no_decay", ())}
    decayed, undecayed = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (decayed if p.ndim > 1 and name not in spared else undecayed).append(p)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    first, second = config.betas
    if config.kind == "adamw":
        rate = lr.float() if lr.is_cuda else lr  # torch's takes float32 on a GPU
        return AdamW(groups, lr=rate, betas=(first, second), fused=True, capturable=lr.is_cuda)
    return AdamWEMA(groups, lr=lr, betas=(first, second), teacher=teacher)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of step 0 <= `step` < `total_steps`: linear warm-up, then a cosine or a constant.

    The first step of a warm-up is one part of it, not zero; the last step of a cosine is `min_lr`.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch) if config.warmup_steps is None else config.warmup_steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Learning rate of the next step; it is written in place and nothing waits."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)
