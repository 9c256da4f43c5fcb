"""Adds to pytest-benchmark: contenders that take turns, the GPU's name, and a comparison with the history."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from common import HISTORY, cpu, history, wait

from seqjepa.engine.runtime.provenance import commit, versions

SLOWER = 1.1  # times the last run on the same GPU is a regression
LEAST = 1e-3  # seconds; shorter benchmarks measure launching, which differs between hosts
BEFORE = pytest.StashKey[dict]()
WARM_UP = 3  # turns that do not count: compilation, choice of algorithms, first allocations


def pytest_addoption(parser):
    parser.addoption("--turns", type=int, default=20, help="interleaved turns of the contenders")


def machine() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


def pytest_configure(config):
    if config.option.benchmark_json is None and not config.option.collectonly:
        config.stash[BEFORE] = last_on(machine()) if torch.cuda.is_available() else {}
        config.option.benchmark_json = history("bench", machine(), "json")


def last_on(gpu: str) -> dict[str, float]:
    """Medians by benchmark name, of the newest run on this GPU in the history; empty if there is none."""
    for path in sorted(HISTORY.glob("*-bench-*.json"), reverse=True):
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["machine_info"]["gpu"] == gpu:
            return {row["fullname"]: row["stats"]["median"] for row in stored["benchmarks"]}
    return {}


def pytest_benchmark_generate_machine_info(config):
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cpu": cpu(), "threads": torch.get_num_threads(), "versions": versions()}


def pytest_benchmark_generate_commit_info(config):
    return {"id": commit()}


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    rows = [bench for bench in session.benchmarks if "ratio" in bench.extra_info] if session else []
    if rows:
        terminalreporter.section("beside the others, interleaved: median (95 % interval of the median)")
    for bench in rows:
        for name, ratio in bench.extra_info["ratio"].items():
            low, middle, high = ratio
            rates = bench.extra_info["rates"]
            pair = f"{rates['ours']:,.4g} and {rates[name]:,.4g} {bench.extra_info['unit']}/s"
            terminalreporter.write_line(
                f"{bench.name}: {middle:.2f} ({low:.2f} to {high:.2f}) times as fast as {name}: {pair}"
            )


def pytest_sessionfinish(session, exitstatus):
    before = session.config.stash.get(BEFORE, {})
    benchmarks = getattr(session.config._benchmarksession, "benchmarks", [])
    known = [b for b in benchmarks if b and before.get(b.fullname, 0) >= LEAST]  # b is false where it failed
    for name, factor in {b.name: b.stats.median / before[b.fullname] for b in known}.items():
        if factor > SLOWER:
            print(f"\nregression: {name} takes {factor:.2f} times as long as in the last run on this GPU")
            session.exitstatus = 1


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def beside(benchmark, request):
    """Time `ours`; before each of its turns the other contenders take theirs.

    Ratios are taken turn by turn, so that other work on the machine affects both sides.
    """

    def run(
        ours: Callable[[], object],
        others: dict[str, Callable[[], object]],
        items: int,
        unit: str,
        items_of_others: int | None = None,
    ) -> None:
        turns = request.config.getoption("--turns")
        seconds: dict[str, list[float]] = {name: [] for name in others}

        def theirs() -> None:
            for name, work in others.items():
                wait()
                started = time.perf_counter()
                work()
                wait()
                seconds[name].append(time.perf_counter() - started)

        def own() -> None:
            ours()
            wait()

        benchmark.pedantic(own, setup=theirs, rounds=turns, warmup_rounds=WARM_UP)
        measured = np.array(benchmark.stats.stats.data)
        theirs_per_ours = (items_of_others or items) / items
        info = benchmark.extra_info
        info |= {"unit": unit, "rates": {"ours": items / median(measured)}, "ratio": {}, "turns": turns}
        for name, values in seconds.items():
            counted = np.array(values[-turns:]) / theirs_per_ours
            info["rates"][name] = items / median(counted)
            info["ratio"][name] = interval(counted / measured)

    return run


def interval(values: np.ndarray, draws: int = 10_000) -> list[float]:
    """Median with its 95 % bootstrap interval: low, median, high."""
    drawn = np.random.default_rng(0).choice(values, (draws, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return [float(low), float(np.median(values)), float(high)]
