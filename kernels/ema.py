"""Exponential moving average of a teacher's tensors: t <- decay * t + (1 - decay) * s."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["ema_update_"]


@torch.no_grad()
def ema_update_(teacher: Iterable[Tensor], student: Iterable[Tensor], decay: float) -> None:
    """Move each teacher tensor towards its student, in place, in as few launches as the device allows.

    A linear interpolation, so that a teacher that equals its student stays equal: `mul` and `add` would drift.

    Args:
        teacher: floating-point tensors of any shapes; updated in place.
        student: tensors of the same shapes, dtypes and devices, in the same order.
        decay: weight of the teacher, in [0, 1].

    Raises:
        ValueError: `decay` is out of range, or the two differ in number.

    Source: momentum encoder of BYOL (arXiv 2006.07733), section 3.1; teacher of seq-JEPA (arXiv 2505.03176).
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay must be in [0, 1], got {decay}")
    teacher, student = list(teacher), list(student)
    if len(teacher) != len(student):
        raise ValueError(f"{len(teacher)} teacher tensors and {len(student)} student tensors")
    if teacher:
        torch._foreach_lerp_(teacher, student, 1.0 - decay)
