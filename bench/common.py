"""Shared by the benchmarks: interleaved repetitions, images of noise, and records in bench/history."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from statistics import mean, median

import numpy as np
import torch

from seqjepa.configs.console import open_console
from seqjepa.engine.config import Config
from seqjepa.engine.runtime.provenance import commit, versions
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.images.resident import ResidentImages
from seqjepa.loaders.loader import Loaders, SequenceLoader
from seqjepa.loaders.sampler import Sampler
from seqjepa.loaders.sequences import build_sequence

HISTORY = Path(__file__).resolve().parent / "history"


def command_line(script: str) -> argparse.ArgumentParser:
    """A parser whose help is the unchanged docstring of the script."""
    open_console()
    return argparse.ArgumentParser(description=script, formatter_class=argparse.RawDescriptionHelpFormatter)


def existing_folder(name: str) -> Path:
    """Argument type: the path of an existing folder."""
    if not Path(name).is_dir():
        raise argparse.ArgumentTypeError(f"{name}: no such folder")
    return Path(name)


def interleaved(contenders: dict[str, Callable[[], int]], repetitions: int = 5) -> dict[str, list[float]]:
    """Items per second of each contender in each repetition. Contenders take turns; the first turn does not count.

    Args:
        contenders: functions that do some work and return the number of items.
        repetitions: number of turns.
    """
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for repetition in range(repetitions + 1):
        for name, work in contenders.items():
            started = time.perf_counter()
            items = work()
            seconds = time.perf_counter() - started
            if repetition:
                rates[name].append(items / seconds)
    return rates


def train_arms(place: Path, arms: dict[str, tuple[str, ...]], seeds: list[int], words: list[str], jobs: int) -> int:
    """Train each arm with each seed in a process of its own, `<place>/<arm>-<seed>`; what has ended is left alone.

    Args:
        place: folder of the runs.
        arms: settings of each arm, by name.
        seeds: seeds of each arm.
        words: config files and settings of all runs.
        jobs: number of runs at a time.

    Returns:
        The largest exit code.
    """

    def train(run: tuple[int, str]) -> int:
        seed, arm = run
        folder = arm_folder(place, arm, seed)
        if (folder / "summary.json").exists():
            return 0
        command = [sys.executable, HISTORY.parent.parent / "engine/train.py", *words, f"run.seed={seed}"]
        command += [f"run.dir={folder}", f"run.name={folder.name}", "run.resume=auto", "control.enabled=false"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "console.log").open("a", encoding="utf-8") as log:
            found = subprocess.run([*command, *arms[arm]], stdout=log, stderr=log, check=False)
        print(f"{folder}: exit code {found.returncode}", flush=True)
        return abs(found.returncode)

    with ThreadPoolExecutor(jobs) as pool:
        return max(pool.map(train, [(seed, arm) for seed in seeds for arm in arms]), default=0)


def arm_folder(place: Path, arm: str, seed: int) -> Path:
    """Folder of a run of `train_arms`."""
    return place / f"{arm.replace(' ', '-')}-{seed}"


def with_range(values: list[float], digits: int) -> str:
    """Mean and range, as text."""
    average, low, high = (f"{value:.{digits}f}" for value in (mean(values), min(values), max(values)))
    return f"{average} ({low} to {high})"


def spread(values: list[float]) -> str:
    """Median and range, as text."""
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def kept_for_backward(forward: Callable[[], object], *given: torch.Tensor) -> int:
    """Bytes that a computation keeps for its backward pass, beside the tensors that were there before.

    Args:
        forward: the computation.
        given: tensors that do not count, such as its input and its parameters.
    """
    storages: dict[int, int] = {}

    def remember(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        result = forward()  # referred to until the end, so that no memory is counted twice
    for x in given:
        storages.pop(x.untyped_storage().data_ptr(), None)
    del result
    return sum(storages.values())


def cpu() -> str:
    """Model of the processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return found[1] if found else "unknown"


def history(name: str, machine: str, suffix: str) -> Path:
    """File for today's results of a machine."""
    HISTORY.mkdir(exist_ok=True)
    return HISTORY / f"{date.today()}-{name}-{re.sub(r'[^a-zA-Z0-9]+', '-', machine).strip('-').lower()}.{suffix}"


def record(name: str, rows: list[dict], threads: int) -> Path:
    """Write the results to bench/history with machine, versions, commit and command."""
    path = history(name, cpu(), "json")
    facts = {"cpu": cpu(), "threads": threads, "versions": versions(), "commit": commit()}
    command = ["python", f"bench/{Path(sys.argv[0]).name}"]
    path.write_text(
        json.dumps({"command": " ".join(command), **facts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    return path


def random_images(dataset: str, count: int) -> Images:
    """Noise in the shape of a dataset, because no timing depends on what images show."""
    found = find_dataset(dataset)
    generator = np.random.default_rng(0)
    pixels = generator.integers(256, size=(count, found.side, found.side, 3), dtype=np.uint8)
    labels = generator.integers(found.num_classes, size=count)
    return Images(found, pixels, labels, [str(number) for number in range(found.num_classes)])


def loaders_of(images: Images, config: Config, device: torch.device, *, compiled: bool = False) -> Loaders:
    """Resident loaders of images in memory, which are the same for training and validation."""
    sequence = build_sequence(config.sequence, images.size, config.actions, device)
    store, (mean, std) = ResidentImages(images, device), images.statistics()
    both = []
    for train in (True, False):
        indices = np.arange(len(images.labels))
        sampler = Sampler(indices, batch_size=config.data.batch_size, seed=config.run.seed, train=train)
        both.append(SequenceLoader(store, sampler, sequence, mean=mean, std=std, device=device, compiled=compiled))
    size = images.size[0], images.size[1]
    return Loaders(*both, sequence, size, images.classes, images.fingerprint(), "resident")


def wait() -> None:
    """Wait until the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
