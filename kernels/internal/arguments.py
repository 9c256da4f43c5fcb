"""Arguments of the moving averages: numbers in [0, 1], lists of tensors, and tensors that can be written to."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, _assert_async  # pyright: ignore[reportPrivateImportUsage]

from .backend import widest
from .checks import readable

__all__ = ["as_number", "as_scalar", "check_decay", "check_unit", "check_written", "listed", "on_device"]


def as_scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A number in [0, 1] as a 0-dim tensor on the device, float64 if it has that, without waiting for it."""
    if isinstance(value, Tensor):
        if value.ndim or value.device != device or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a floating 0-dim tensor on {device} like the teacher, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        check_unit(name, value)
        return value
    if torch.compiler.is_compiling():  # the value is only known when the graph runs
        scalar = on_device(value, device)
        _assert_async((scalar >= 0) & (scalar <= 1), f"{name} must be in [0, 1]")
        return scalar
    check_unit(name, value)
    return on_device(value, device)


def check_unit(name: str, value: float | Tensor) -> None:
    """Raise if a value is not in [0, 1], as far as it can be read without waiting."""
    if torch.compiler.is_compiling() or (isinstance(value, Tensor) and not readable(value)):
        return
    if not 0.0 <= as_number(name, value) <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")


def as_number(name: str, value: Any) -> float:
    """The number itself, or the one in a 0-dim tensor or NumPy array."""
    if type(value) is float:
        return value
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, Real):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return cast(float, number)


def check_decay(name: str, decay: float | Tensor) -> None:
    """Raise if a decay is not in [0, 1]. This may wait for the device, so it is for constructors only."""
    if not isinstance(decay, Tensor):
        check_unit(name, decay)
    elif not 0.0 <= as_scalar(name, decay, decay.device) <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {decay}")


def on_device(value: float, device: torch.device) -> Tensor:
    """A number as a 0-dim tensor on the device, float64 if it has that, without waiting for it."""
    if torch.compiler.is_compiling():  # torch.full would be recompiled for each value
        return torch.ones((), dtype=widest(device), device=device) * value
    return torch.full((), float(value), dtype=widest(device), device=device)


def listed(name: str, tensors: Iterable) -> list:
    """The items of an iterable as a list.

    Raises:
        ValueError: the iterable is an iterator that yields nothing, presumably because it was read before.
    """
    found = list(tensors)
    if not found and hasattr(tensors, "__next__"):
        raise ValueError(f"{name} is an iterator that yields nothing: was it read before? A list can be read twice")
    return found


def check_written(tensor: Tensor) -> None:
    """Raise if a tensor that will be written to is expanded, so that elements share memory."""
    steps = tensor.stride()
    if 0 in steps and any(step == 0 and size > 1 for step, size in zip(steps, tensor.shape, strict=True)):
        raise ValueError(
            f"a teacher or live copy of shape {list(tensor.shape)} is expanded, its elements share memory: clone it"
        )
