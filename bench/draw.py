"""Draws the newest results in bench/history: throughput by batch, where a step's time goes, and the peer."""

from __future__ import annotations

import json
from pathlib import Path

from common import HISTORY, command_line
from matplotlib.figure import Figure

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


if __name__ == "__main__":
    main()
