"""The checkpoints of a run: written beside and renamed, found again whole, kept or dropped.

checkpoints/epoch-0007/              seven epochs are done
checkpoints/epoch-0007-step-00042/   and 42 steps of the next one: an interrupted run
    model.safetensors      encoder, aggregator, predictor and teacher
    probes.safetensors
    trainer.safetensors    optimisers, metric accumulators
    rng-00000.safetensors  generators of process 0, and so on
    state.json             position, best epoch, config, tracker
    manifest.json          size and checksum of each of these
checkpoints/best -> epoch-0005
checkpoints/damaged-epoch-0006/      failed its checksums when the run was resumed, and was passed over
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from .checksums import MANIFEST, Damaged, read_failure, to_disk
from .tensors import check

__all__ = ["Checkpoints", "find_checkpoint"]

NAME = re.compile(r"epoch-(\d{4,9})(?:-step-(\d{5,9}))?")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: their folder.
        keep: how many of the newest are kept, besides the best.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """Checkpoints, oldest first; each was written to its end, but time may have damaged it."""
        try:
            names = os.listdir(self.folder)  # a glob takes a folder that may not be read for an empty one
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [self.folder / name for name in names if NAME.fullmatch(name)]
        return sorted((path for path in found if path.is_dir()), key=_position)

    def newest(self) -> Path | None:
        """The latest checkpoint, unread."""
        return (self.all() or [None])[-1]

    def newest_whole(self, passed_over: Callable[[str], None]) -> tuple[Path, list[Path]] | tuple[None, list[Path]]:
        """The latest checkpoint whose files are as they were written, and the damaged ones after it.

        Args:
            passed_over: is told of each of these, in a line.

        Raises:
            InputError: the latest is not damaged, but of a version, or with permissions, that prevent its use.
        """
        damaged = []
        try:
            found = self.all()
        except OSError as error:
            raise read_failure(self.folder, error) from None
        for path in reversed(found):
            try:
                check(path)
            except Damaged as problem:
                damaged.append(path)
                passed_over(f"damaged checkpoint passed over: {problem}")
            else:
                return path, damaged
        return None, damaged

    def partial(self, epoch: int, step: int) -> tuple[Path, Path]:
        """Where a checkpoint is written, and the name that it will have.

        Args:
            epoch: number of complete epochs.
            step: number of steps done in the next one.
        """
        name = f"epoch-{epoch:04d}" + (f"-step-{step:05d}" if step else "")
        return self.folder / f".partial-{name}", self.folder / name

    def publish(self, partial: Path, final: Path, *, best: bool) -> None:
        """Make a written checkpoint visible, whole, and drop the ones that are no longer kept."""
        if final.exists():  # a run that was resumed and stopped again without a step: what stands there is the same
            shutil.rmtree(partial)
        else:
            os.replace(partial, final)
        if best:
            self._link_best(final.name)
        to_disk(self.folder)  # before others go
        link = self.folder / "best"
        kept = [final, *self.all()[-self.keep :]]
        for path in self.all():
            if path not in kept and path.name != (os.readlink(link) if link.is_symlink() else None):
                self._drop(path)
        shutil.rmtree(self.folder / f"damaged-{final.name}", ignore_errors=True)

    def set_aside(self, damaged: list[Path]) -> None:
        """Take damaged checkpoints out of the way of new ones."""
        for path in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)

    def rewind(self, epoch: int, step: int, best_epoch: int) -> None:
        """Drop what lies after a position that the run goes back to, and point `best` at what was best by then."""
        for path in self.all():
            if _position(path) > (epoch, step):
                self._drop(path)
        self._sweep()
        best = self.folder / f"epoch-{best_epoch:04d}"
        if best.is_dir():
            self._link_best(best.name)
        elif (link := self.folder / "best").is_symlink():
            link.unlink()

    def clear(self) -> None:
        """Drop all of them, and nothing else that stands there."""
        damaged = [path for path in self.folder.glob("damaged-epoch-*") if NAME.fullmatch(path.name[8:])]
        for path in [*self.all(), *damaged]:
            self._drop(path)
        self._sweep()
        (self.folder / "best").unlink(missing_ok=True)

    def _link_best(self, name: str) -> None:
        link, fresh = self.folder / "best", self.folder / ".best"
        if link.is_dir() and not link.is_symlink():  # as some copies of a run have it
            self._drop(link)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, link)

    def _drop(self, path: Path) -> None:
        """Delete a folder, under a name that is no checkpoint's, for it may be left half done."""
        if path.is_symlink():
            path.unlink()
            return
        going = self.folder / f".partial-{path.name}-dropped"
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going)

    def _sweep(self) -> None:
        """Delete what a process left that was killed while it wrote or deleted."""
        for path in self.folder.glob(".partial-*"):
            shutil.rmtree(path)
        (self.folder / ".best").unlink(missing_ok=True)


def _position(path: Path) -> tuple[int, int]:
    epoch, step = NAME.fullmatch(path.name).groups()
    return int(epoch), int(step or 0)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`, or the newest of the run folder there; None if there is neither.

    Raises:
        Unreadable: this user may not look into the folder.
    """
    try:
        names = os.listdir(path)
        if "checkpoints" in names:
            return Checkpoints(path / "checkpoints", 1).newest()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise read_failure(path, error) from None
    return path if {"state.json", MANIFEST} & set(names) else None
