"""Compares where images can be during training: `python bench/stores.py FOLDER --size 96`.

FOLDER has train/ with image files in folders of classes, and test/ alike. The first table has images per second that
each store hands to the device, in random order and without views, beside torch's DataLoader on the same files; and the
memory that a process holds beyond a process that has opened nothing. The second, with --train, has the largest memory
of whole trainings on all images, with one and with four processes, beyond the same trainings on --few images.

`--make DATA` first fills FOLDER with JPEGs of --width x --height pixels, enlarged from cifar10 and
cifar100 in DATA; where these are too few, they are also mirrored.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import torch
from common import command_line, cpu, interleaved, record, spread
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder

from seqjepa.loaders.config import DataConfig, RotationConfig
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.beton import has_ffcv
from seqjepa.loaders.images.sources import find_layout, open_images
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.write import main as write

BATCH = 256
GIB = 2**30


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--size", type=int, default=96, help="height and width to which images are brought")
    parser.add_argument("--images", type=int, default=4096, help="number of images in a turn of the first table")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process that decode images")
    parser.add_argument("--train", action="store_true", help="measure the memory of whole trainings")
    parser.add_argument("--few", type=int, default=1000, help="images of the trainings that others are compared with")
    parser.add_argument("--make", type=Path, metavar="DATA", help="fill FOLDER from CIFAR-10 and CIFAR-100 in DATA")
    parser.add_argument("--count", type=int, default=100_000, help="number of training images to make")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--height", type=int, default=96)
    args = parser.parse_args()
    if args.make:
        make(args.make, args.folder, args.count, args.width, args.height)
    count = sum(1 for _ in args.folder.glob("train/*/*"))
    pixels = count * 3 * args.size**2 / GIB
    print(f"{count:,} images of {args.size}x{args.size}, {pixels:.2f} GiB of pixels; {cpu()}, {args.threads} threads\n")
    with tempfile.TemporaryDirectory(dir=args.folder.parent) as place:
        rows = trainings(args, Path(place), pixels) if args.train else rates(args, Path(place))
    print(f"\nbench/history/{record('stores-memory' if args.train else 'stores', rows, args.threads).name}")


def make(data: Path, folder: Path, count: int, width: int, height: int) -> None:
    """Write enlarged CIFAR images as JPEGs, in a folder for each dataset, and a hundredth of them as test/."""
    for split, wanted in (("train", count), ("test", max(100, count // 100))):
        sources = []
        for name in ("cifar10", "cifar100"):
            dataset = find_dataset(name)
            images = open_images(dataset, find_layout(dataset, str(data / name)), split)
            sources.append((name, images.pixels[:]))
        items = [(*source, number) for source in sources for number in range(len(source[1]))]

        def save(position: int, split: str = split, items: list = items) -> None:
            turn, place = divmod(position, len(items))
            name, pixels, number = items[place]
            path = folder / split / name / f"{number}-{turn}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels[number] if turn % 2 == 0 else pixels[number][:, ::-1])
            image.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)

        with ThreadPoolExecutor() as pool:
            list(pool.map(save, np.random.default_rng(0).permutation(max(wanted, len(items)))[:wanted].tolist()))


def rates(args: argparse.Namespace, place: Path) -> list[dict]:
    """Images per second and memory of each store, each in a process of its own."""
    folder, size = str(args.folder), args.size
    mapped = {"root": folder, "size": size, "loader": "mapped", "cache": str(place)}
    kinds: dict[str, dict] = {
        "resident": {"root": folder, "size": size, "loader": "resident"},
        "mapped": mapped,
        "files, Pillow": mapped | {"loader": "files"},
        "files, torchcodec": mapped | {"loader": "files", "decoder": "torchcodec"},
    }
    if has_ffcv():
        for name, words in (("ffcv, pixels", []), ("ffcv, JPEGs", ["--jpeg", "90"])):
            out = place / name.replace(", ", "-")
            assert write([folder, str(out), "--size", str(size), "--dataset", "imagefolder", *words]) == 0
            kinds[name] = {"root": str(out), "loader": "ffcv"}
    workers = {name: functools.partial(store, settings, args.images, args.threads) for name, settings in kinds.items()}
    theirs = "DataLoader of ImageFolder, 2 workers"
    workers[theirs] = functools.partial(their_loader, f"{folder}/train", size, args.images)
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []

    def ask(name: str, question: str) -> int:
        pipes[name].send(question)
        return pipes[name].recv()

    try:
        for name, work in workers.items():
            pipes[name], far = context.Pipe()
            processes.append(context.Process(target=serve, args=(work, far)))
            processes[-1].start()
            far.close()  # so that an end of the process is an end of the pipe
            pipes[name].recv()  # it is open before the next one starts: they share the caches of the system
        found = interleaved({name: functools.partial(ask, name, "turn") for name in workers})
        rows = [{"store": name, "rates": rates, "bytes": ask(name, "memory")} for name, rates in found.items()]
    finally:
        for process in processes:
            process.kill()
    print("| store | images a second, median (range) of 5 | held by the process, MiB |\n| --- | --- | --- |")
    for row in rows:
        print(f"| {row['store']} | {spread(row['rates'])} | {row['bytes'] / 2**20:,.0f} |")
    return rows


def serve(work, pipe) -> None:
    """Open a store, then answer: a number of images handed out, or the bytes that this process holds for it."""
    before = private()
    hand_out = work()
    pipe.send("open")
    while True:
        pipe.send(hand_out() if pipe.recv() == "turn" else private() - before)


def private() -> int:
    """Bytes that this process and its children hold beside files: memory, and what they share of memory, once."""
    total = 0
    for found in [process := psutil.Process(), *process.children(recursive=True)]:
        for line in Path(f"/proc/{found.pid}/smaps_rollup").read_text().splitlines():
            name, number, *_ = line.split()
            total += 1024 * int(number) if name in ("Pss_Anon:", "Pss_Shmem:") else 0
    return total


def store(settings: dict, images: int, threads: int):
    """Opens a store; the function that it returns hands out `images` of its images."""
    torch.set_num_threads(1)
    data = DataConfig(dataset="imagefolder", batch_size=BATCH, **settings)
    loader = build_loaders(data, RotationConfig(), seed=0, device=torch.device("cpu"), threads=threads).train
    epochs = iter(range(10**6))

    def hand_out() -> int:
        parts = loader.sampler.batches(next(epochs))[: math.ceil(images / BATCH)]
        return sum(len(pixels) for pixels, _, _ in loader.images.batches(parts))

    return hand_out


def their_loader(folder: str, size: int, images: int):
    """As `store`, by torch's DataLoader and torchvision's ImageFolder."""
    dataset = ImageFolder(folder, transform=functools.partial(square, size=size))
    generator = torch.Generator().manual_seed(0)
    sampler = RandomSampler(dataset, num_samples=images, generator=generator)
    reader = DataLoader(dataset, BATCH, sampler=sampler, num_workers=2, persistent_workers=True)
    return lambda: sum(len(pixels) for pixels, _ in reader)


def square(image: Image.Image, size: int) -> torch.Tensor:
    return torch.from_numpy(np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)))


def trainings(args: argparse.Namespace, place: Path, pixels: float) -> list[dict]:
    """The largest memory of one epoch of a tiny network, over all processes, for each store and number of processes."""
    few = place / "few"
    for split, wanted in (("train", args.few), ("test", 100)):
        paths = sorted(args.folder.glob(f"{split}/*/*"))
        for path in paths[:: max(1, len(paths) // wanted)]:
            target = few / split / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
    print("| store | processes | largest memory, GiB | with few images | beyond, in copies of the pixels |")
    print("| --- | --- | --- | --- | --- |")
    rows = []
    for kind in ("resident", "mapped", "files"):
        for processes in (1, 4):
            whole, little = (peak(folder, kind, processes, args.size, place) / GIB for folder in (args.folder, few))
            copies = (whole - little) / pixels
            print(f"| {kind} | {processes} | {whole:.2f} | {little:.2f} | {copies:.2f} |", flush=True)
            rows.append({"store": kind, "processes": processes, "gib": whole, "few_gib": little, "copies": copies})
    return rows


def peak(folder: Path, kind: str, processes: int, size: int, place: Path) -> int:
    """The largest sum of proportional set sizes of a training's processes: a page that n of them share counts once."""
    words = ["configs/data/imagefolder.yaml", f"data.root={folder}", f"data.size={size}", f"data.loader={kind}"]
    words += [f"data.cache={place / 'cache'}", f"run.dir={place / 'run'}", "run.overwrite=true", "data.batch_size=200"]
    words += [
        "sequence.kind=rotation",
        "sequence.num_observed=1",
        "model.encoder.kind=convnet",
        "model.encoder.width=8",
    ]
    words += ["data.name=memory", "control.enabled=false", "eval.every=100", "run.threads=1", "run.log_every=100"]
    command = [sys.executable, "-m", "seqjepa", "train", "--processes", str(processes), *words]
    highest, done = 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.5):
            total = 0
            with contextlib.suppress(psutil.Error):  # one has just ended
                for found in [parent := psutil.Process(process.pid), *parent.children(recursive=True)]:
                    total += found.memory_full_info().pss
            highest = max(highest, total)

    with (place / "console.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        watcher = threading.Thread(target=watch)
        watcher.start()
        code = process.wait()
        done.set()
        watcher.join()
    if code:
        sys.exit(f"{' '.join(command)}: exit code {code}\n{(place / 'console.log').read_text()[-2000:]}")
    return highest


if __name__ == "__main__":
    main()
