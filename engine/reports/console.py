"""Console output: a progress bar on a terminal, a table after each validated epoch, and the last lines of a run."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..analysis.metrics import METRICS


class _Console(Console):
    """Goes quiet when its pipe is closed, so that the run continues."""

    def on_broken_pipe(self) -> None:
        with contextlib.suppress(SystemExit):
            super().on_broken_pipe()


class Reporter:
    """Prints lines, tables and progress if it speaks, as the main process's does; the bar is shown on a terminal."""

    def __init__(self, speaks: bool):
        # names are printed unchanged: brackets and colons in them are not markup
        self.console = _Console(quiet=not speaks, highlight=False, soft_wrap=True, markup=False, emoji=False)
        left = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        right = TextColumn("{task.fields[status]}"), TextColumn("ETA"), TimeRemainingColumn()
        shows_bar = speaks and self.console.is_terminal
        self.progress = Progress(*left, *right, console=self.console, disable=not shows_bar, transient=True)
        self.task = self.progress.add_task("starting", total=None, status="")

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        with self._output_may_fail():
            self.progress.stop()

    @contextlib.contextmanager
    def _output_may_fail(self) -> Iterator[None]:
        """A terminal that is gone or a log on a full disk is no reason for a run to end."""
        try:
            yield
        except OSError:
            self.console.on_broken_pipe()

    def say(self, what: str | Table) -> None:
        """Print a line or a table."""
        if isinstance(what, Table):  # full width, however narrow the console: a truncated number is useless
            what.width = self.console.measure(what, options=self.console.options.update(width=1000)).maximum
        with self._output_may_fail():
            self.console.print(what)

    def advance(
        self, description: str = "", amount: int = 1, *, total: int | None = None, status: str | None = None
    ) -> None:
        """Move the bar by `amount`; with `total`, start a new bar at `amount` of `total`."""
        with self._output_may_fail():
            if total is not None:
                self.progress.reset(self.task, total=total, completed=amount, description=description, status="")
            else:
                fields: dict[str, Any] = {} if status is None else {"status": status}
                self.progress.update(self.task, advance=amount, **fields)

    def epoch(self, title: str, metrics: dict[str, float], untrained: dict[str, float] | None) -> None:
        """Print the table of a validated epoch: each metric in training, on the test sequences, and untrained."""
        control, rows = untrained or {}, []
        for metric in METRICS:
            if metric.title and metric.name in metrics:
                train = metrics.get(metric.train) if metric.train else ""
                rows.append([metric.title, train, metrics[metric.name], control.get(metric.name)])
        self.say(table(title, ["metric", "train", "test", "untrained"], rows))


def table(title: str, headings: list[str], rows: list[list[Any]]) -> Table:
    """A table whose first column names the rows; what is no text is written as a `number`."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        shown.add_row(*(cell if isinstance(cell, str) else number(cell) for cell in row))
    return shown


def number(value: float | None) -> str:
    """About four significant digits; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"


def closing_block(run: str, summary: dict[str, Any]) -> str:
    """The last lines of a run: `---`, then a `key: value` line each."""
    values: dict[str, Any] = {"run": run, "epochs": summary["epochs"], "best_epoch": summary["best_epoch"]}
    for name in (metric.name for metric in METRICS if metric.closing and metric.name in summary["final"]):
        values[name] = summary["final"][name]
        if name in (summary["untrained"] or ()):
            values[f"untrained_{name}"] = summary["untrained"][name]
    if "online_linacc_test" in values and summary["largest_class"] is not None:
        values["largest_class"] = summary["largest_class"]  # accuracy of always guessing it, in percent
    values = {name: math.nan if value is None else value for name, value in values.items()}  # which files hold as null
    values["gate_pass"] = summary["gate_pass"]
    values |= {name: summary["timing"][name] for name in ("seconds", "sequences_per_second")}
    shown = (f"{key}: {value:.6g}" if isinstance(value, float) else f"{key}: {value}" for key, value in values.items())
    return "\n".join(["---", *shown])
