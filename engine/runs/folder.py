"""The folder of a run: what stands in it, and what a new run may do with it."""

from __future__ import annotations

import errno
import functools
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...configs.compose import compose, dump
from ...configs.errors import InputError
from ...configs.files import write_atomically
from ...configs.section import Section, leaves
from ..runtime.config import RunConfig
from .checkpoints import Checkpoints, find_checkpoint
from .state import TrainingState

try:
    import fcntl
except ModuleNotFoundError:
    needed = "locks of files and signals that this system's Python does not have"
    raise InputError(f"training needs {needed}: Linux and macOS are supported, and WSL on Windows") from None

__all__ = ["RunFolder"]

# fields that say how this start of a run goes about it; their change on resume is no news
OF_THE_START = {"run.resume", "run.overwrite"}


class RunFolder:
    """runs/<name>, or where run.dir says; while entered, no other run can be in it.

    Args:
        config: of the run, whole.
        run: its section of the folder's name, and of what a new run may do there.
        keep: how many checkpoints are kept, besides the best.
        main: whether this is the main process: the one that keeps others out.

    Attributes:
        path: of the folder.
        checkpoints: in it.
        metrics: path of metrics.jsonl.
        summary: path of summary.json.
        curves: path of the figure.
        figures: folder of all figures.
        bases: folder of the factors' subspaces.
    """

    def __init__(self, config: Section, run: RunConfig, keep: int, *, main: bool = True):
        self.config = config
        self.run = run
        self.main = main
        self.path = Path(run.dir or f"runs/{run.name}").expanduser()
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        self._held: int | None = None  # file descriptor of the lock
        self._stood = False  # whether the folder was there when this run began to look at it
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self._tracker_id = self.path / "tracker-id"
        self.figures = self.path / "figures"
        self.curves = self.figures / "curves.png"
        self.bases = self.path / "diagnostics"

    def __enter__(self) -> RunFolder:
        try:
            self._stood = self.path.is_dir()
        except OSError as error:
            raise InputError(f"{self.path}: cannot be read ({error.strerror})", "run.dir") from None
        if self._stood:
            self._lock()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._held is not None:
            os.close(self._held)

    def _lock(self) -> None:
        """Keep other runs out of the folder; the kernel lets go when this process ends, however it ends.

        Raises:
            InputError: another run is in it.
        """
        if self._held is not None or not self.main:
            return
        try:
            self._held = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._held)
            self._held = None
            raise InputError(f"{self.path}: another run is training in it", "run.dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):  # a disk that knows no locks
                raise InputError(f"{self.path}: cannot be written ({error.strerror})", "run.dir") from None

    @property
    def last_good(self) -> str:
        """Where a run that fails can go on from, in words."""
        try:
            newest = self.checkpoints.newest()
        except OSError as error:
            return f"{self.checkpoints.folder} cannot be listed ({error.strerror})"
        return f"last good checkpoint: {newest}; run.resume=auto goes on from there" if newest else "nothing was saved"

    def checkpoint_to_resume(self, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
        """The checkpoint that run.resume names, None to start anew; and damaged ones that were passed over for it.

        Args:
            say: prints a line.

        Raises:
            InputError: there is none where a path was given, or all in the run's folder are damaged.
        """
        resume = self.run.resume
        if resume == "none":
            return None, []
        if resume == "auto":
            found, damaged = self.checkpoints.newest_whole(say)
            if damaged and not found:
                raise InputError(
                    f"every checkpoint in {self.checkpoints.folder} is damaged; run.overwrite=true with "
                    "run.resume=none starts anew",
                    "run.resume",
                )
            return found, damaged
        path = find_checkpoint(Path(resume).expanduser())
        if path is None:
            allowed = "auto, none, a run folder or a checkpoint is allowed"
            raise InputError(f"{resume}: holds no checkpoint; {allowed}", "run.resume")
        return path, []

    def check_same_experiment(self, saved: dict[str, Any], path: Path) -> dict[str, tuple[Any, Any]]:
        """Refuse to continue a checkpoint that was trained with another config.

        Args:
            saved: the checkpoint's config.
            path: of the checkpoint.

        Returns:
            The fields that differ and may, by dotted name: value of the checkpoint, value now.

        Raises:
            InputError: names the first field that decides what is learnt and differs, or what in the saved config is
                not known any more.
        """
        schema = type(self.config)
        before = leaves(compose([], schema, (f"{path}", saved)).config.model_dump())
        now = leaves(self.config.model_dump())
        changed = {
            field: (before.get(field), now.get(field))
            for field in now | before
            if before.get(field) != now.get(field) and field not in OF_THE_START
        }
        for field, (old, new) in changed.items():
            if not schema.is_free(field):
                raise InputError(f"is {new!r}, the checkpoint {path} was trained with {old!r}", field)
        return changed

    def open(self, resumed: Path | None, state: TrainingState | None, damaged: list[Path]) -> None:
        """Make the folder and save the config in it, after clearing what does not belong to the run that begins.

        Args:
            resumed: checkpoint that the run goes on from; None for a fresh run.
            state: of that checkpoint.
            damaged: checkpoints that were passed over for it.

        Raises:
            InputError: a run stands there, and the config neither resumes nor replaces it; or it cannot be written.
        """
        own = resumed is not None and resumed.resolve().parent == self.checkpoints.folder.resolve()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not self._stood and (self.checkpoints.newest() or self.metrics.exists()):
                raise InputError(f"{self.path}: another run has been in it since this one began", "run.dir")
            for folder in (self.checkpoints.folder, self.figures):
                folder.mkdir(exist_ok=True)
            self.checkpoints.set_aside(damaged)
            if own:
                self.checkpoints.rewind(state.epoch, state.step, state.best.epoch)
            else:
                self._clear()
            self.summary.unlink(missing_ok=True)  # it is of a run that ended; this one has not
            write_atomically(self.path / "config.yaml", dump(self.config))
            if own and state.wandb_id:
                write_atomically(self._tracker_id, state.wandb_id)
            elif not self._tracker_id.exists():  # from the start: a run that is killed before it saves keeps it too
                write_atomically(self._tracker_id, secrets.token_hex(4))
            if resumed and not own and resumed.resolve().parent.name == "checkpoints":
                earlier = resumed.resolve().parent.parent / "metrics.jsonl"
                if earlier.is_file():  # the epochs before; what lies after them is dropped later
                    shutil.copyfile(earlier, self.metrics)
        except OSError as error:
            place = error.filename or self.path
            raise InputError(f"{place}: cannot be written ({error.strerror})", "run.dir") from None

    @functools.cached_property
    def tracker_id(self) -> str:
        """The run's id in W&B, the same over all restarts.

        Raises:
            InputError: its file does not hold one.
        """
        written = self._tracker_id.read_bytes()
        if not re.fullmatch(rb"[\w-]{1,128}", written):
            raise InputError(f"{self._tracker_id}: not the id of a run; without the file there is a new one", "run.dir")
        return written.decode()

    def _clear(self) -> None:
        if self.checkpoints.newest() or self.metrics.exists():
            # metrics alone may be those that a run which goes on from elsewhere began with
            kept = self.checkpoints.newest() or self.run.resume == "none"
            if kept and not self.run.overwrite and self.run.resume != "auto":
                raise InputError(
                    f"{self.path} holds a run: run.resume=auto continues it, run.overwrite=true replaces it, "
                    "another run.name or run.dir keeps both",
                    "run.dir",
                )
            self.checkpoints.clear()
            for name in ("figures", "diagnostics", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            self.metrics.unlink(missing_ok=True)
        if self.run.resume != "auto":
            self._tracker_id.unlink(missing_ok=True)
