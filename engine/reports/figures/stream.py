"""A stream of tasks as a figure: the scores on each task after each, and how they change along the stream."""

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
    """Draw a heat map for each measure, with the untrained network as its first row, and curves beside it."""
    tasks, measures = summary["tasks"], summary["measures"]
    if not measures:
        return
    figure = new_figure(9.6, 3.1 * len(measures))
    for (measure, found), (heat, curves) in zip(
        measures.items(), figure.subplots(len(measures), 2, squeeze=False), strict=True
    ):
        rows = [found["untrained"], *found["matrix"]]
        heat.imshow(rows, aspect="auto", cmap="viridis")
        low, high = min(map(min, rows)), max(map(max, rows))
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                dark = value < (low + high) / 2
                text = f"{value:.1f}" if high > 2 else f"{value:.2f}"
                heat.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
        heat.set_xticks(range(len(tasks)), [_short(task) for task in tasks], fontsize=7)
        heat.set_yticks(range(len(rows)), ["untrained", *(f"after {i + 1}" for i in range(len(rows) - 1))], fontsize=7)
        heat.set_title(TITLES[measure], fontsize=9)
        for j, task in enumerate(tasks):
            curves.plot(range(len(rows)), [row[j] for row in rows], "o-", markersize=4, label=_short(task))
            if j + 1 < len(rows):
                curves.plot(j + 1, rows[j + 1][j], "k*", markersize=9)
        curves.set(xlabel="tasks learnt; star: the task itself", xticks=range(len(rows)))
        curves.grid(alpha=0.3)
        curves.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 3]}..."
