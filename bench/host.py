"""Host time of the kernels' eager calls, beside what they replace: `python bench/host.py`. It needs Triton, but no GPU.

A small kernel is over before the host has launched the next one, so the time of an eager call is the host's. Here
Triton compiles for an H100 and launches nothing, while torch's operations run on the CPU, on tensors so small that
their work hardly counts. On a GPU each launch of either contender takes some microseconds more, in the driver. What
torch does to lists of tensors is not comparable: a GPU has one launch for them, a CPU a call for each.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import triton.runtime.driver
from common import command_line, cpu
from kernel_table import DECAY, EPS, by_cholesky, drawn_sigreg, knots_of
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from triton.backends.compiler import GPUTarget

from seqjepa.kernels import AdamWEMA, coding_rate, ema_update_, sigreg
from seqjepa.kernels.internal import backend

TURNS, CALLS = 25, 20


class NoGPU:
    """A driver of Triton that compiles for an H100 and launches nothing."""

    class utils:
        load_binary = staticmethod(lambda name, kernel, shared, device: (0, 1, 32, 0, 1024))
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 232448})

    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))


def differentiated(function: Callable[[Tensor], Tensor], *shape: int) -> Callable[[], object]:
    z = torch.randn(shape, requires_grad=True)
    return lambda: torch.autograd.grad(function(z).sum(), z)


def contenders() -> dict[str, list[Callable[[], object]]]:
    """Ours, and the other where there is one, by case."""
    rate, by_library = partial(coding_rate, eps=EPS), partial(by_cholesky, center=True)
    statistic = partial(sigreg, num_slices=16, seed=torch.tensor(0))
    drawn = partial(drawn_sigreg, slices=16, table=knots_of(torch.device("cpu")))
    student = [nn.Parameter(torch.randn(64)) for _ in range(62)]  # as many as ResNet-18 has
    for p in student:
        p.grad = torch.randn_like(p)
    teacher = [p.detach().clone() for p in student]
    decay = torch.tensor(DECAY, dtype=torch.float64)
    return {
        "coding rate, rows < width": [differentiated(function, 16, 32) for function in (rate, by_library)],
        "coding rate, width < rows": [differentiated(function, 32, 16) for function in (rate, by_library)],
        "coding rate of a batch": [differentiated(function, 4, 32, 16) for function in (rate, by_library)],
        "SIGReg": [differentiated(function, 16, 8) for function in (statistic, drawn)],
        "62 teachers": [lambda: ema_update_(teacher, student, decay)],
        "AdamW and 62 teachers": [AdamWEMA(student, teacher=zip(student, teacher, strict=True)).step],
    }


def microseconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    for _ in range(CALLS):
        work()
    return 1e6 * (time.perf_counter() - started) / CALLS


def main() -> None:
    command_line(__doc__).parse_args()
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(NoGPU())
    backend.INTERPRETED = True  # so tensors on the CPU go to the kernels, which nothing interprets
    out = Table("", "ours, µs", "the other, µs", "ours / other", title=f"host time, {cpu()}", title_justify="left")
    for case, works in contenders().items():
        turns = [[microseconds(work) for work in works] for _ in range(TURNS)][5:]  # the first ones compile
        cells = [f"{median(times):.0f}" for times in zip(*turns, strict=True)]
        if len(works) == 2:
            cells.append(f"{median(ours / other for ours, other in turns):.2f}")
        out.add_row(case, *cells)
    Console(width=100, highlight=False).print(out)


if __name__ == "__main__":
    main()
