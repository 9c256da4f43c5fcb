"""Experiment trackers: W&B, Trackio and TensorBoard, through Accelerate."""

import contextlib
import importlib
import importlib.util
import io
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ...configs.errors import first_line
from ...configs.section import leaves
from ..runs.folder import RunFolder
from .config import TrackingConfig

NAMES = {
    "wandb": "W&B",
    "trackio": "Trackio (pip install trackio)",
    "tensorboard": "TensorBoard (pip install tensorboard)",
}


class Trackers:
    """The trackers of a run, which the accelerator holds. They record its whole config, and write to its folder.

    One that is not installed, cannot start or fails is left out, and the run continues.
    """

    def __init__(
        self, accelerator: Accelerator, tracking: TrackingConfig, folder: RunFolder, say: Callable[[str], None]
    ):
        self.accelerator = accelerator
        self.say = say
        asked = ["wandb"] if tracking.wandb != "disabled" else []
        asked += [name for name in ("trackio", "tensorboard") if getattr(tracking, name)]
        accelerator.project_configuration.logging_dir = str(folder.path / "tensorboard")
        started = [found for name in asked for found in self._started(name, tracking, folder)]
        accelerator.trackers = started  # without those that failed halfway
        if writer := self._tracker("tensorboard"):
            scalars = {  # TensorBoard takes numbers and text under names without dots
                re.sub(r"\W", "_", name): value if isinstance(value, bool | int | float) else str(value)
                for name, value in leaves(folder.config.model_dump()).items()
            }
            from torch.utils.tensorboard.summary import hparams

            for part in hparams(scalars, {}):  # `add_hparams` makes another folder at each start
                writer.file_writer.add_summary(part)
        run = self._tracker("wandb")
        if run and run.settings.mode == "offline":
            # each start has a folder of its own, and one id joins them when they are uploaded
            place = shlex.quote(run.settings.wandb_dir.rstrip("/"))
            say(f"W&B is offline: wandb sync {place}/offline-run-* uploads the run")
        if self._tracker("trackio"):
            say(f"trackio show --project {shlex.quote(tracking.project)} draws the run")

    def _started(self, name: str, tracking: TrackingConfig, folder: RunFolder) -> list[Any]:
        """The tracker of this name; none, which is said, if it is not installed or cannot start."""
        if not importlib.util.find_spec(name):
            self.say(f"{NAMES[name]} is not installed; the run continues without it")
            return []
        online, alone = name == "wandb" and tracking.wandb == "online", [name]
        for mode in ("online", "offline") if online else (tracking.wandb,):
            accelerator: Any = self.accelerator
            accelerator.log_with, accelerator.trackers = alone, []  # it would start those that it has again
            try:
                with contextlib.redirect_stdout(io.StringIO()):  # Trackio prints a page
                    accelerator.init_trackers(
                        tracking.project, init_kwargs={name: _arguments(name, mode, tracking, folder)}
                    )
                return accelerator.trackers
            except Exception as error:  # their errors for a missing key, network or project share no base class
                if name == "wandb":
                    _leave_wandb()
                if online and mode == "online":
                    self.say(f"W&B cannot go online ({first_line(error)}); this run is tracked offline")
                else:
                    self.say(f"{_title(name)} cannot start ({first_line(error)}); the run continues without it")
        return []

    def _tracker(self, name: str) -> Any:
        """W&B's or Trackio's run, or TensorBoard's writer; None on other processes, and if it is left out."""
        here = self.accelerator.is_main_process
        return next((found.tracker for found in self.accelerator.trackers if here and found.name == name), None)

    def _each(self, record: Callable[[str, Any], None]) -> None:
        """Call `record` with the name of each tracker, and W&B's or Trackio's run or TensorBoard's writer."""
        for tracker in list(self.accelerator.trackers) if self.accelerator.is_main_process else []:
            with _without_it(tracker, self.accelerator, self.say):
                record(tracker.name, tracker.tracker)

    def log(self, step: int, epoch: int | None = None, **groups: dict[str, Any]) -> None:
        """Log finite scalars at an optimiser step, and the epoch, if one has ended.

        Args:
            step: number of optimiser steps done.
            epoch: number of epochs done.
            groups: values by name; the name of their group comes before theirs: train/, val/, system/.
        """
        values = {f"{group}/{name}": value for group, values in groups.items() for name, value in values.items()}
        values |= {"train/epoch": epoch}
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        for tracker in list(self.accelerator.trackers):
            with _without_it(tracker, self.accelerator, self.say):
                tracker.log(finite, step=step)

    def summarise(self, group: str, values: dict[str, Any], step: int | None = None) -> None:
        """Record values that a run has once, beside its charts.

        Args:
            group: comes before their names.
            values: by name.
            step: number of optimiser steps done; None before anything is logged. Trackio has no place for values but a
                run's config, which it keeps with the first that is logged, and draws what comes later as a chart.
        """
        titled = {f"{group}/{name}": value for name, value in values.items()}

        def record(name: str, run: Any) -> None:
            if name == "wandb":
                run.summary.update(titled)
            elif name == "trackio" and step is None:
                run.config.update(titled)
            elif name == "trackio":
                run.log({name: value for name, value in titled.items() if isinstance(value, bool | int | float)}, step)
            else:
                for title, value in titled.items():
                    run.add_text(title, str(value))

        self._each(record)

    def log_figure(self, path: Path, step: int) -> None:
        """Log a PNG at an optimiser step, as figures/ and its name."""
        title = f"figures/{path.stem}"

        def record(name: str, run: Any) -> None:
            if name == "tensorboard":
                from matplotlib.image import imread  # the figure was drawn by matplotlib, which is loaded

                run.add_image(title, imread(path)[..., :3], step, dataformats="HWC")
            else:
                run.log({title: importlib.import_module(name).Image(str(path))}, step=step)

        self._each(record)


def _arguments(name: str, mode: str, tracking: TrackingConfig, folder: RunFolder) -> dict[str, Any]:
    """What a tracker is started with; `mode` is that of W&B."""
    title, settings = tracking.run_name or folder.run.name, folder.config.model_dump()
    if name == "trackio":  # which knows runs by their name alone
        title = f"{title} {folder.tracker_id}"
        return {"name": title, "group": tracking.group, "config": leaves(settings), "resume": "allow", "embed": False}
    if name == "wandb":
        if mode == "offline":  # or W&B would send statistics of its use, offline too
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        return {
            "name": title,
            **tracking.model_dump(include={"entity", "group"}),
            "dir": os.environ.get("WANDB_DIR") or str(folder.path),
            "config": settings,
            "id": folder.tracker_id,
            "resume": "allow" if mode == "online" else None,
            "mode": mode,
            "settings": wandb.Settings(init_timeout=tracking.init_timeout, silent=True, console="off"),
        }
    return {}


@contextlib.contextmanager
def _without_it(tracker: Any, accelerator: Accelerator, say: Callable[[str], None]) -> Iterator[None]:
    """Report a tracker's failure once, and drop it: W&B's process may have died, or the disk be full."""
    try:
        yield
    except Exception as error:  # trackers' errors share no base class
        rest = "the run continues, and metrics.jsonl has all metrics"
        say(f"{_title(tracker.name)} has stopped ({first_line(error)}); {rest}")
        accelerator.trackers = [other for other in accelerator.trackers if other is not tracker]
        if tracker.name == "wandb":
            _leave_wandb()


def _title(name: str) -> str:
    return NAMES[name].partition(" (")[0]


def end_tracking(accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Let the trackers write what they have buffered, and end them."""
    for tracker in list(accelerator.trackers):
        with _without_it(tracker, accelerator, say), contextlib.redirect_stdout(io.StringIO()):  # Trackio prints a line
            if tracker.name == "trackio":  # or it would end once more at the exit, and print
                import trackio

                trackio.finish()
            else:
                tracker.finish()
    accelerator.trackers = []


def _leave_wandb() -> None:
    """Disconnect from W&B's process, which holds the id of a run that could not start, or has died."""
    if "wandb" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()
