"""What each term of the objective does over the epochs, as a PNG: losses, shares, gradients, ranks, codes."""

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from .curves import epoch_axis, new_figure


class Panel(NamedTuple):
    """A panel of the figure, and the metrics that it shows, by a pattern whose group is the label of a curve."""

    title: str
    pattern: str
    scale: str = "linear"


PANELS = (
    Panel("Terms, training", r"loss_(\w+)", "symlog"),
    Panel("Share of the objective", r"share_(\w+)"),
    Panel("Norm of gradients: all weights, and of each term at z", r"(?:z_)?(grad_norm\w*)", "log"),
    Panel("Effective rank: test z and agg, and a batch's", r"(?:effective_rank_)?(z|agg|(?:prediction|target)_rank)"),
    Panel("Codes", r"codes_(\w+)"),
)


def _is_number(value: float | None) -> bool:
    """False for None and NaN, which stand for what was not measured."""
    return value is not None and math.isfinite(value)


def draw_terms(rows: list[dict[str, Any]], untrained: dict[str, float] | None, path: Path) -> None:
    """Draw lines of metrics.jsonl in those of `PANELS` that have a metric; the untrained control is dashed."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    matched = [(panel, {n: m[1] for n in names if (m := re.fullmatch(panel.pattern, n))}) for panel in PANELS]
    shown = [(panel, curves) for panel, curves in matched if curves]
    columns = 2 if len(shown) <= 4 else 3
    figure = new_figure(5 * columns, 6.4)
    places = figure.subplots(2, columns).ravel()
    for axes in places[len(shown) :]:
        axes.set_axis_off()
    for axes, (panel, curves) in zip(places, shown, strict=False):
        for number, (name, label) in enumerate(curves.items()):
            points = [(row["epoch"], value) for row in rows if _is_number(value := row.get(name))]
            if points:
                marker = "o" if len(points) < 20 else None
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, marker=marker, markersize=3)
            if untrained and untrained.get(name) is not None:
                axes.axhline(untrained[name], color=f"C{number}", linestyle="--", linewidth=1)
        positive = [row[name] for row in rows for name in curves if (row.get(name) or 0) > 0]
        if panel.scale == "symlog" and positive:
            axes.set_yscale("symlog", linthresh=10.0 ** math.ceil(math.log10(max(min(positive), 1e-3))))
        elif panel.scale == "log" and positive:
            axes.set_yscale("log")
        axes.set_title(panel.title, fontsize=10)
        epoch_axis(axes, [row["epoch"] for row in rows])
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
