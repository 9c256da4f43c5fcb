"""Figures of an evaluation: accuracy against length, R² by factor, training length by evaluation length."""

import math
from pathlib import Path
from typing import Any

from .curves import new_figure


def draw_lengths(result: dict[str, Any], protocols: list[str], path: Path) -> None:
    """Draw top-1 on agg against the number of observed views, the untrained control dashed."""
    figure = new_figure(7.2, 3.6)
    axes = figure.subplots()
    lengths = result["lengths"]
    for number, protocol in enumerate(protocols):
        for network, style in (("trained", "-"), ("untrained", "--")):
            scores = result[protocol][network]
            values = [scores[f"agg_top1_{length}"] for length in lengths]
            color, title = f"C{number}", f"{network}, {protocol}"
            axes.plot(lengths, values, style, color=color, marker="o", markersize=4, label=f"agg, {title}")
            # z of the clean image, which the aggregate has to beat
            axes.axhline(scores["z_top1"], linestyle=style, linewidth=1, color=color, alpha=0.4, label=f"z, {title}")
    axes.axvline(result["num_observed"], color="0.8", zorder=0)
    axes.annotate("trained on", (result["num_observed"], 1), xycoords=("data", "axes fraction"), fontsize=7, va="top")
    axes.set(xlabel="observed views", ylabel="top-1, %", title="Class from the aggregate", xticks=lengths)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7)
    figure.savefig(path, dpi=120)


def draw_factors(result: dict[str, Any], protocols: list[str], path: Path) -> None:
    """Draw R² of each factor from a pair of z, and from the aggregate, beside the untrained control."""
    figure = new_figure(5.2, 3.0 * len(protocols) + 0.3)
    for axes, protocol in zip(figure.subplots(len(protocols), squeeze=False)[:, 0], protocols, strict=True):
        factors = [f for f in result["factors"] if not math.isnan(result[protocol]["trained"][f"z_r2_{f}"])]
        bars = [(f"{feature}_r2", network) for feature in ("z", "agg") for network in ("trained", "untrained")]
        length = result["leakage_length"]
        labels = {"z_r2": "pair of z", "agg_r2": f"agg of {length}" + (" (given the action)" if length > 1 else "")}
        for number, (name, network) in enumerate(bars):
            values = [result[protocol][network][f"{name}_{factor}"] for factor in factors]
            places = [place + 0.2 * (number - 1.5) for place in range(len(factors))]
            style = {"color": f"C{number // 2}", "alpha": 1.0 if network == "trained" else 0.35}
            axes.bar(places, values, 0.19, label=f"{labels[name]}, {network}", **style)
        axes.axhline(0, color="0.3", linewidth=0.8)
        axes.set_xticks(range(len(factors)), factors)
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -0.5), top=1.02)
        axes.set(ylabel="R²", title=f"Action from frozen features, {protocol} protocol")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)


def draw_grid(grid: dict[int, dict[int, Any]], protocol: str, path: Path) -> None:
    """Draw a heat map of top-1 on agg: training length across, evaluation length down (as a figure of seq-JEPA).

    `grid` has the accuracies by training length, then evaluation length; below each stands its margin over the control.
    """
    lengths = sorted({length for row in grid.values() for length in row})
    values = [[row[n].trained if n in row else math.nan for row in grid.values()] for n in lengths]
    figure = new_figure(2.6 + 0.9 * len(grid), 1.4 + 0.5 * len(lengths))
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    known = [value for row in values for value in row if not math.isnan(value)]
    middle = (min(known) + max(known)) / 2
    for column, row in enumerate(grid.values()):
        for length, cell in row.items():
            shown = f"{cell.trained:.1f}\n({cell.trained - cell.untrained:+.1f})"
            colour = "w" if cell.trained < middle else "k"
            axes.text(column, lengths.index(length), shown, ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(grid)), map(str, grid))
    axes.set_yticks(range(len(lengths)), map(str, lengths))
    axes.set(xlabel="views in training", ylabel="views in evaluation")
    axes.set_title(f"Top-1 on agg, %, {protocol} protocol\n(margin over untrained)", fontsize=9)
    figure.colorbar(image)
    figure.savefig(path, dpi=120)
