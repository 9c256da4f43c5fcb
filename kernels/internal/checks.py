"""Checks of the numbers that operations take. They never wait for a device, and do nothing while torch traces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, cast, overload

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .transforms import transformed

__all__ = ["check_count", "check_finite", "check_positive", "check_tensors", "plain", "readable", "real"]


def readable(tensor: Tensor) -> bool:
    """Whether the values of a tensor can be read at no cost: it is on the CPU, and nothing traces or transforms it."""
    if torch.compiler.is_compiling() or transformed() or is_in_torch_dispatch_mode():
        return False
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer) and tensor.device.type == "cpu"


@overload
def plain(value: float) -> float: ...
@overload
def plain(value: Tensor) -> Tensor: ...
def plain(value: Any) -> Any:
    """A setting as arithmetic with tensors accepts it: a 0-dim NumPy array becomes a number."""
    if torch.compiler.is_compiling() or isinstance(value, Tensor):  # torch.compile traces NumPy arrays as tensors
        return value
    return value.item() if getattr(value, "ndim", None) == 0 else value


def real(value: Any) -> float | None:
    """The number itself, or the one in a 0-dim tensor or array; None for anything else, bools included."""
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    return cast(float, number) if isinstance(number, Real) and not isinstance(number, bool) else None


def _read(values: dict[str, float | Tensor]) -> Iterator[tuple[str, float | Tensor, float | None]]:
    if torch.compiler.is_compiling():  # looking at a number would compile a graph for each of its values
        return
    for name, value in values.items():
        if not isinstance(value, Tensor) or value.ndim or readable(value):
            yield name, value, real(value)


def check_finite(**values: float | Tensor) -> None:
    """Check that settings, given by name, are finite numbers.

    Raises:
        ValueError: one is not; names the first.
    """
    for name, value, number in _read(values):
        if number is None or not -math.inf < number < math.inf:
            raise ValueError(f"{name} must be a finite number, got {value}")


def check_positive(**values: float | Tensor) -> None:
    """Check that settings, given by name, are positive numbers that float32 can compute with.

    Raises:
        ValueError: one is not; names the first.
    """
    for name, value, number in _read(values):
        if number is None or not number > 0:
            raise ValueError(f"{name} must be positive, got {value}")
        if not 1e-30 <= number <= 1e30:
            raise ValueError(f"{name} must lie between 1e-30 and 1e30, got {value}")


def check_tensors(**values: object) -> None:
    """Check that arguments, given by name, are tensors.

    Raises:
        ValueError: one is not; names the first.
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(value).__name__}")


def check_count(least: int, **values: int) -> None:
    """Check that numbers, given by name, are integers and not smaller than `least`.

    Raises:
        ValueError: one is not; names the first.
    """
    for name, value in values.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name} must be a whole number >= {least}, got {value}")
