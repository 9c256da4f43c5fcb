"""Draws the newest results in bench/history and bench/records: throughput, where a step spends time, recipes."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

from common import HISTORY, command_line
from contenders import CONTENDERS
from matplotlib.figure import Figure
from records import RECORDS

from seqjepa.engine.reports.figures.curves import new_figure

FIGURES = Path(__file__).resolve().parent / "figures"


def newest(name: str) -> list[dict]:
    """The newest result of each machine, task and mode."""
    found = {}
    for path in sorted(HISTORY.glob(f"*-{name}-*.json")):
        stored = json.loads(path.read_text(encoding="utf-8"))
        machine = stored.get("machine") or stored["machine_info"]["gpu"] or stored["machine_info"]["cpu"]
        found[machine, stored.get("task"), stored.get("compile")] = stored | {"machine": machine}
    return list(found.values())


def _short(machine: str) -> str:
    """A machine's name, for an axis."""
    return machine.replace("(R)", "").replace("Processor", "").strip()[:28]


def throughput(reports: list[dict]) -> Figure:
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for report in reports:
        sizes = sorted(report["rates"], key=int)
        label = f"{report['task']}, {report['machine']}, {report['dtype']}, compile {report['compile']}"
        axes.plot([int(size) for size in sizes], [report["rates"][size] for size in sizes], "o-", label=label)
    axes.set(xscale="log", xlabel="batch", ylabel="training sequences a second")
    axes.set_ylim(bottom=0)
    known = sorted({int(size) for report in reports for size in report["rates"]})
    axes.set_xticks(known, [str(size) for size in known])
    axes.minorticks_off()
    axes.set_title("Throughput by batch")
    axes.legend(fontsize=7)
    return figure


def split(reports: list[dict]) -> Figure:
    figure = new_figure(7, 1.2 + 0.8 * len(reports))
    axes = figure.subplots()
    names = [name for name in reports[0]["parts"] if not name.startswith("(")]
    for row, report in enumerate(reports):
        left = 0.0
        for number, name in enumerate(names):
            share = 100 * report["parts"][name] / report["step_seconds"]
            axes.barh(row, share, left=left, color=f"C{number}", label=name if row == 0 else None)
            left += share
    axes.set_yticks(
        range(len(reports)), [f"{report['task']}\n{_short(report['machine'])}" for report in reports], fontsize=7
    )
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set(xlabel="% of a step's time; each part by itself, so that they need not add up to 100")
    axes.legend(fontsize=7, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def beside_peer(benches: list[dict]) -> Figure:
    steps = [
        (bench["machine"], row)
        for bench in benches
        for row in bench["benchmarks"]
        if row["name"].startswith("test_step")
    ]
    figure = new_figure(7, 1.2 + 0.7 * len(steps))
    axes = figure.subplots()
    for place, (_, row) in enumerate(steps):
        rates = row["extra_info"]["rates"]
        for offset, name, colour in ((0.2, "ours", "C0"), (-0.2, "the peer", "C7")):
            axes.barh(place + offset, rates[name], 0.38, color=colour, label=name if place == 0 else None)
        low, middle, high = row["extra_info"]["ratio"]["the peer"]
        axes.text(
            rates["ours"], place + 0.2, f"  {middle:.2f} ({low:.2f} to {high:.2f}) times", va="center", fontsize=8
        )
    labels = [f"{row['name'].split('[')[1].rstrip(']')}\n{_short(machine)}" for machine, row in steps]
    axes.set_yticks(range(len(steps)), labels, fontsize=7)
    axes.set_xlim(right=1.5 * max(row["extra_info"]["rates"]["ours"] for _, row in steps))
    axes.set(xlabel="training sequences a second, interleaved: medians; ratio with its 95 % interval")
    axes.legend(fontsize=7, loc="lower right")
    return figure


def contenders(results: dict, records: list[dict]) -> Figure:
    """Class and action against image passes: the mean over seeds, and bars from the lowest to the highest seed."""
    figure = new_figure(11, 5)
    panels = figure.subplots(1, 2)
    last = {name: max(found["passes"], key=int) for name, found in results.items()}
    order = sorted(results, key=lambda name: -fmean(results[name]["passes"][last[name]]["agg"]))
    row = next((row for row in reversed(records) if row["task"] == "cifar10_aug"), None)
    lengths = sorted({int(passes) for found in results.values() for passes in found["passes"]} - {0})
    lengths += [row["passes"]] if row else []
    for axes, measure, title in (
        (panels[0], "agg", "class from the aggregate of three views, %"),
        (panels[1], "R²", "R² of the action, from two views"),
    ):
        untrained = [value for found in results.values() for value in found["passes"]["0"][measure]]
        axes.axhspan(min(untrained), max(untrained), color="0.5", alpha=0.3, label="untrained (all seeds)")
        for number, name in enumerate(order):
            points = {int(passes): found[measure] for passes, found in results[name]["passes"].items() if int(passes)}
            style = {"color": f"C{number % 10}", "marker": "os^"[number // 10], "linewidth": 1.3, "markersize": 4}
            _with_range(axes, points, CONTENDERS[name].title, style)
        if row:
            for control, colour, marker in (
                ("trained", "black", "*"),
                ("shuffled", "black", "x"),
                ("frozen", "0.5", "v"),
            ):
                what = {"trained": "", "shuffled": ", actions of other images", "frozen": ", frozen encoder"}[control]
                style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 9}
                _with_range(axes, {row["passes"]: row["measures"][control][measure]}, f"{row['recipe']}{what}", style)
        axes.set(xscale="log", xlabel="images passed through the encoder", title=title)
        shown = [length for length in lengths if length != 75_000]  # its label would touch the next
        axes.set_xticks(shown, [f"{length / 1000:g}k" for length in shown])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right upper",
        fontsize=8,
        title="best first in class; action: inferred from two views",
    )
    return figure


def _with_range(axes, points: dict[int, list[float]], label: str, style: dict) -> None:
    at = sorted(points)
    means = [fmean(points[x]) for x in at]
    spread = [[m - min(points[x]) for x, m in zip(at, means, strict=True)]]
    spread.append([max(points[x]) - m for x, m in zip(at, means, strict=True)])
    axes.errorbar(at, means, spread, label=label, capsize=2, elinewidth=0.8, **style)


def main() -> None:
    command_line(__doc__).parse_args()
    FIGURES.mkdir(exist_ok=True)
    reports, benches = newest("report"), newest("bench")
    for name, draw, results in (
        ("throughput", throughput, reports),
        ("time_split", split, reports),
        ("peer", beside_peer, benches),
    ):
        if not results:
            print(f"bench/history has no results for {name}")
            continue
        figure = draw(results)
        figure.savefig(FIGURES / f"{name}.png", dpi=120, bbox_inches="tight")
        print(f"bench/figures/{name}.png")
    stored = [RECORDS / name for name in ("contenders.json", "records.json")]
    if all(path.exists() for path in stored):
        figure = contenders(*(json.loads(path.read_text(encoding="utf-8")) for path in stored))
        figure.savefig(FIGURES / "contenders.png", dpi=120)
        print("bench/figures/contenders.png")


if __name__ == "__main__":
    main()
