"""Writes the results of an evaluation (eval.json, a table, figures), and compares evaluations."""

import math
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from scipy.stats import kendalltau

from ...configs.files import to_json, write_atomically
from ..reports.console import Reporter, table
from ..reports.figures.evaluation import draw_factors, draw_grid, draw_lengths
from .protocols import PROTOCOLS

NETWORKS = ("trained", "untrained")
AGREEING = ("fast", "paper")  # protocols whose rankings are compared
FEW = 6  # with fewer checkpoints a rank correlation says little


class Cell(NamedTuple):
    """Top-1 on agg at one training length and one evaluation length: the mean over runs."""

    trained: float
    untrained: float
    runs: int


def write(result: dict[str, Any], folder: Path, reporter: Reporter) -> None:
    """Write an evaluation's files to `folder` and print its table."""
    write_atomically(folder / "eval.json", to_json(result, indent=1) + "\n")
    protocols = [name for name in PROTOCOLS if name in result]
    names = dict.fromkeys(name for protocol in protocols for name in result[protocol]["trained"])
    figures = {"lengths.png": draw_lengths} if "z_top1" in names else {}
    figures |= {"factors.png": draw_factors} if result["factors"] else {}
    for name, draw in figures.items():
        draw(result, protocols, folder / name)
    pairs = [(protocol, network) for protocol in protocols for network in NETWORKS]
    headings = ["metric", *(f"{p}, {n}" if len(protocols) > 1 else n for p, n in pairs)]
    rows = [[name, *(result[p][n].get(name) for p, n in pairs)] for name in names]
    if result["largest_class"] is not None:
        rows.append(
            ["largest_class", *(result["largest_class"] for _ in pairs)]
        )  # accuracy of always guessing it, in percent
    reporter.say(table(f"frozen probes, {result['checkpoint']}", headings, rows))
    seconds = sum(value for name, value in result["timing"].items() if name.endswith("_seconds"))
    reporter.say(f"{', '.join([str(folder / 'eval.json'), *figures])}; {seconds:.0f} s")


def compare(results: list[dict[str, Any]], folder: Path, reporter: Reporter) -> None:
    """Compare evaluations of one task that have a protocol in common: the grid of lengths, do the protocols agree?

    Prints tables, and writes comparison.json and, if the task has classes, lengths_grid.png to `folder`.
    """
    protocol = next(name for name in reversed(PROTOCOLS) if all(name in result for result in results))
    comparison: dict[str, Any] = {"checkpoints": [result["checkpoint"] for result in results], "protocol": protocol}
    files = [str(folder / "comparison.json")]
    if grid := length_grid(results, protocol):
        comparison["agg_top1"] = {
            trained: {length: cell._asdict() for length, cell in row.items()} for trained, row in grid.items()
        }
        headings = ["views in evaluation"]
        for trained, row in grid.items():
            headings += [f"trained on {trained} (n = {max(cell.runs for cell in row.values())})", "untrained"]
        rows = []
        for length in sorted({length for row in grid.values() for length in row}):
            cells = [row.get(length, (None, None)) for row in grid.values()]
            rows.append([str(length), *(value for cell in cells for value in cell[:2])])
        reporter.say(table(f"top-1 on agg, {protocol} protocol, newest checkpoint of each run", headings, rows))
        draw_grid(grid, protocol, folder / "lengths_grid.png")
        files.append("lengths_grid.png")
    if agreeing := agreement(results):
        rows = [[name, row["tau"], row["p"], str(row["n"])] for name, row in agreeing.items()]
        title = "do the fast and the paper protocol rank checkpoints alike?"
        reporter.say(table(title, ["metric", "Kendall's tau", "p", "checkpoints"], rows))
        if len(results) < FEW:
            reporter.say(f"{len(results)} checkpoints are too few to tell: at least {FEW} are needed")
    comparison["agreement"] = agreeing
    write_atomically(folder / "comparison.json", to_json(comparison, indent=1) + "\n")
    reporter.say(", ".join(files))


def length_grid(results: list[dict[str, Any]], protocol: str) -> dict[int, dict[int, Cell]]:
    """Top-1 on agg by training length, then evaluation length, from the newest checkpoint of each run.

    Empty if the task has no classes.
    """
    newest: dict[str, dict[str, Any]] = {}
    for result in results:
        run = str(Path(result["checkpoint"]).parent)
        if run not in newest or result["epoch"] > newest[run]["epoch"]:
            newest[run] = result
    grid: dict[int, dict[int, Cell]] = {}
    for trained in sorted({result["num_observed"] for result in newest.values()}):
        alike = [result for result in newest.values() if result["num_observed"] == trained]
        for length in dict.fromkeys(length for result in alike for length in result["lengths"]):
            name = f"agg_top1_{length}"
            found = [result[protocol] for result in alike if name in result[protocol]["trained"]]
            if found:
                top1 = {network: mean(scores[network][name] for scores in found) for network in NETWORKS}
                grid.setdefault(trained, {})[length] = Cell(**top1, runs=len(found))
    return grid


def agreement(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Kendall's tau between `AGREEING` for each metric; empty unless two checkpoints have both."""
    both = [result for result in results if all(protocol in result for protocol in AGREEING)]
    if len(both) < 2:
        return {}
    rows = {}
    for name in both[0]["paper"]["trained"]:
        pairs = [tuple(result[protocol]["trained"].get(name, math.nan) for protocol in AGREEING) for result in both]
        pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
        if len(pairs) > 1:
            found: Any = kendalltau(*zip(*pairs, strict=True))
            rows[name] = {"tau": float(found.statistic), "p": float(found.pvalue), "n": len(pairs)}
    return rows
