"""Trackers, through Accelerate: W&B and TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ValidationError

from .config import TrackingConfig

__all__ = ["Trackers", "end_tracking"]


class Trackers:
    """W&B and TensorBoard, through Accelerate; either may be absent.

    Args:
        accelerator: which holds them.
        tracking: which of them, and under which names.
        run_name: of the run.
        settings: all of the run's config.
        run_dir: where their files go.
        wandb_id: of the run in W&B, the same over all restarts.
        say: prints a line.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        tracking: TrackingConfig,
        run_name: str,
        settings: dict[str, Any],
        run_dir: Path,
        wandb_id: str,
        say: Callable[[str], None],
    ):
        self.accelerator = accelerator
        self.say = say
        wanted = []
        if tracking.wandb != "disabled":
            wanted += ["wandb"] if _installed("wandb", "W&B", say) else []
        if tracking.tensorboard:
            wanted += ["tensorboard"] if _installed("tensorboard", "TensorBoard (pip install tensorboard)", say) else []
        accelerator.log_with = wanted
        accelerator.project_configuration.logging_dir = str(run_dir / "tensorboard")
        modes = ["online", "offline"] if tracking.wandb == "online" else [tracking.wandb]

        def of_wandb(mode: str) -> dict[str, Any]:
            return _wandb_kwargs(tracking, run_name, settings, run_dir, mode, wandb_id)

        for mode in modes:
            try:
                accelerator.init_trackers(
                    tracking.project,
                    init_kwargs={"wandb": of_wandb(mode)} if "wandb" in wanted else {},
                )
                break
            except Exception as error:  # wandb's errors for a missing key, network or project share no base
                accelerator.trackers = []  # the one that failed stands there half made
                _leave_wandb()
                if mode == "online":
                    say(f"W&B cannot go online ({_line(error)}); this run is tracked offline")
                else:
                    say(f"trackers cannot start ({_line(error)}); the run goes on without them")
                    wanted.clear()
        self.tensorboard = None
        if "tensorboard" in wanted and accelerator.is_main_process:
            accelerator.get_tracker("tensorboard").store_init_configuration(_flat(settings))
            self.tensorboard = accelerator.get_tracker("tensorboard", unwrap=True)
        self.wandb = (
            accelerator.get_tracker("wandb", unwrap=True) if "wandb" in wanted and accelerator.is_main_process else None
        )
        if self.wandb and self.wandb.settings.mode == "offline":
            # a folder for each start, all of one id: they are uploaded as one
            folder = shlex.quote(self.wandb.settings.wandb_dir.rstrip("/"))
            say(f"W&B is offline: wandb sync {folder}/offline-run-* uploads the run")

    def log(self, values: dict[str, Any], step: int) -> None:
        """Log finite scalars at an optimiser step."""
        finite = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        with self._surviving():
            self.accelerator.log(finite, step=step)

    def summarise(self, values: dict[str, Any]) -> None:
        """Put the verdict of the run beside its charts."""
        with self._surviving():
            if self.wandb:
                self.wandb.summary.update(values)
            if self.tensorboard:
                for name, value in values.items():
                    self.tensorboard.add_text(name, str(value))

    def log_figure(self, name: str, path: Path, step: int) -> None:
        if self.wandb:
            import wandb

            with self._surviving():
                self.wandb.log({name: wandb.Image(str(path))}, step=step)

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        with _surviving(self.accelerator, self.say):
            yield
        if not self.accelerator.trackers:
            self.wandb = self.tensorboard = None


@contextlib.contextmanager
def _surviving(accelerator: Accelerator, say: Callable[[str], None]) -> Iterator[None]:
    """A tracker that fails is told of once, and left: its process may have died, its disk be full."""
    try:
        yield
    except Exception as error:  # trackers' errors share no base
        say(f"tracking has stopped ({_line(error)}); the run goes on, and metrics.jsonl has all of it")
        accelerator.trackers = []
        _leave_wandb()


def end_tracking(accelerator: Accelerator, say: Callable[[str], None]) -> None:
    """Let the trackers write what they still hold."""
    with _surviving(accelerator, say):
        for tracker in accelerator.trackers:
            tracker.finish()
    accelerator.trackers = []


def _leave_wandb() -> None:
    """Forget W&B's process: it holds the id of a run that could not start, or is gone and would be missed."""
    if "wandb" in sys.modules:
        with contextlib.suppress(Exception):
            sys.modules["wandb"].teardown()


def _line(error: Exception) -> str:
    if isinstance(error, ValidationError):  # of W&B's settings
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def _installed(module: str, name: str, say: Callable[[str], None]) -> bool:
    if importlib.util.find_spec(module) is not None:
        return True
    say(f"{name} is not installed; the run goes on without it")
    return False


def _wandb_kwargs(
    tracking: TrackingConfig, run_name: str, settings: dict[str, Any], run_dir: Path, mode: str, wandb_id: str
) -> dict[str, Any]:
    import wandb

    return {
        "name": tracking.run_name or run_name,
        "entity": tracking.entity,
        "group": tracking.group,
        "dir": os.environ.get("WANDB_DIR") or str(run_dir),
        "config": settings,
        "id": wandb_id,
        "resume": "allow" if mode == "online" else None,
        "mode": mode,
        "settings": wandb.Settings(init_timeout=tracking.init_timeout, silent=True, console="off"),
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str | int | float | bool]:
    flat: dict[str, str | int | float | bool] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[re.sub(r"\W", "_", prefix + key)] = value if isinstance(value, (bool, int, float)) else str(value)
    return flat
