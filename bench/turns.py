"""Contenders that take turns on a device, each timed only if what it computes is right.

They have a new order in each turn, and the first turn does not count, so that compilation is not timed. On a GPU a turn
is timed by CUDA events, on an idle device whose L2 cache was overwritten (cold, as in triton.testing.do_bench); if
launching takes longer than the work, it is what is timed.
"""

from __future__ import annotations

import csv
import os
import random
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import NamedTuple

os.environ["KINETO_LOG_LEVEL"] = "6"  # the profiler, which counts memory on a CPU, says on stderr that it starts

import torch
from common import cpu, history
from roofline import Work, least_seconds, peaks_of
from torch import Tensor

from seqjepa.engine.runtime.provenance import commit, versions

LIMIT = {"cuda": 10.0, "cpu": 3.0}  # seconds that a comparison may take before it gets fewer turns, but at least five


class Contender(NamedTuple):
    """`prepare` returns the work to time; `needs` is what it needs at least; `capture`: also time a CUDA graph."""

    prepare: Callable[[], Callable[[], object]]
    error: float
    needs: Work
    capture: bool = False


class Bench:
    """Measures on one device, and writes each row to the history at once."""

    def __init__(self, device: torch.device, repetitions: int, name: str):
        self.device, self.repetitions, self.rows = device, repetitions, []
        on_gpu = device.type == "cuda"
        machine = torch.cuda.get_device_name(device) if on_gpu else cpu()
        if not on_gpu:
            machine += f", {torch.get_num_threads()} threads"
            print(f"load average before the start: {os.getloadavg()[0]:.1f}")  # other work spreads the times
        triton = versions().get("triton", "none")
        self.facts = {"device": machine, "torch": torch.__version__, "triton": triton, "commit": commit()}
        self.l2 = torch.empty(2**28 if on_gpu else 0, dtype=torch.int8, device=device)
        source, self.peaks = peaks_of(device)
        print(f"least times by {source}: {self.peaks}")
        self.path = history(name, machine, "csv")

    def measure(self, kernel: str, case: str, dtype: torch.dtype, mode: str, contenders: dict[str, Contender]) -> None:
        peaks = {name: self.peak(contender.prepare) for name, contender in contenders.items()}
        works = {(name, "eager"): contender.prepare for name, contender in contenders.items()}
        for name, contender in contenders.items():
            if self.device.type == "cuda" and contender.capture:
                replay = captured(f"{kernel} {case} {mode}, {name}", contender.prepare)
                if replay is not None:
                    works[name, "graph"] = lambda replay=replay: replay
        started = time.perf_counter()
        for prepare in works.values():
            self.clock(prepare())
        self.wait()
        cost = time.perf_counter() - started
        turns = min(self.repetitions, max(5, int(LIMIT[self.device.type] / cost)))
        marks = {key: [] for key in works}
        order = random.Random(0)  # what the one before has left in a CPU's cache is worth up to a third
        for _ in range(turns):
            for key in order.sample(list(works), len(works)):
                marks[key].append(self.clock(works[key]()))
        self.wait()
        rows = []
        for name, contender in contenders.items():
            p20, p50, p80 = quantiles(marks[name, "eager"])
            graph = quantiles(marks[name, "graph"])[1] if (name, "graph") in marks else None
            needs = contender.needs
            moved = needs.moved if needs == Work(needs.moved) else None  # where the bandwidth is the only limit
            least = least_seconds(needs, self.peaks) * 1e6
            rows.append(
                {
                    "kernel": kernel, "case": case, "provider": name, "mode": mode,
                    "dtype": str(dtype).removeprefix("torch."), "p50_us": round(p50, 2), "p20_us": round(p20, 2),
                    "p80_us": round(p80, 2), "graph_p50_us": graph and round(graph, 2), "least_us": round(least, 3),
                    "gb_per_s": moved and round(moved / p50 / 1e3, 1),
                    "graph_gb_per_s": moved and graph and round(moved / graph / 1e3, 1),
                    "peak_mib": round(peaks[name] / 2**20, 2), "relative_error": f"{contender.error:.1e}",
                    "n": turns, **self.facts,
                }
            )  # fmt: skip
        with self.path.open("a" if self.rows else "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            if not self.rows:
                writer.writeheader()
            writer.writerows(rows)
        self.rows += rows

    def clock(self, work: Callable[[], object]) -> float | tuple[torch.cuda.Event, torch.cuda.Event]:
        """Seconds that the work takes; on a GPU, by CUDA events."""
        if self.device.type == "cpu":
            started = time.perf_counter()
            work()
            return time.perf_counter() - started
        self.wait()
        self.l2.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        return begin, end

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak(self, prepare: Callable[[], Callable[[], object]]) -> int:
        """Peak of allocated bytes. Caches are warm, because the check of the result has run the work before."""
        if self.device.type == "cuda":
            self.wait()
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            prepare()()
            return torch.cuda.max_memory_allocated(self.device) - before
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            prepare()()
        events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
        held = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            held += event.nbytes()
            highest = max(highest, held)
        return highest

    def row(self, **wanted: str) -> dict | None:
        return next((row for row in self.rows if wanted.items() <= row.items()), None)


def quantiles(marks: list) -> list[float]:
    """The p20, p50 and p80 in microseconds."""
    seconds = [mark if isinstance(mark, float) else mark[0].elapsed_time(mark[1]) / 1e3 for mark in marks]
    return (torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()) * 1e6).tolist()


def captured(what: str, prepare: Callable[[], Callable[[], object]]) -> Callable[[], None] | None:
    """Replay of the work from a CUDA graph; prints a line if the work cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work = prepare()
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError as error:
        print(f"no CUDA graph of {what}: {str(error).splitlines()[0]}")
        return None
    return partial(lambda work: graph.replay(), work)  # the graph reads the memory that `work` holds


def relative(value: Tensor | list[Tensor], exact: Tensor | list[Tensor]) -> float:
    """Norm of the difference from float64's result, relative to the norm of that result."""
    value, exact = ([x] if isinstance(x, Tensor) else x for x in (value, exact))
    difference = sum((a.double() - b).square().sum() for a, b in zip(value, exact, strict=True))
    return (difference / sum(b.square().sum() for b in exact)).sqrt().item()


def checked(name: str, error: float, limit: float) -> float:
    if not error < limit:
        raise RuntimeError(f"{name} is wrong, so its time means nothing: relative error {error:.1e}, limit {limit:.0e}")
    return error


def differentiable(
    bench: Bench, kernel: str, case: str, z: Tensor, functions: dict[str, Callable[[Tensor], Tensor]],
    exact: Callable[[Tensor], Tensor], capture: Iterable[str], needs: Callable[[str], Work],
    timed: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Time forward, backward and both, of functions from `z` to a number.

    `exact` is the same in float64; `needs` tells the work of a mode; `timed` has what is timed in the place of a
    function whose result is checked.
    """
    wide = z.double().requires_grad_()
    value = exact(wide)
    (gradient,) = torch.autograd.grad(value, wide)
    z.requires_grad_()
    # float32 keeps four digits of a gradient at conditions up to 1e4; bfloat16 rounds it by up to 2**-9
    limits = {"forward": 1e-4, "backward": 1e-2 if z.dtype == torch.bfloat16 else 1e-3}
    errors = {}
    for name, function in functions.items():
        result = function(z)
        found = {"forward": relative(result.detach(), value.detach())}
        found["backward"] = found["both"] = relative(*torch.autograd.grad(result, z), gradient)
        for mode, limit in limits.items():
            checked(f"{kernel} {case}, {name}, {mode}", found[mode], limit)
        errors[name] = found
    del wide, value, gradient, result
    for mode, prepare in (
        ("forward", lambda f: partial(f, z)),
        ("backward", lambda f: partial(torch.autograd.grad, f(z), z)),
        ("both", lambda f: lambda: torch.autograd.grad(f(z), z)),
    ):
        contenders = {
            name: Contender(
                partial(prepare, timed.get(name, function)),
                errors[name][mode],
                needs(mode),
                capture=name in capture and mode != "backward",  # its forward would lie outside the graph
            )
            for name, function in functions.items()
        }
        bench.measure(kernel, case, z.dtype, mode, contenders)


def compiled(function: Callable) -> Callable:
    torch.compiler.reset()  # else the shapes before count towards the limit of recompilations
    return torch.compile(function, fullgraph=True, dynamic=False)
