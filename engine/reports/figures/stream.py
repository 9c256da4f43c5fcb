"""A stream of tasks as a figure: the scores on each task after each, how they change on the way, and drift."""

import math
from pathlib import Path
from typing import Any

from .curves import new_figure

TITLES = {
    "cosine": "cosine of centred prediction and target",
    "class": "class from the aggregate, %",
    "own_class": "the same among a task's own classes, %",
    "r2": "R² of the factors of a task",
}


def draw_stream(summary: dict[str, Any], path: Path) -> None:
    """Draw a heat map for each measure, with the untrained network as its first row, and curves beside it.

    Below are the likeness of features to those of the time when their task had just been learnt, and the traces.
    """
    tasks, measures = [_short(task) for task in summary["tasks"]], summary["measures"]
    if not measures:
        return
    figure = new_figure(9.6, 3.1 * (len(measures) + 1))
    *places, (left, right) = figure.subplots(len(measures) + 1, 2, squeeze=False)
    for (measure, found), (heat, curves) in zip(measures.items(), places, strict=True):
        rows = [found["untrained"], *found["matrix"]]
        _heat(heat, TITLES[measure], rows, tasks, ["untrained", *(f"after {i}" for i in range(1, len(rows)))])
        for j, task in enumerate(tasks):
            curves.plot(range(len(rows)), [row[j] for row in rows], "o-", markersize=4, label=task)
            if j + 1 < len(rows):
                curves.plot(j + 1, rows[j + 1][j], "k*", markersize=9)
        curves.set(xlabel="tasks learnt; star: the task itself", xticks=range(len(rows)))
        curves.grid(alpha=0.3)
        curves.legend(fontsize=7)
    cka, earlier = summary["drift"]["cka"], tasks[:-1]
    rows = [cka["untrained"][:-1], *cka["rows"][1:]]
    names = ["untrained", *(f"after {i}" for i in range(2, len(rows) + 1))]
    padded = [[*row, *[math.nan] * len(earlier)][: len(earlier)] for row in rows]
    _heat(left, "likeness (CKA) of z to z when the task had been learnt", padded, earlier, names)
    _traces(right, summary["traces"], tasks)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _heat(axes: Any, title: str, rows: list[list[float | None]], columns: list[str], names: list[str]) -> None:
    """A matrix with its numbers; what is not a number is left blank."""
    values = [[math.nan if value is None else value for value in row] for row in rows]
    known = [value for row in values for value in row if not math.isnan(value)]
    axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_title(title, fontsize=9)
    if not known:
        return
    middle, digits = (min(known) + max(known)) / 2, 1 if max(known) > 2 else 2
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            if not math.isnan(value):
                color = "w" if value < middle else "k"
                axes.text(j, i, f"{value:.{digits}f}", ha="center", va="center", fontsize=8, color=color)


def _traces(axes: Any, traces: dict[int, list[list[float]]], tasks: list[str]) -> None:
    """The cosine of each earlier task while the later ones are learnt, with a line where a task begins."""
    axes.set_title("cosine of the earlier tasks while the next is learnt", fontsize=9)
    begun, points = 0.0, [([], []) for _ in tasks[:-1]]
    for rows in traces.values():
        axes.axvline(begun, color="0.6", linewidth=0.8, linestyle=":")
        for step, *cosines in rows:
            for (steps, values), cosine in zip(points, cosines, strict=False):  # later tasks have none yet
                steps.append(begun + step)
                values.append(cosine)
        begun += rows[-1][0]
    for (steps, cosines), task in zip(points, tasks, strict=False):
        axes.plot(steps, cosines, ".-", markersize=4, label=task)
    axes.set_xlabel("steps since the first task ended")
    axes.grid(alpha=0.3)
    if traces:
        axes.legend(fontsize=7)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
