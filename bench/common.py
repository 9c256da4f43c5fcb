"""What the benchmarks share: interleaved repetitions, a table, and a line in bench/history."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from statistics import median

import torch
from torchvision import transforms
from torchvision.transforms import functional as F

from seqjepa.engine.environment import commit, versions
from seqjepa.loaders.config import SequenceConfig

HISTORY = Path(__file__).resolve().parent / "history"


def interleaved(contenders: dict[str, Callable[[], int]], repetitions: int = 5) -> dict[str, list[float]]:
    """Items a second of each contender, in each repetition; they take turns, after a turn that does not count.

    Args:
        contenders: each does some work and returns how many items that was.
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


def spread(values: list[float]) -> str:
    """Median, and the range."""
    return f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"


def cpu() -> str:
    """Model of the processor."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else "unknown"


def history(name: str, machine: str, suffix: str) -> Path:
    """Where today's figures of a machine go."""
    HISTORY.mkdir(exist_ok=True)
    return HISTORY / f"{date.today()}-{name}-{re.sub(r'[^a-zA-Z0-9]+', '-', machine).strip('-').lower()}.{suffix}"


def record(name: str, rows: list[dict], threads: int) -> Path:
    """Write the figures to bench/history with machine, versions, commit and command."""
    path = history(name, cpu(), "json")
    facts = {"cpu": cpu(), "threads": threads, "versions": versions(), "commit": commit()}
    command = ["python", f"bench/{Path(sys.argv[0]).name}"]
    path.write_text(json.dumps({"command": " ".join(command), **facts, "rows": rows}, indent=1) + "\n")
    return path


def pil_views(config: SequenceConfig, mean, std) -> Callable[[object], torch.Tensor]:
    """The same sequence as torchvision's users write it: a Pillow image to views [V, 3, H, W], one at a time.

    A gray image stays gray until its views are tensors.
    """
    to_tensor, normalize = transforms.ToTensor(), transforms.Normalize(mean, std)

    def finish(view) -> torch.Tensor:
        return normalize(to_tensor(view).expand(3, -1, -1))

    if config.kind == "augment":
        pipelines = [_augment(config, target) for target in range(2)]

        def views(image):
            shown = [pipelines[number == config.num_observed](image) for number in range(config.num_observed + 1)]
            return torch.stack([finish(view) for view in shown])

        return views

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * torch.rand(()).item()

    def moved(image):
        if config.kind == "rotation":
            return F.rotate(image, config.angles[torch.randint(len(config.angles), ()).item()])
        size = image.size[::-1]
        if config.padding == "reflect":
            image = F.pad(image, [8, 8, 8, 8], padding_mode="reflect")
        shift = [round(uniform(*config.translation)) for _ in range(2)]
        scale, bilinear = uniform(*config.scale), transforms.InterpolationMode.BILINEAR
        return F.center_crop(F.affine(image, uniform(*config.rotation), shift, scale, [0.0], bilinear), size)

    return lambda image: torch.stack([finish(image), *(finish(moved(image)) for _ in range(config.num_observed))])


def _augment(config: SequenceConfig, target: int) -> transforms.Compose:
    def factor(span: list[float]) -> tuple[float, float]:
        return span[0], span[1]

    kernel = 3  # at 32 pixels
    jitter = transforms.ColorJitter(*(factor(s) for s in (config.brightness, config.contrast, config.saturation)))
    jitter.hue = factor(config.hue)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(32, config.crop_area, config.crop_ratio, transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(config.flip),
            transforms.RandomApply([jitter], config.jitter),
            transforms.RandomGrayscale(config.grayscale),
            transforms.RandomApply([transforms.GaussianBlur(kernel, config.blur_sigma)], config.blur[target]),
            transforms.RandomSolarize(128, config.solarize[target]),
        ]
    )
