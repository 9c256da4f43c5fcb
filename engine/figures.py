"""The curves of a run as a PNG, each beside its untrained control."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["draw_curves", "new_figure"]

PANELS = (
    ("Loss", ("ep_loss", "val_loss"), ("train", "test")),
    ("Cosine of centred prediction and target", ("pred_cosine_centred_test",), ("test",)),
    ("R² of the action", ("online_r2_test", "leakage_r2_test"), ("z pair, MLP", "agg, linear")),
    ("Linear accuracy, %", ("online_linacc_test", "leakage_linacc_test"), ("agg", "first view")),
)


def new_figure(width: float, height: float):
    """An empty figure of so many inches, that needs no display and leaves pyplot's global state alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def draw_curves(rows: list[dict[str, Any]], untrained: dict[str, float] | None, path: Path) -> None:
    """Draw metrics over epochs.

    Args:
        rows: lines of metrics.jsonl.
        untrained: metrics of the control, drawn dashed.
        path: of the PNG.
    """
    from matplotlib.ticker import MaxNLocator

    figure = new_figure(10, 6.4)
    for axes, (title, names, labels) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    label=label,
                    marker="." if len(points) < 20 else None,
                )
            # the untrained loss, near 1, would flatten the others
            if untrained and untrained.get(name) is not None and "loss" not in name:
                axes.axhline(
                    untrained[name],
                    color=f"C{number}",
                    linestyle="--",
                    linewidth=1,
                    label=f"{label}, untrained",
                )
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
