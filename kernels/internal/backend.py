"""Which backend runs an operation, Triton or torch; launching kernels; torch's products in full precision."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.knobs
    import triton.language as tl
    from triton.compiler import CompiledKernel
except ImportError:  # there is no wheel for this platform: the torch implementations are used
    triton = tl = CompiledKernel = None

__all__ = [
    "cdiv",
    "full_precision",
    "jit",
    "launch",
    "tl",
    "triton",
    "triton_dtype",
    "uses_triton",
    "widest",
]

WITHOUT_FLOAT64 = {"mps"}  # types of devices

MOST_BINARIES = 4096  # references to what Triton keeps; sizes of tensors are told apart, so there can be many
_binaries: dict[tuple, tuple[Any, tuple]] = {}

INTERPRETED = triton is not None and triton.knobs.runtime.interpret


def jit(function: Callable) -> Any:
    """`triton.jit`, or the function unchanged if Triton is not installed."""
    return function if triton is None else triton.jit(function)


def cdiv(number: int, size: int) -> int:
    """How many parts of a size hold a number of things; `triton.cdiv` takes a fifth of the time of a launch."""
    return -(-number // size)


def launch(kernel: Any, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Launch a kernel on the device of its first argument, a tensor; Triton alone would use the current device.

    Triton's own launch takes longer than many kernels: it looks at each argument to find the binary that was compiled
    for the likes of it. Here binaries are found by what tells arguments apart. Of Triton's hooks, those around a launch
    still run, those before it looks for a binary only at the first launch.
    """
    if 0 in grid:  # the batch is empty
        return
    index = arguments[0].get_device()  # -1 for a CPU
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            launch(kernel, grid, *arguments, **constants)
        return
    told = [(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, Tensor) else x for x in arguments]
    key = (id(kernel), index, *told, *constants.values())
    binary, values = _binaries.get(key, (None, ()))
    if binary is not None:
        binary[(*grid, 1, 1)[:3]](*arguments, *values)
        return
    binary = kernel[grid](*arguments, **constants)
    if type(binary) is CompiledKernel and not torch.version.hip:  # AMD's tell more tensors apart
        if len(_binaries) >= MOST_BINARIES:
            _binaries.clear()
        _binaries[key] = binary, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])


def triton_dtype(tensor: Tensor):
    """Triton's dtype for a tensor's dtype."""
    return getattr(tl, str(tensor.dtype).removeprefix("torch."))


def widest(device: torch.device) -> torch.dtype:
    """float64; float32 on devices that do not have it, which are Apple's GPUs."""
    return torch.float32 if device.type in WITHOUT_FLOAT64 else torch.float64


def uses_triton(tensor: Tensor) -> bool:
    """Whether an operation on `tensor` launches Triton kernels.

    It does on CUDA devices, and on the CPU under TRITON_INTERPRET=1. float64, which only tests use, runs in torch.
    """
    if tensor.dtype == torch.float64:
        return False
    if tensor.is_cuda and (missing := _missing()):
        _announce(missing)
        return False
    return tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")


@functools.cache
def _missing() -> str | None:
    """Why Triton kernels cannot run on a GPU: Triton or the C compiler that it calls is missing. None if they can."""
    if triton is None:
        return "Triton is not installed"
    compiler = os.environ.get("CC")
    found = shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")
    return None if found else f"there is no C compiler ({compiler or 'gcc or clang'}), which Triton needs"


@functools.cache
def _announce(missing: str) -> None:
    warnings.warn(f"seqjepa.kernels: {missing}, so torch replaces the kernels", stacklevel=4)


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Make torch multiply float32 matrices in float32: no autocast, no TF32, and no bfloat16 on CPUs."""
    backends: Any = torch.backends  # modules that torch replaces by objects with more attributes
    matmul = (backends.cuda if device.type == "cuda" else backends.mkldnn).matmul
    before = matmul.fp32_precision
    full = before in ("ieee", "none")
    if full and not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        if full:
            yield
            return
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:  # a setting that was inherited from torch.backends is inherited again
            matmul.fp32_precision = "none" if before == backends.fp32_precision else before
