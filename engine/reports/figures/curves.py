"""The curves of a run as a PNG, beside its untrained control; and functions that all figures share."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from ...analysis.metrics import METRICS, PANELS


def new_figure(width: float, height: float):
    """An empty figure, in inches, that needs no display and leaves pyplot's global state unchanged."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def epoch_axis(axes, epochs: Collection[int]) -> None:
    """An x axis from the first to the last epoch, with ticks at whole epochs even if there is only one."""
    from matplotlib.ticker import MaxNLocator

    first, last = min(epochs, default=1), max(epochs, default=1)
    margin = max(0.5, 0.05 * (last - first))
    axes.set(xlabel="epoch", xlim=(first - margin, last + margin))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def draw_curves(
    rows: list[dict[str, Any]], untrained: dict[str, float] | None, path: Path, largest_class: float | None = None
) -> None:
    """Draw the lines of metrics.jsonl as a PNG, in those of `PANELS` for which there is a metric.

    The untrained control, if it was run, is dashed; the percent of images that are of the largest class is dotted.
    """
    computed = {name for row in rows for name in row}
    panels: dict[str, dict[str, str]] = {panel: {} for panel in PANELS}  # labels of the curves by name
    for metric in METRICS:
        if metric.panel and (metric.name in computed or not rows):
            both = {metric.train or "": "train", metric.name: "test"}
            panels[metric.panel] |= {metric.name: metric.label} if metric.label else both
    drawn = [panel for panel, curves in panels.items() if curves]
    figure = new_figure(10, 6.4)
    places = figure.subplots(2, 2).ravel()
    for axes in places[len(drawn) :]:
        axes.set_axis_off()
    for axes, panel in zip(places, drawn, strict=False):
        for number, (name, label) in enumerate(panels[panel].items()):
            points = [(row["epoch"], row[name]) for row in rows if row.get(name) is not None]
            if points:
                marker = "o" if len(points) < 20 else None
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, marker=marker, markersize=4)
            if untrained and untrained.get(name) is not None:
                style = {"color": f"C{number}", "linestyle": "--", "linewidth": 1}
                axes.axhline(untrained[name], label=f"{label}, untrained", **style)
        if panel == "class" and largest_class is not None and axes.has_data():
            axes.axhline(largest_class, label="largest class", color="0.2", linestyle=":", linewidth=1.5)
        axes.set_title(PANELS[panel], fontsize=10)
        epoch_axis(axes, [row["epoch"] for row in rows])
        axes.grid(alpha=0.3)
        if axes.has_data():
            axes.legend(fontsize=8)
        else:
            axes.text(0.5, 0.5, "no finite value", ha="center", transform=axes.transAxes, color="0.4")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
