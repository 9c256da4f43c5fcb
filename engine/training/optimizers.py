"""AdamW with decay where it belongs, and a learning rate that is a function of the step."""

import math
from collections.abc import Callable, Iterable

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from ...kernels import AdamWEMA
from .config import OptimConfig


def decays(model: nn.Module) -> Callable[[str, nn.Parameter], bool]:
    """Which parameters weight decay applies to: matrices and kernels, but for those that a part lists in `no_decay`."""
    parts = {f"{name}." if name else "": part for name, part in model.named_modules()}
    spared = {f"{prefix}{name}" for prefix, part in parts.items() for name in getattr(part, "no_decay", ())}
    return lambda name, parameter: parameter.ndim > 1 and name not in spared


def build_optimizer(
    model: nn.Module, config: OptimConfig, lr: Tensor, teacher: Iterable[tuple[nn.Parameter, Tensor]] = ()
) -> Optimizer:
    """AdamW over the trainable parameters, in two groups.

    Args:
        model: whose parameters.
        config: of the optimiser.
        lr: float64, 0-dim, on the device; what `set_rate` writes and the optimiser reads.
        teacher: pairs of a parameter and the tensor that follows it; `adamw` leaves them alone.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = decays(model)
    first, second = config.betas
    groups = [
        {"params": [p for name, p in trainable if decayed(name, p)], "weight_decay": config.weight_decay},
        {"params": [p for name, p in trainable if not decayed(name, p)], "weight_decay": 0.0},
    ]
    if config.kind == "adamw":  # torch's takes float32 on a GPU, and a number on a CPU
        rate = lr.float() if lr.is_cuda else config.lr
        return AdamW(groups, lr=rate, betas=(first, second), fused=True, capturable=lr.is_cuda)
    return AdamWEMA(groups, lr=lr, betas=(first, second), teacher=teacher)


def learning_rate(config: OptimConfig, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of step 0 <= `step` < `total_steps`: linear warm-up, then a cosine or a constant.

    The first step of a warm-up is one part of it, not zero; the last step of a cosine is `min_lr`.
    """
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(progress, 1.0))) / 2


def set_rate(optimizer: Optimizer, lr: float) -> None:
    """Learning rate of the next step; where it is a tensor, it is written in place and nothing waits."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def moves_teacher(optimizer: Optimizer) -> bool:
    """Whether its step also moves the teacher's weights."""
    return isinstance(optimizer, AdamWEMA)


def set_decay(optimizer: Optimizer, decay: Tensor) -> None:
    """Decay of the teacher in the next step; an optimiser without a teacher has no use for it."""
    for group in optimizer.param_groups:
        if "ema_decay" in group:
            group["ema_decay"] = decay
