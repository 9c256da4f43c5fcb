"""The folder of a run: what is in it, and what a new run may do with it."""

import contextlib
import errno
import functools
import re
import secrets
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from ...configs.compose import dump
from ...configs.errors import InputError, readable
from ...configs.files import write_atomically
from ...configs.section import Schema, leaves
from ..runtime.config import RunConfig
from .checkpoints import Checkpoints, find_checkpoint
from .mirror import LAST_COPY_SECONDS, Mirror
from .state import TrainingState

# settings of one start of a run: the next start may have others, and need not mention it
OF_THE_START = {"run.resume", "run.overwrite"}
# what the config leaves open a run has decided, and its checkpoint says how
LEFT_OPEN = {("model.encoder.stem", "auto")}


class RunFolder:
    """runs/<name>, or the folder that run.dir names; while it is entered, no other run can use it.

    Args:
        config: whole config of the run.
        run: section of the config that names the folder and says what a new run may do there.
        keep: number of newest checkpoints that are kept, besides the best.
        main: whether this is the main process, which locks the folder.
    """

    def __init__(self, config: Schema, run: RunConfig, keep: int, *, main: bool = True):
        self.config = config
        self.run = run
        self.main = main
        self.path = Path(run.dir or f"runs/{run.name}").expanduser()
        self.checkpoints = Checkpoints(self.path / "checkpoints", keep)
        self.metrics = self.path / "metrics.jsonl"
        self.steps = self.path / "steps.jsonl"
        self.summary = self.path / "summary.json"
        self.figures = self.path / "figures"
        self.curves = self.figures / "curves.png"
        self.terms = self.figures / "terms.png"
        self.stream = self.figures / "stream.png"
        self.bases = self.path / "diagnostics"  # of the factors' subspaces
        self._tracker_id = self.path / "tracker-id"
        self._lock_file = FileLock(self.path / ".lock", blocking=False)
        self._existed = False  # whether the folder was there when it was entered
        self.mirror = Mirror(run.mirror, self.path) if run.mirror and main else None
        self.mirror_seconds = LAST_COPY_SECONDS  # seconds that the end of the run waits for the last copy

    def __enter__(self) -> Self:
        with readable(self.path, "run.dir"):
            self._existed = self.path.is_dir()
        if self._existed:
            self._lock()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lock_file.release()

    def _lock(self) -> None:
        """Keep other runs out of the folder; the system releases the lock when this process ends, however it ends.

        Raises:
            InputError: another run uses it.
        """
        if self._lock_file.is_locked or not self.main:
            return
        try:
            self._lock_file.acquire()
            with contextlib.suppress(
                PermissionError
            ):  # another user's; filelock lets only its maker write to a new one
                (self.path / ".lock").chmod(self.path.stat().st_mode & 0o666)
        except Timeout:
            raise InputError(f"{self.path}: another run is training in it", "run.dir") from None
        except NotImplementedError:
            self._warn_without_lock()
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise InputError(f"{self.path}: cannot be written ({error.strerror})", "run.dir") from None
            self._warn_without_lock()

    def _warn_without_lock(self) -> None:
        warnings.warn(
            f"{self.path}: this disk has no locks, so nothing keeps another run from training in it", stacklevel=4
        )

    @property
    def last_good(self) -> str:
        """What is left of a run that fails, in words."""
        try:
            newest = self.checkpoints.newest()
        except OSError as error:
            return f"{self.checkpoints.folder} cannot be listed ({error.strerror})"
        return f"last good checkpoint: {newest}; run.resume=auto continues from it" if newest else "nothing was saved"

    def fetch(self, say: Callable[[str], None]) -> None:
        """Bring what run.mirror has to a disk that has nothing to resume from, if it is to be resumed."""
        if self.mirror is None or self.run.resume != "auto" or self.checkpoints.newest():
            return
        with readable(self.path, "run.dir"):
            self.path.mkdir(parents=True, exist_ok=True)
        self._existed = True
        self._lock()
        self.mirror.fetch(say)

    def copy(self, say: Callable[[str], None]) -> None:
        """Copy a new checkpoint to run.mirror, in the background; says what went wrong with the copies before."""
        if self.mirror is not None:
            self.mirror.copy()
            self._tell(say)

    def end_mirror(self, say: Callable[[str], None]) -> None:
        """Wait until run.mirror has everything."""
        if self.mirror is not None:
            self.mirror.finish(self.mirror_seconds)
            self._tell(say)

    def _tell(self, say: Callable[[str], None]) -> None:
        while self.mirror is not None and self.mirror.lines:
            say(self.mirror.lines.pop(0))

    def checkpoint_to_resume(self, say: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
        """The checkpoint that run.resume names.

        Returns:
            The checkpoint, or None to start from the beginning; and newer ones that are damaged.

        Raises:
            InputError: a path was given and holds no checkpoint, or all in the run's folder are damaged.
        """
        resume = self.run.resume
        if resume == "none":
            return None, []
        if resume == "auto":
            found, damaged = self.checkpoints.newest_whole(say)
            if damaged and not found:
                advice = "run.overwrite=true with run.resume=none starts anew"
                raise InputError(f"every checkpoint in {self.checkpoints.folder} is damaged; {advice}", "run.resume")
            return found, damaged
        path = find_checkpoint(Path(resume).expanduser())
        if path is None:
            allowed = "auto, none, a run folder or a checkpoint is allowed"
            raise InputError(f"{resume}: holds no checkpoint; {allowed}", "run.resume")
        return path, []

    def check_same_experiment(self, saved: Schema, path: Path) -> dict[str, tuple[Any, Any]]:
        """Refuse to continue the checkpoint at `path` if the config that it has `saved` is of another experiment.

        Returns:
            The settings that differ and may, by dotted name: value of the checkpoint, value now.

        Raises:
            InputError: names the first setting that differs and decides what is learnt.
        """
        before, now = leaves(saved.model_dump()), leaves(self.config.model_dump())
        changed = {
            field: (before.get(field), now.get(field))
            for field in now | before
            if before.get(field) != now.get(field)
            and field not in OF_THE_START
            and (field, now.get(field)) not in LEFT_OPEN
        }
        for field, (old, new) in changed.items():
            if not self.config.is_free(field):
                raise InputError(f"is {new!r}, the checkpoint {path} was trained with {old!r}", field)
        return changed

    def open(self, resumed: Path | None, state: TrainingState | None, damaged: list[Path]) -> None:
        """Make the folder, remove from it what does not belong to the run that begins, and save the config in it.

        Args:
            resumed: checkpoint that the run goes on from; None for a new run.
            state: its record.
            damaged: newer ones.

        Raises:
            InputError: it holds a run that the config neither resumes nor replaces, or it cannot be written.
        """
        home = resumed.resolve().parent if resumed else None
        own = state if home == self.checkpoints.folder.resolve() else None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            if not self._existed and (self.checkpoints.newest() or self.metrics.exists()):
                raise InputError(f"{self.path}: another run wrote here after this one started", "run.dir")
            for folder in (self.checkpoints.folder, self.figures):
                folder.mkdir(exist_ok=True)
            self.checkpoints.set_aside(damaged)
            if own:
                self.checkpoints.rewind(own.position, own.best.segment)
            else:
                self._clear()
            self.summary.unlink(missing_ok=True)  # it tells of a run that has ended; this one has not
            write_atomically(self.path / "config.yaml", dump(self.config))
            if own and own.wandb_id:
                write_atomically(self._tracker_id, own.wandb_id)
            elif not self._tracker_id.exists():  # already now: a run that is killed before it saves keeps its id too
                write_atomically(self._tracker_id, secrets.token_hex(4))
            if home and not own and home.name == "checkpoints":
                for place in (self.metrics, self.steps):
                    if (home.parent / place.name).is_file():
                        shutil.copyfile(home.parent / place.name, place)  # their later epochs and steps will be dropped
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
            # metrics without a checkpoint were copied by a run that resumes another run's checkpoint
            kept = self.checkpoints.newest() or self.run.resume == "none"
            if kept and not self.run.overwrite and self.run.resume != "auto":
                ways = "run.resume=auto continues it, run.overwrite=true replaces it"
                raise InputError(f"{self.path} holds a run: {ways}, another run.name or run.dir keeps both", "run.dir")
            self.checkpoints.clear()
            for name in ("figures", "diagnostics", "tensorboard"):
                shutil.rmtree(self.path / name, ignore_errors=True)
            self.metrics.unlink(missing_ok=True)
            self.steps.unlink(missing_ok=True)
        if self.run.resume != "auto":
            self._tracker_id.unlink(missing_ok=True)
