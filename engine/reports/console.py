"""What a person sees: a progress bar on a terminal, and a table an epoch."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Reporter", "Stopwatch", "closing_block", "number"]

SHOWN = (
    "online_linacc",
    "leakage_linacc",
    "matched_z_linacc",
    "online_r2",
    "matched_agg_r2",
    "leakage_r2",
    "matched_z_r2",
)

CLOSING_METRICS = (
    "online_linacc_test",
    "leakage_linacc_test",
    "online_r2_test",
    "leakage_r2_test",
    "pred_cosine_centred_test",
)


class _Console(Console):
    """Falls silent, and lets the run go on, when its pipe is closed."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Reporter:
    """Speaks on the main process; shows a bar only on a terminal.

    Args:
        speaks: whether this is the main process.
    """

    def __init__(self, speaks: bool):
        # names are shown as they are: brackets and colons in them are no markup
        self.console = _Console(quiet=not speaks, highlight=False, soft_wrap=True, markup=False, emoji=False)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
        )
        self.progress = Progress(
            *columns, console=self.console, disable=not (speaks and self.console.is_terminal), transient=True
        )
        self.task = self.progress.add_task("starting", total=None, status="")

    def __enter__(self) -> Reporter:
        self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._heard_or_not():
            self.progress.stop()

    @contextlib.contextmanager
    def _heard_or_not(self) -> Iterator[None]:
        """The terminal may be gone, the log's disk full: no reason for a run to end."""
        try:
            yield
        except OSError:
            self.console.on_broken_pipe()

    def say(self, what: str | Table) -> None:
        if isinstance(what, Table):  # whole, however narrow the console: a number that is cut tells nothing
            what.width = self.console.measure(what, options=self.console.options.update(width=1000)).maximum
        with self._heard_or_not():
            self.console.print(what)

    def advance(
        self, description: str = "", amount: int = 1, *, total: int | None = None, status: str | None = None
    ) -> None:
        """Move the bar; with `total`, start it anew at `amount` of it."""
        with self._heard_or_not():
            if total is not None:
                self.progress.reset(self.task, total=total, completed=amount, description=description, status="")
            else:
                fields = {} if status is None else {"status": status}
                self.progress.update(self.task, advance=amount, **fields)

    def epoch(self, title: str, metrics: dict[str, float], untrained: dict[str, float] | None) -> None:
        """The table of a validated epoch: training, test, and the untrained control."""
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for heading, justify in (
            ("metric", "left"),
            ("train", "right"),
            ("test", "right"),
            ("untrained", "right"),
        ):
            table.add_column(heading, justify=justify)
        control = untrained or {}
        table.add_row(
            "loss",
            number(metrics.get("ep_loss")),
            number(metrics.get("val_loss")),
            number(control.get("val_loss")),
        )
        name = "pred_cosine_centred_test"
        table.add_row("pred_cosine_centred", "", number(metrics.get(name)), number(control.get(name)))
        for name in SHOWN:
            row = [metrics.get(f"{name}_train"), metrics.get(f"{name}_test"), control.get(f"{name}_test")]
            table.add_row(name, *map(number, row))
        self.say(table)


class Stopwatch:
    """Seconds and sequences of a stretch of training."""

    def __init__(self):
        self.restart()

    def restart(self) -> None:
        self.started, self.sequences, self.steps = time.perf_counter(), 0, 0

    def count(self, sequences: int) -> None:
        self.sequences += sequences
        self.steps += 1

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    @property
    def rate(self) -> float:
        """Sequences a second."""
        return self.sequences / max(self.seconds, 1e-9)


def number(value: float | None) -> str:
    """Four significant digits or so; a dash for what is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def closing_block(run: str, summary: dict[str, Any]) -> str:
    """The last lines of a run: `---`, then a `key: value` line each."""
    values: dict[str, Any] = {"run": run, "epochs": summary["epochs"], "best_epoch": summary["best_epoch"]}
    for name in CLOSING_METRICS:
        values[name] = _number(summary["final"].get(name))
        if summary["untrained"]:
            values[f"untrained_{name}"] = _number(summary["untrained"].get(name))
    values["gate_pass"] = summary["gate_pass"]
    values["seconds"] = summary["timing"]["seconds"]
    values["sequences_per_second"] = summary["timing"]["sequences_per_second"]
    return "\n".join(["---", *(f"{key}: {_plain(value)}" for key, value in values.items())])


def _number(value: float | None) -> float:
    """A metric; files hold null where it is NaN."""
    return math.nan if value is None else value


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
