"""Write betons for FFCV: `python -m seqjepa.loaders.write SOURCE OUT`.

SOURCE is `digits`; or a folder with train/ and test/ of class folders; or `cifar10`, `cifar100`, `mnist` in
torchvision's own layout under --root. OUT receives train.beton and test.beton, each with a sidecar that describes it.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from multiprocessing import Process, active_children
from pathlib import Path
from typing import Any

import numpy as np

from seqjepa.configs.console import open_console
from seqjepa.loaders import InputError
from seqjepa.loaders.beton import INSTALL_HINT, Sidecar, file_sha256, has_ffcv, sidecar_path
from seqjepa.loaders.sources import SHAPES, SPLITS, Images, find_layout, read_images

__all__ = ["main", "write_beton"]


PAGE = 1 << 23  # bytes: FFCV's files grow by pages


class _Samples:
    """The (image, label) pairs of a split, as FFCV's writer indexes them."""

    def __init__(self, images: Images):
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return self.images.pixels[position], int(self.images.labels[position])


def write_beton(images: Images, path: Path, *, split: str, mean: list[float], std: list[float]) -> Sidecar:
    """Write a split as a beton with its sidecar; both appear whole or not at all.

    Args:
        images: the split.
        path: NAME.beton.
        split: train or test.
        mean: of the training pixels, one a channel, in [0, 1].
        std: likewise.
    """
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    needed, free = images.pixels.nbytes + 2 * PAGE, shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{os.strerror(errno.ENOSPC)}: {needed >> 20} MiB are needed, {free >> 20} are free",
            str(path),
        )
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        # one writer: several would interleave their pages, and the file's bytes would vary from run to run
        writer = DatasetWriter(
            str(partial), {"image": RGBImageField(write_mode="raw"), "label": IntField()}, num_workers=1
        )
        with _watched(writer, path):
            writer.from_indexed_dataset(_Samples(images))
        sidecar = Sidecar(
            source=images.dataset,
            split=split,
            count=len(images.labels),
            image_size=list(images.pixels.shape[1:3]),
            classes=images.classes,
            mean=list(mean),
            std=list(std),
            pixels_sha256=images.fingerprint(),
            file_size=partial.stat().st_size,
            file_sha256=file_sha256(partial),
        )
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        sidecar.write(sidecar_path(partial))
        # the old sidecar goes first: a beton without one is refused, one with another's would be believed
        sidecar_path(path).unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(sidecar_path(partial), sidecar_path(path))
    finally:
        partial.unlink(missing_ok=True)
        sidecar_path(partial).unlink(missing_ok=True)
    return sidecar


@contextlib.contextmanager
def _watched(writer: Any, path: Path) -> Iterator[None]:
    """Raise an OSError when the process that writes has failed: FFCV 1.0.2 would wait for it for ever."""
    processes: set[Process] = set()
    parent, stderr = os.getpid(), sys.stderr

    def look(*_: object) -> None:
        processes.update(active_children())
        if any(process.exitcode for process in processes):
            full = shutil.disk_usage(path.parent).free < PAGE
            number = errno.ENOSPC if full else errno.EIO
            raise OSError(number, os.strerror(number), str(path))

    class Stderr:
        """The parent's; the traceback of a process that fails goes nowhere."""

        def __getattr__(self, name: str) -> Any:
            return getattr(stderr if os.getpid() == parent else open(os.devnull, "w"), name)

    before = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    sys.stderr = Stderr()
    try:
        yield
    except OSError:
        writer.metadata_sm.close()
        writer.metadata_sm.unlink()
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        sys.stderr = stderr


def _parse(argv: list[str] | None) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m seqjepa.loaders.write", description=summary, epilog=details)
    parser.add_argument("source", help="digits, cifar10, cifar100, mnist, or a folder with train/ and test/")
    parser.add_argument("out", type=Path, help="folder for train.beton and test.beton")
    parser.add_argument("--root", help="folder of torchvision's files, for cifar10, cifar100 and mnist")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what --root lacks")
    parser.add_argument("--dataset", help="what a folder holds (default: its name, if that is a known dataset)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Command line; returns 0, or 2 for bad input."""
    open_console()
    args = _parse(argv)
    try:
        if not has_ffcv():
            raise InputError(f"writing betons needs ffcv; {INSTALL_HINT}")
        if Path(args.source).is_dir():
            name = Path(args.source).resolve().name
            dataset, root = args.dataset or (name if name in SHAPES else "imagefolder"), args.source
        elif args.source in SHAPES:
            dataset, root = args.source, args.root
        else:
            raise InputError(f"{args.source}: neither a folder nor one of {', '.join(SHAPES)}")
        if dataset not in SHAPES and dataset != "imagefolder":
            raise InputError(f"--dataset {dataset}: one of {', '.join(SHAPES)}, imagefolder is allowed")
        layout = find_layout(dataset, root)
        if layout.kind == "beton":
            raise InputError(f"{root}: holds betons already")
        images = {split: read_images(dataset, layout, split, args.download) for split in SPLITS}
        mean, std = images["train"].statistics()
        for split, part in images.items():
            path = args.out / f"{split}.beton"
            sidecar = write_beton(part, path, split=split, mean=mean, std=std)
            print(f"{path}: {sidecar.count} images of {dataset}, {sidecar.file_size / 1e6:.1f} MB")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
