"""What numbers an operation takes. Nothing here waits for a device, and nothing is looked at while torch traces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .transforms import transformed

__all__ = ["check_count", "check_finite", "check_positive", "plain", "readable", "real"]


def readable(tensor: Tensor) -> bool:
    """Whether looking at the numbers of a tensor is free: they are on the host, no tracer or transform in between."""
    if torch.compiler.is_compiling() or transformed() or is_in_torch_dispatch_mode():
        return False
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type == "cpu"


@overload
def plain(value: float) -> float: ...
@overload
def plain(value: Tensor) -> Tensor: ...
def plain(value: Any) -> Any:
    """A setting as arithmetic with tensors takes it: a 0-dim array of NumPy is a number, except to a tensor."""
    if torch.compiler.is_compiling() or isinstance(value, Tensor):  # to torch.compile such an array is a tensor
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def real(value: Any) -> float | None:
    """A number as it is, or the one in a 0-dim tensor or array; none where there is another thing, a bool included."""
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    return cast(float, number) if isinstance(number, Real) and not isinstance(number, bool) else None


def _read(values: dict[str, float | Tensor]) -> Iterator[tuple[str, float | Tensor, float | None]]:
    if torch.compiler.is_compiling():  # a number that changes would be a graph for each of its values
        return
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.ndim or readable(value):
            yield name, value, real(value)


def check_finite(**values: float | Tensor) -> None:
    """See that settings, by their names, are finite numbers.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value, number in _read(values):
        if number is None or not -math.inf < number < math.inf:
            raise ValueError(f"{name} must be a finite number, got {value}")


def check_positive(**values: float | Tensor) -> None:
    """See that settings, by their names, are positive numbers with which float32 can compute.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value, number in _read(values):
        if number is None or not number > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if not 1e-30 <= number <= 1e30:
            raise ValueError(f"{name} must lie between 1e-30 and 1e30, got {value}")


def check_count(least: int, **values: int) -> None:
    """See that numbers, by their names, are integers and at least so large.

    Raises:
        ValueError: names the first that is not.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} at least, got {value}")
