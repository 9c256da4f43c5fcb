"""What can be known of a run before its machine costs money: `seqjepa train ... --check`."""

import math
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image

from ..configs.cli import BAD_INPUT, DONE
from ..configs.compose import Composed, dump
from ..configs.errors import InputError, first_line
from ..loaders.images import find_dataset
from ..loaders.images.base import SPLITS, Images, TorchvisionDataset
from ..loaders.images.beton import INSTALL_HINT, BetonImages, has_ffcv, open_beton
from ..loaders.images.files import ImageFiles
from ..loaders.images.sources import check_alike, find_layout, open_images
from .config import Config
from .evaluation.grids import NEGATIVES
from .objectives.config import NearestScopeConfig
from .runs.folder import RunFolder

BATCH = 4  # sequences of a step, and images of each class, where nothing needs more
DECODED = 500  # image files of a split that are decoded, evenly spread; and the first of each class
ANSWER_SECONDS = 20.0  # seconds for the answer of a server
SHORT = ["run.epochs=1", "run.device=cpu", "run.compile=none", "run.log_every=1", "run.resume=none", "run.mirror=null"]
SHORT += ["run.max_hours=null", "optim.accumulate=1", "data.loader=auto"]
SHORT += ["control.max_epochs=1", "diagnostics.every=0", "gates.enforce=false"]
SHORT += ["tracking.wandb=disabled", "tracking.tensorboard=false", "tracking.trackio=false"]


Found = TypeVar("Found")


class Opened(NamedTuple):
    """What is known of the images."""

    told: str
    few: Mapping[str, list[tuple[str, str]]]  # by split, class and path of the first image files of each class

    def __str__(self) -> str:
        return self.told


def check(composed: Composed[Config]) -> int:
    """Look whether the images and the mirror can be reached, and train some steps on a CPU, in a folder of their own.

    A line tells of each, whatever became of the others.

    Returns:
        The exit code: 0, or 2 if something failed.
    """
    config, wrong = composed.config, []

    def line(name: str, look: Callable[[], Found]) -> Found | None:
        try:
            found = look()
        except (InputError, OSError) as error:
            told = composed.located(error) if isinstance(error, InputError) else f"{name}: {first_line(error)}"
            for text in told.splitlines():
                print(f"error: {text}", file=sys.stderr, flush=True)
            wrong.append(name)
            return None
        print(f"{name}: {found}", flush=True)
        return found

    opened = line("images", lambda: _open(config))
    if config.run.mirror is not None:
        line("mirror", lambda: _mirror(config))
    if opened or _can_be_drawn(config):
        few = opened.few if opened else {}
        with tempfile.TemporaryDirectory() as folder:
            line("rehearsal", lambda: _rehearse(config, few, Path(folder)))
    hours, price = config.run.max_hours, config.run.price
    if price is not None:
        whole = "; run.max_hours would limit it" if hours is None else f" x {hours:g} h = {price * hours:.2f} at most"
        print(f"cost: {price:g} an hour{whole}, without set-up and interruptions")
    return BAD_INPUT if wrong else DONE


def _open(config: Config) -> Opened:
    """The images, opened as a run opens them; of many image files, some are decoded."""
    data = config.data
    dataset, layout = find_dataset(data.dataset), find_layout(find_dataset(data.dataset), data.root)
    if layout.root is None:
        return Opened(f"{data.dataset} needs no files", {})
    images: dict[str, Images | BetonImages] = {}
    try:
        if layout.betons and not has_ffcv():
            raise InputError(f"{layout.root}: betons need ffcv, which is not installed; {INSTALL_HINT}", "data.root")
        for split in ("train",) if layout.alone else SPLITS:
            if layout.betons:
                reading = {"batch_size": BATCH, "threads": 1, "device": torch.device("cpu")}
                images[split] = BetonImages(*open_beton(layout.betons, dataset, split), **reading)
            else:
                images[split] = open_images(dataset, layout, split, False, data.size, data.decoder)
    except InputError as error:
        missing = error.field == "data.root" and not (layout.betons or layout.train)
        if not (missing and data.download and isinstance(dataset, TorchvisionDataset)):
            raise
        there = _reachable(dataset.sources())
        return Opened(f"{data.dataset} is not in {layout.root}; {there} has it", {})
    check_alike(layout, {"test": images["train"], **images})
    few = {
        name: _some(split, split.pixels, config)
        for name, split in images.items()
        if isinstance(split, Images) and isinstance(split.pixels, ImageFiles)
    }
    return Opened(f"{data.dataset} is in {layout.root}", few)


def _some(split: Images, files: ImageFiles, config: Config) -> list[tuple[str, str]]:
    """Decode the first image files of each class and some of the others; class and path of the first."""
    labels, count = split.labels, len(split.labels)
    _, starts = np.unique(labels, return_index=True)  # the images of a class follow each other
    first = np.flatnonzero(np.arange(count) - starts[labels] < _each(config, len(split.classes)))
    spread = np.linspace(0, count - 1, min(count, DECODED)).astype(np.int64)
    for position in np.union1d(first, spread).tolist():
        files[position : position + 1]
    return [(split.classes[labels[place]] if split.classes else "", files.paths[place]) for place in first.tolist()]


def _reachable(addresses: list[str]) -> str:
    """The first address that answers.

    Raises:
        InputError: none does.
    """
    for address in addresses:
        asked = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "seqjepa"})
        try:
            with urllib.request.urlopen(asked, timeout=ANSWER_SECONDS):
                return address
        except (OSError, ValueError) as error:
            problem = f"{address} cannot be reached ({first_line(error)})"
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it is an answer as well
    raise InputError(problem, "data.download")


def _mirror(config: Config) -> str:
    """What is in the mirror."""
    mirror = RunFolder(config, config.run, config.checkpoint.keep).mirror
    assert mirror is not None
    newest = mirror.try_out()
    there = f"has {newest}" if newest else "has no checkpoint of this run"
    return f"{mirror.address} can be written and read, and {there}"


def _rehearse(config: Config, few: Mapping[str, list[tuple[str, str]]], folder: Path) -> str:
    """Train some steps on a few images."""
    whole, said = folder / "config.yaml", folder / "said"
    whole.write_text(dump(config), encoding="utf-8")
    words = [f"run.dir={folder / 'run'}", f"control.cache={folder / 'untrained'}", *SHORT]
    words += _few(config, few, folder)
    if config.stream.has_tasks:
        words += ["stream.steps=2", "stream.trace_every=0"]
    command = [sys.executable, "-P", "-m", "seqjepa", "train", str(whole), *words]
    with said.open("w+", encoding="utf-8", errors="replace") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        output.seek(0)
        lines = output.read().splitlines()
    if code == DONE:
        return "some steps of a few images on the CPU, their validation and a checkpoint went well"
    told = [text.removeprefix("error: ") for text in lines if text.startswith("error: ")]
    for place in (whole, *(f"override {word}" for word in words)):  # which the user did not give
        told = [text.replace(f"{place}: ", "") for text in told]
    raise InputError("\n".join(told) or f"a rehearsal on the CPU ended with exit code {code}: {(lines or [''])[-1]}")


def _batch(config: Config) -> int:
    """Sequences of a step: few, but not fewer than a term needs."""
    rate = config.objective.rate
    needed = rate.scope.count if rate.weight and isinstance(rate.scope, NearestScopeConfig) else BATCH
    return min(config.data.batch_size, max(BATCH, needed))


def _each(config: Config, num_classes: int) -> int:
    """Images of each class, so that there are two batches, and of each task one."""
    return max(BATCH, math.ceil(2 * _batch(config) * max(1, config.stream.count) / max(1, num_classes)))


def _can_be_drawn(config: Config) -> bool:
    """Whether it is known what the images look like, wherever they are."""
    dataset = find_dataset(config.data.dataset)
    return isinstance(dataset, TorchvisionDataset) and bool(dataset.side and dataset.num_classes)


def _few(config: Config, few: Mapping[str, list[tuple[str, str]]], folder: Path) -> list[str]:
    """Settings that name few images, made in a folder where the real ones are many or not there yet."""
    data, batch = config.data, _batch(config)
    root = [] if data.root is None else [f"data.root={Path(data.root).expanduser().resolve()}"]
    if config.sequence.views == "grids":  # small, and val_nce needs so many
        count = NEGATIVES // (config.sequence.num_observed + 1) + 1
        count = max(count, math.ceil(data.batch_size / data.curriculum.share(0)))  # it begins with a part of them
        return [*root, f"data.train_subset={min(count, data.train_subset or count)}", "data.val_subset=64"]
    words = [f"data.batch_size={batch}", "data.held_out=null"]
    if not config.stream.has_tasks:  # whose tasks need images of every class
        words += [f"data.train_subset={2 * batch}", f"data.val_subset={2 * BATCH}"]
    if few:
        for split, images in few.items():
            for number, (label, path) in enumerate(images):
                place = folder / split / label
                place.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, place / f"{number}{Path(path).suffix}")
    elif _can_be_drawn(config):
        _draw(config, folder)
        words.append("data.size=null")  # they have the size that they should have
    else:
        return [*words, *root]
    return [*words, f"data.root={folder}"]


def _draw(config: Config, folder: Path) -> None:
    """Image files of noise, a few of each class."""
    noise, dataset = np.random.default_rng(0), find_dataset(config.data.dataset)
    assert dataset.side
    assert dataset.num_classes
    for split in SPLITS:
        for label in range(dataset.num_classes):
            place = folder / split / f"{label:04}"
            place.mkdir(parents=True)
            for number in range(_each(config, dataset.num_classes)):
                pixels = noise.integers(256, size=(dataset.side, dataset.side, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(place / f"{number}.png")
