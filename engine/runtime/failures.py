"""Messages for failures of the machine: a full disk, no memory left, data that disappear."""

import contextlib
import ctypes
import errno
import os
import signal
from collections.abc import Callable, Iterator

import torch.distributed as dist

from ...configs.errors import first_line, out_of_memory, shown

STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG, errno.ESTALE, errno.ENODEV}
PEER_LOST = "lost the connection to another process"
NO_COMPILER = ("InvalidCxxCompiler", "CppCompileError", "TritonMissing", "GPUTooOldForTriton")  # of torch.compile
VALIDATION = "in the validation"
SMALLER = "a run with a smaller data.batch_size, or a smaller model, needs less"


def explain(error: BaseException, batch_size: int = 0, accumulate: int = 1, processes: int = 1) -> str | None:
    """One line on what failed and what helps; None if the machine is not to blame.

    Args:
        batch_size: sequences in a step; this and the next two are named if the step ran out of memory.
        accumulate: micro-batches in a step.
        processes: number of processes that share a step.
    """
    if isinstance(error, OSError) and error.errno and (error.filename or error.errno in STORAGE):
        where = f"{shown(error.filename)}: " if error.filename else ""
        said = error.strerror if error.filename is None and error.strerror else os.strerror(error.errno)
        return f"cannot read or write: {where}{said}"
    if out_of_memory(error):
        batch = f"data.batch_size={batch_size} optim.accumulate={accumulate}"
        if VALIDATION in getattr(error, "__notes__", ()):  # whose batches are not cut into micro-batches
            return f"out of memory in the validation, with {batch}; {SMALLER}"
        part = batch_size // processes  # of a process, which can be cut into more micro-batches of two or more
        cuts = [number for number in range(accumulate + 1, part // 2 + 1) if part % number == 0]
        advice = f"optim.accumulate={cuts[0]} keeps the batch and needs less" if cuts else SMALLER
        return f"out of memory with {batch}; {advice}"
    if not isinstance(error, RuntimeError):
        return None
    if compiling := next((line for line in str(error).splitlines() if any(name in line for name in NO_COMPILER)), None):
        return f"torch.compile found no compiler that works ({compiling}); run.compile=none trains without it"
    if "Failed to find C compiler" in str(error):
        return "Triton, which the kernels for GPUs are written in, found no C compiler; apt-get install gcc brings one"
    if isinstance(error, dist.DistBackendError) or "gloo" in first_line(error).lower():
        return f"{PEER_LOST} ({first_line(error)})"
    return None


@contextlib.contextmanager
def during(phase: str) -> Iterator[None]:
    """Note on an error in which phase it arose, for `explain`."""
    try:
        yield
    except Exception as error:
        error.add_note(phase)
        raise


@contextlib.contextmanager
def sigbus_handler(line: Callable[[], str]) -> Iterator[None]:
    """Within it, print a line and exit with 128 + SIGBUS when a mapped file has shrunk while it was read.

    FFCV's compiled code reads mapped files. A handler of Python's `signal` would run only after the faulting
    instruction, which never ends: it faults again and again. So libc calls this one, during the fault.

    Args:
        line: makes the line, at the time of the fault.
    """
    if not hasattr(signal, "SIGBUS"):  # Windows, where a mapped file cannot shrink
        yield
        return

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def handler(number: int) -> None:
        os.write(2, f"{line()}\n".encode())
        os._exit(128 + number)

    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    before = libc.signal(signal.SIGBUS, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        libc.signal(signal.SIGBUS, before)
