"""Helpers of several drop-ins: exact inputs, process groups, class memberships."""

from __future__ import annotations

import math

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed import ProcessGroup

from ..coding_rate import coding_rate
from ..collectives import name_of
from ..internal.buffers import BufferedModule


def exact(z: Tensor) -> Tensor:
    """`z` in float32; float64 stays float64."""
    return z.to(torch.promote_types(z.dtype, torch.float32))


def mean_of_rows(values: Tensor) -> Tensor:
    """Mean of all values, but zero (not NaN) on a process that has no rows."""
    return values.sum() / max(values.numel(), 1)


def world() -> ProcessGroup | None:
    """The group of all processes; None unless torch.distributed is initialised."""
    return torch.distributed.group.WORLD if torch.distributed.is_initialized() else None


def agree(seed: Tensor, group: ProcessGroup | None) -> Tensor:
    """One seed for all processes, the largest of their seeds, without waiting for the device."""
    name, _ = name_of(group)
    return collectives.wait_tensor(collectives.all_reduce(seed, "max", name)) if name else seed  # pyright: ignore[reportArgumentType]


def hold_knots(module: BufferedModule, t_max: float, num_points: int) -> None:
    """Buffers of lejepa's EppsPulley and lightly's SIGReg: knots on [0, t_max], φ(t), and trapezoidal weights times φ.

    The weights are doubled, so that they integrate an even function over [-t_max, t_max].
    """
    step = float(t_max) / (num_points - 1)
    t = [number * step for number in range(num_points)]
    phi = [math.exp(-(knot**2) / 2) for knot in t]
    doubled = [step, *[2 * step] * (num_points - 2), step]
    weights = [weight * window for weight, window in zip(doubled, phi, strict=True)]
    for name, values in (("t", t), ("phi", phi), ("weights", weights)):
        module.hold(name, values, dtype=torch.float32)


def memberships(labels: Tensor, num_classes: int | None, like: Tensor) -> Tensor:
    """One-hot memberships [k, m] of labels [m]; without `num_classes`, k is the largest label plus one."""
    one_hot = F.one_hot(labels.long(), -1 if num_classes is None else int(num_classes))
    return one_hot.T.to(device=like.device, dtype=like.dtype)


def class_rate(X: Tensor, members: Tensor, eps: float | Tensor) -> Tensor:
    """½ Σ_j (m_j / m) R(class j), for X [m, p] and members [k, m] with m_j = Σ_i members_ji.

    The originals add 1e-8 to m_j to avoid division by zero; here an empty class has rate and gradient 0.
    """
    rates = coding_rate(X, eps=eps, center=False, weights=members)
    return (members.sum(-1) * rates).sum() / (2 * X.shape[0])
