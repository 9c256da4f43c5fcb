"""What numbers an operation takes. Nothing here waits for a device, and nothing is looked at while torch traces."""

from __future__ import annotations

import math
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from .transforms import transformed

__all__ = ["check_count", "check_positive", "readable"]


def readable(tensor: Tensor) -> bool:
    """Whether looking at the numbers of a tensor is free: they are on the host, no tracer or transform in between."""
    if torch.compiler.is_compiling() or transformed():
        return False
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type == "cpu"


def check_positive(**values: float | Tensor) -> None:
    """See that numbers, by their names, are positive and finite.

    Raises:
        ValueError: names the first that is not.
    """
    if torch.compiler.is_compiling():  # a number that changes would be a graph for each of its values
        return
    for name, value in values.items():
        if isinstance(value, Tensor) and (value.ndim or not readable(value)):
            continue
        if not isinstance(value, (Real, Tensor)) or not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if value == math.inf:
            raise ValueError(f"{name} must be finite, got {value}")


def check_count(least: int, **values: int) -> None:
    """See that numbers, by their names, are integers and at least so large.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} at least, got {value}")
