"""What an evaluation leaves: eval.json, a table, and figures; and how several compare."""

from __future__ import annotations

import math
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table
from scipy.stats import kendalltau

from seqjepa.engine.console import Reporter, number
from seqjepa.engine.evaluation_figures import draw_factors, draw_grid, draw_lengths
from seqjepa.engine.records import to_json, write_atomically
from seqjepa.loaders import InputError

__all__ = ["agreement", "compare", "length_grid", "write"]

PROTOCOLS = ("fast", "paper")


def write(result: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    """Write an evaluation's files to `folder` and print its table.

    Raises:
        InputError: they cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "eval.json", to_json(result, indent=1) + "\n")
        draw_lengths(result, folder / "lengths.png")
        draw_factors(result, folder / "factors.png")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    protocols = [name for name in PROTOCOLS if name in result]
    table = Table(title=f"frozen probes, {result['checkpoint']}", title_justify="left", box=None, pad_edge=False)
    table.add_column("metric", no_wrap=True)
    for protocol in protocols:
        for network in ("trained", "untrained"):
            table.add_column(f"{protocol}, {network}" if len(protocols) > 1 else network, justify="right")
    for name in dict.fromkeys(name for protocol in protocols for name in result[protocol]["trained"]):
        answers = [
            result[protocol][network].get(name) for protocol in protocols for network in ("trained", "untrained")
        ]
        table.add_row(name, *map(number, answers))
    reporter.console.print(table)
    seconds = sum(value for name, value in result["timing"].items() if name.endswith("_seconds"))
    reporter.say(f"{folder / 'eval.json'}, lengths.png, factors.png; {seconds:.0f} s")


def compare(results: list[dict[str, Any]], folder: Path, reporter: Reporter) -> None:
    """Write and print what several evaluations say together: the grid of lengths, and whether the protocols agree."""
    protocol = next(name for name in ("paper", "fast") if all(name in result for result in results))
    grid = length_grid(results, protocol)
    comparison: dict[str, Any] = {
        "checkpoints": [result["checkpoint"] for result in results],
        "protocol": protocol,
        "agg_top1": grid,
    }
    table = Table(title=f"top-1 on agg, {protocol} protocol", title_justify="left", box=None, pad_edge=False)
    table.add_column("views in evaluation")
    for trained in grid:
        table.add_column(f"trained on {trained}", justify="right")
    lengths = sorted({length for row in grid.values() for length in row})
    for length in lengths:
        table.add_row(str(length), *(number(row.get(length)) for row in grid.values()))
    reporter.console.print(table)
    agreeing = agreement(results)
    if agreeing:
        comparison["agreement"] = agreeing
        table = Table(title="do the fast and the paper protocol rank alike?", title_justify="left", box=None)
        for heading in ("metric", "Kendall's tau", "p", "checkpoints"):
            table.add_column(heading, justify="left" if heading == "metric" else "right")
        for name, row in agreeing.items():
            table.add_row(name, number(row["tau"]), number(row["p"]), str(row["n"]))
        reporter.console.print(table)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "comparison.json", to_json(comparison, indent=1) + "\n")
        draw_grid(grid, protocol, folder / "lengths_grid.png")
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    reporter.say(f"{folder / 'comparison.json'}, lengths_grid.png")


def length_grid(results: list[dict[str, Any]], protocol: str) -> dict[int, dict[int, float]]:
    """Top-1 on agg by training length, then evaluation length; the mean where several runs share both."""
    grid: dict[int, dict[int, float]] = {}
    by_length = sorted(results, key=lambda result: result["num_observed"])
    for trained, runs in groupby(by_length, key=lambda result: result["num_observed"]):
        runs = list(runs)
        lengths = sorted(set.intersection(*(set(run["lengths"]) for run in runs)))
        grid[trained] = {n: mean(run[protocol]["trained"][f"agg_top1_{n}"] for run in runs) for n in lengths}
    return grid


def agreement(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Kendall's tau between the protocols over the checkpoints, for each metric that both have; {} without both."""
    both = [result for result in results if all(protocol in result for protocol in PROTOCOLS)]
    if len(both) < 2:
        return {}
    rows = {}
    for name in both[0]["paper"]["trained"]:
        pairs = [tuple(result[protocol]["trained"].get(name, math.nan) for protocol in PROTOCOLS) for result in both]
        pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
        if len(pairs) > 1:
            found = kendalltau(*zip(*pairs, strict=True))
            rows[name] = {"tau": float(found.statistic), "p": float(found.pvalue), "n": len(pairs)}
    return rows
