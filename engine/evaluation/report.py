"""Writes the results of an evaluation (eval.json, a table, figures) and compares several."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.table import Table
from scipy.stats import kendalltau

from ...configs.errors import InputError
from ...configs.files import to_json, write_atomically
from ..reports.console import Reporter, number
from ..reports.figures.evaluation import draw_factors, draw_grid, draw_lengths
from .protocols import PROTOCOLS

__all__ = ["Cell", "agreement", "check_comparable", "compare", "length_grid", "make_folder", "table", "write"]

NETWORKS = ("trained", "untrained")
FEW = 6  # with fewer checkpoints a rank correlation says little


class Cell(NamedTuple):
    """Top-1 on agg at one training length and one evaluation length, averaged over the runs that have both."""

    trained: float
    untrained: float
    runs: int


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        InputError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def check_comparable(cases: list[Any]) -> None:
    """Refuse to compare checkpoints of different tasks, or without a common protocol.

    Raises:
        InputError: names two such checkpoints.
    """
    first = cases[0]
    for case in cases[1:]:
        if case.config.data.name != first.config.data.name:
            names = f"{first.config.data.name} and {case.config.data.name}"
            raise InputError(f"{first.checkpoint} and {case.checkpoint} are of {names}; compare runs of one task")
        if not set(case.protocols) & set(first.protocols):
            raise InputError(f"{first.checkpoint} and {case.checkpoint} have no protocol in common; set eval.protocol")


def write(result: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    """Write an evaluation's files to `folder` and print its table."""
    write_atomically(folder / "eval.json", to_json(result, indent=1) + "\n")
    draw_lengths(result, folder / "lengths.png")
    draw_factors(result, folder / "factors.png")
    protocols = [name for name in PROTOCOLS if name in result]
    pairs = [(protocol, network) for protocol in protocols for network in NETWORKS]
    headings = ["metric", *(f"{p}, {n}" if len(protocols) > 1 else n for p, n in pairs)]
    names = dict.fromkeys(name for protocol in protocols for name in result[protocol]["trained"])
    rows = [[name, *(number(result[p][n].get(name)) for p, n in pairs)] for name in names]
    reporter.say(table(f"frozen probes, {result['checkpoint']}", headings, rows))
    seconds = sum(value for name, value in result["timing"].items() if name.endswith("_seconds"))
    reporter.say(f"{folder / 'eval.json'}, lengths.png, factors.png; {seconds:.0f} s")


def compare(results: list[dict[str, Any]], folder: Path, reporter: Reporter) -> None:
    """Write and print a comparison of several evaluations: the grid of lengths, and whether the protocols agree.

    Args:
        results: results of runs of one task that have a protocol in common.
        folder: receives comparison.json and lengths_grid.png.
        reporter: prints the tables.
    """
    protocol = next(name for name in reversed(PROTOCOLS) if all(name in result for result in results))
    grid = length_grid(results, protocol)
    lengths = sorted({length for row in grid.values() for length in row})
    headings = ["views in evaluation"]
    for trained, row in grid.items():
        runs = max(cell.runs for cell in row.values())
        headings += [f"trained on {trained} (n = {runs})", "untrained"]
    rows = []
    for length in lengths:
        cells = [row.get(length) for row in grid.values()]
        shown = [value for cell in cells for value in ((cell.trained, cell.untrained) if cell else (None, None))]
        rows.append([str(length), *map(number, shown)])
    reporter.say(table(f"top-1 on agg, {protocol} protocol, newest checkpoint of each run", headings, rows))
    comparison: dict[str, Any] = {
        "checkpoints": [result["checkpoint"] for result in results],
        "protocol": protocol,
        "agg_top1": {trained: {n: cell._asdict() for n, cell in row.items()} for trained, row in grid.items()},
        "agreement": agreement(results),
    }
    if agreeing := comparison["agreement"]:
        rows = [[name, number(row["tau"]), number(row["p"]), str(row["n"])] for name, row in agreeing.items()]
        title = "do the fast and the paper protocol rank checkpoints alike?"
        reporter.say(table(title, ["metric", "Kendall's tau", "p", "checkpoints"], rows))
        if len(results) < FEW:
            reporter.say(f"{len(results)} checkpoints are too few to tell: at least {FEW} are needed")
    write_atomically(folder / "comparison.json", to_json(comparison, indent=1) + "\n")
    draw_grid(grid, protocol, folder / "lengths_grid.png")
    reporter.say(f"{folder / 'comparison.json'}, lengths_grid.png")


def table(title: str, headings: list[str], rows: list[list[str]]) -> Table:
    """A table whose first column names the rows."""
    shown = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for place, heading in enumerate(headings):
        shown.add_column(heading, justify="right" if place else "left", no_wrap=not place)
    for row in rows:
        shown.add_row(*row)
    return shown


def length_grid(results: list[dict[str, Any]], protocol: str) -> dict[int, dict[int, Cell]]:
    """Top-1 on agg by training length, then evaluation length, from the newest checkpoint of each run."""
    newest: dict[str, dict[str, Any]] = {}
    for result in results:
        run = str(Path(result["checkpoint"]).parent)
        if run not in newest or result["epoch"] > newest[run]["epoch"]:
            newest[run] = result
    found: dict[int, dict[int, list[dict[str, Any]]]] = {}
    for result in sorted(newest.values(), key=lambda result: result["num_observed"]):
        for length in result["lengths"]:
            found.setdefault(result["num_observed"], {}).setdefault(length, []).append(result[protocol])
    return {
        trained: {
            length: Cell(*(mean(run[network][f"agg_top1_{length}"] for run in runs) for network in NETWORKS), len(runs))
            for length, runs in row.items()
        }
        for trained, row in found.items()
    }


def agreement(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Kendall's tau between the two protocols, for each metric; empty unless two checkpoints have both protocols."""
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
