"""The curves of a run as a PNG, each beside its untrained control."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

__all__ = ["draw_curves", "epoch_axis", "new_figure"]

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


def epoch_axis(axes, epochs: Collection[int]) -> None:
    """Whole epochs below, from the first to the last of them, be there many or one."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(epochs, default=1), max(epochs, default=1)
    margin = max(0.5, 0.05 * (last - first))
    axes.set(xlabel="epoch", xlim=(first - margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_curves(rows: list[dict[str, Any]], untrained: dict[str, float] | None, path: Path) -> None:
    """Draw metrics over epochs.

    Args:
        rows: lines of metrics.jsonl.
        untrained: metrics of the control, drawn dashed.
        path: of the PNG.
    """
    figure = new_figure(10, 6.4)
    for axes, (title, names, labels) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for number, (name, label) in enumerate(zip(names, labels, strict=True)):
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=f"C{number}",
                    label=label,
                    marker="o" if len(points) < 20 else None,
                    markersize=4,
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
        epoch_axis(axes, [row["epoch"] for row in rows])
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
