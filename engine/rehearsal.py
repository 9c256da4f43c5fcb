"""What can be known of a run before its machine costs money: `seqjepa train ... --check`."""

import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ..configs.cli import BAD_INPUT, DONE
from ..configs.compose import Composed, dump
from ..configs.errors import InputError, first_line
from ..loaders.config import DataConfig
from ..loaders.images import find_dataset
from ..loaders.images.base import SPLITS, TorchvisionDataset
from ..loaders.images.folder import list_images
from ..loaders.images.sources import Layout, find_layout
from .config import Config
from .evaluation.grids import NEGATIVES
from .runs.folder import RunFolder

BATCH = 4  # sequences of a step; and images of each class
PATIENCE = 20.0  # seconds for the answer of a server
SHORT = ["run.epochs=1", "run.device=cpu", "run.compile=none", "run.log_every=1", "run.resume=none", "run.mirror=null"]
SHORT += ["run.max_hours=null", "optim.accumulate=1", "data.loader=auto"]
SHORT += ["control.max_epochs=1", "diagnostics.every=0", "gates.enforce=false"]
SHORT += ["tracking.wandb=disabled", "tracking.tensorboard=false", "tracking.trackio=false"]


def check(composed: Composed[Config]) -> int:
    """Look whether the images and the mirror can be reached, and train some steps on a CPU, in a folder of their own.

    A line tells of each, whatever became of the others.

    Returns:
        The exit code: 0, or 2 if something failed.
    """
    config, wrong = composed.config, []

    def line(name: str, look: Callable[[], str]) -> None:
        try:
            print(f"{name}: {look()}", flush=True)
        except InputError as error:
            for text in composed.located(error).splitlines():
                if text not in wrong:  # without images there is no rehearsal either
                    print(f"error: {text}", file=sys.stderr, flush=True)
                wrong.append(text)

    line("images", lambda: _images(config.data))
    if config.run.mirror is not None:
        line("mirror", lambda: _mirror(config))
    with tempfile.TemporaryDirectory() as folder:
        line("rehearsal", lambda: _rehearse(config, Path(folder)))
    if config.run.max_hours is not None and config.run.price is not None:
        hours, price = config.run.max_hours, config.run.price
        print(f"cost: at most {hours:g} h x {price:g} = {hours * price:.2f}, and the time to set the machine up")
    return BAD_INPUT if wrong else DONE


def _images(data: DataConfig) -> str:
    """Where the images are."""
    dataset, layout = find_dataset(data.dataset), find_layout(find_dataset(data.dataset), data.root)
    if layout.root is None:
        return f"{data.dataset} needs no files"
    if layout.betons or layout.train:
        return f"{data.dataset} is in {layout.root}"
    try:
        for split in SPLITS:
            dataset.read(layout.root, split, download=False)
    except InputError:
        if not (data.download and isinstance(dataset, TorchvisionDataset)):
            raise
        return f"{data.dataset} is not in {layout.root}; {_reachable(dataset.sources())} has it"
    return f"{data.dataset} is in {layout.root}"


def _reachable(addresses: list[str]) -> str:
    """The first address that answers.

    Raises:
        InputError: none does.
    """
    for address in addresses:
        asked = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "seqjepa"})
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE):
                return address
        except (OSError, ValueError) as error:
            problem = f"{address} cannot be reached ({first_line(error)})"
    raise InputError(problem, "data.download")


def _mirror(config: Config) -> str:
    """What is in the mirror."""
    mirror = RunFolder(config, config.run, config.checkpoint.keep).mirror
    assert mirror is not None
    newest = mirror.try_out()
    there = f"has {newest}" if newest else "has no checkpoint of this run"
    return f"{mirror.address} can be written and read, and {there}"


def _rehearse(config: Config, folder: Path) -> str:
    """Train some steps on a few images."""
    whole, said = folder / "config.yaml", folder / "said"
    whole.write_text(dump(config), encoding="utf-8")
    words = [
        str(whole),
        f"run.dir={folder / 'run'}",
        f"control.cache={folder / 'untrained'}",
        *SHORT,
        *_few(config, folder),
    ]
    if config.stream.has_tasks:
        words += ["stream.steps=2", "stream.trace_every=0"]
    command = [sys.executable, "-P", "-m", "seqjepa", "train", *words]
    with said.open("w+", encoding="utf-8", errors="replace") as output:
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False).returncode
        output.seek(0)
        lines = output.read().splitlines()
    if code == DONE:
        return "some steps of a few images on the CPU, their validation and a checkpoint went well"
    told = [text.removeprefix("error: ").replace(f"{whole}: ", "") for text in lines if text.startswith("error: ")]
    raise InputError("\n".join(told) or f"a rehearsal on the CPU ended with exit code {code}: {(lines or [''])[-1]}")


def _few(config: Config, folder: Path) -> list[str]:
    """Settings that name few images, made in a folder where the real ones are many or not there yet."""
    data, dataset = config.data, find_dataset(config.data.dataset)
    root = [] if data.root is None else [f"data.root={Path(data.root).expanduser().resolve()}"]
    if config.sequence.views == "grids":  # small, and val_nce needs so many
        count = NEGATIVES // (config.sequence.num_observed + 1) + 1
        return [*root, f"data.train_subset={min(count, data.train_subset or count)}", "data.val_subset=64"]
    words = [f"data.batch_size={BATCH}", "data.held_out=null"]
    if not config.stream.has_tasks:  # whose tasks need images of every class
        count = 8 * BATCH if data.curriculum.kind != "none" else 2 * BATCH  # it begins with a part of them
        words += [f"data.train_subset={count}", f"data.val_subset={2 * BATCH}"]
    if isinstance(dataset, TorchvisionDataset) and dataset.side and dataset.num_classes:
        _draw(folder, dataset.side, dataset.num_classes)
    elif (layout := find_layout(dataset, data.root)).train:
        _link(folder, layout)
    else:
        return [*words, *root]
    return [*words, f"data.root={folder}"]


def _draw(folder: Path, side: int, num_classes: int) -> None:
    """Image files of noise, a few of each class."""
    noise = np.random.default_rng(0)
    for split in SPLITS:
        for label in range(num_classes):
            place = folder / split / f"{label:04}"
            place.mkdir(parents=True)
            for number in range(BATCH):
                Image.fromarray(noise.integers(256, size=(side, side, 3), dtype=np.uint8)).save(place / f"{number}.png")


def _link(folder: Path, layout: Layout) -> None:
    """Links to the first image files of each class."""
    for split, found in zip(SPLITS, (layout.train, layout.test), strict=True):
        if found is None:
            continue
        classes, paths, labels = list_images(found)
        for label in range(max(1, len(classes))):
            place = folder / split / (classes[label] if classes else "")
            place.mkdir(parents=True)
            chosen = np.flatnonzero(labels == label)[: BATCH if classes else 2 * BATCH]
            for path in (Path(paths[number]) for number in chosen):
                (place / path.name).symlink_to(path.resolve())
