"""The checkpoints of a run: written beside their place and renamed, found again, kept or deleted.

checkpoints/epoch-0007/              after seven epochs
checkpoints/epoch-0007-step-00042/   after 42 more steps, where the run was interrupted
    model.safetensors      encoder, aggregator, predictor and teacher
    probes.safetensors
    trainer.safetensors    optimisers, metric accumulators
    rng-00000.safetensors  random generators of process 0, and so on
    state.json             position, best epoch, config, tracker
    manifest.json          size and checksum of each of these
checkpoints/best -> epoch-0005
checkpoints/damaged-epoch-0006/      failed its checksums when the run was resumed, and was passed over

Where training is divided into other segments than epochs, the names begin with `segment-`.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from .checksums import MANIFEST, Damaged, reading, to_disk
from .state import Position
from .tensors import check

NAME = re.compile(r"(?:epoch|segment)-(\d{4,9})(?:-step-(\d{5,9}))?")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: their folder.
        keep: number of newest ones that are kept, besides the best.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """The checkpoints, oldest first, unread: each was written completely, but may have been damaged since."""
        try:
            names = os.listdir(self.folder)  # a glob would take a folder that may not be read for an empty one
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = [self.folder / name for name in names if NAME.fullmatch(name)]
        return sorted((path for path in found if path.is_dir()), key=_position)

    def newest(self) -> Path | None:
        """The latest checkpoint, unread."""
        return (self.all() or [None])[-1]

    def newest_whole(self, passed_over: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
        """The latest checkpoint whose files are as they were written, and the damaged ones after it.

        Args:
            passed_over: called with a line for each damaged one.

        Raises:
            InputError: the latest undamaged one cannot be used, because of its version or its permissions.
        """
        damaged = []
        with reading(self.folder):
            found = self.all()
        for path in reversed(found):
            try:
                check(path)
            except Damaged as problem:
                damaged.append(path)
                passed_over(f"damaged checkpoint passed over: {problem}")
            else:
                return path, damaged
        return None, damaged

    def partial(self, kind: str, position: Position) -> tuple[Path, Path]:
        """Where a checkpoint is written, and the name that it will have; `kind` is epoch or segment."""
        name = f"{kind}-{position.segment:04d}" + (f"-step-{position.step:05d}" if position.step else "")
        return self.folder / f".partial-{name}", self.folder / name

    def publish(self, partial: Path, final: Path, *, best: bool) -> None:
        """Give a written checkpoint its name, and delete those that are no longer kept.

        A process that is killed between any two of these steps leaves a whole checkpoint to resume from.
        """
        if final.exists():  # the run was resumed here and interrupted again before its first step: the same content
            shutil.rmtree(partial)
        else:
            os.replace(partial, final)
        # before the deletions, which spare what `best` points to
        if best:
            self._link_best(final.name)
        # the new names must survive a loss of power before the old checkpoints go
        to_disk(self.folder)
        link = self.folder / "best"
        kept = {final.name, *(path.name for path in self.all()[-self.keep :])}
        kept |= {os.readlink(link)} if link.is_symlink() else set()
        for path in self.all():
            if path.name not in kept:
                self._delete(path)
        # a whole checkpoint of this position has taken the damaged one's place
        shutil.rmtree(self.folder / f"damaged-{final.name}", ignore_errors=True)

    def set_aside(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that new ones can have their names."""
        for path in damaged:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)

    def rewind(self, position: Position, best: int) -> None:
        """Delete what lies after a position that the run goes back to.

        Args:
            position: position of the checkpoint that is resumed.
            best: number of segments after which the run was at its best by then; `best` points there again.
        """
        for path in self.all():
            if _position(path) > position:
                self._delete(path)
        self._sweep()
        link = self.folder / "best"
        if name := next((path.name for path in self.all() if _position(path) == (best, 0)), None):
            self._link_best(name)
        elif link.is_symlink():
            link.unlink()

    def clear(self) -> None:
        """Delete all checkpoints, damaged ones too, and nothing else that stands there."""
        damaged = [path for path in self.folder.glob("damaged-*") if NAME.fullmatch(path.name[8:])]
        for path in [*self.all(), *damaged]:
            self._delete(path)
        self._sweep()
        (self.folder / "best").unlink(missing_ok=True)

    def _link_best(self, name: str) -> None:
        link, fresh = self.folder / "best", self.folder / ".best"
        if link.is_dir() and not link.is_symlink():  # a copied run may hold the best itself
            self._delete(link)
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(name)
        os.replace(fresh, link)

    def _delete(self, path: Path) -> None:
        """Delete a folder, first renamed: what a killed process leaves half deleted must not pass for a checkpoint."""
        if path.is_symlink():
            path.unlink()
            return
        going = self.folder / f".partial-{path.name}-deleted"
        shutil.rmtree(going, ignore_errors=True)
        os.replace(path, going)
        shutil.rmtree(going)

    def _sweep(self) -> None:
        """Delete what a killed process left half written or half deleted."""
        for path in self.folder.glob(".partial-*"):
            shutil.rmtree(path)
        (self.folder / ".best").unlink(missing_ok=True)


def _position(path: Path) -> Position:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return Position(int(match[1]), int(match[2] or 0))


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`, or the newest of the run folder there; None if there is neither.

    Raises:
        InputError: this user may not look into the folder.
    """
    with reading(path):
        try:
            names = os.listdir(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if "checkpoints" in names:
            return Checkpoints(path / "checkpoints", 1).newest()
    return path if {"state.json", MANIFEST} & set(names) else None
