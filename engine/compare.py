"""Compares runs: `seqjepa compare runs/variants/quick/* --out results.md`.

Runs whose configs differ only in the seed share a row: the mean, and in brackets the standard deviation over seeds.
"""

import argparse
import json
import math
import os
import sys
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from ..configs.cli import DONE, command, parser_of
from ..configs.compose import read
from ..configs.errors import InputError, first_line, shown
from ..configs.files import write_atomically
from ..configs.migration import migrated
from ..configs.section import leaves
from .analysis.metrics import METRICS, better
from .config import ALSO_COMPARED, Config
from .reports.figures.curves import epoch_axis, new_figure
from .runs.metrics_file import read_rows

DEFAULT_METRICS = tuple(metric.name for metric in METRICS if metric.compared)


class RunSettings(BaseModel):
    seed: int
    name: str
    epochs: int


class ControlSettings(BaseModel):
    max_epochs: int


class Settings(BaseModel):
    """What the table needs of config.yaml, which holds other sections too."""

    model_config = ConfigDict(title="config.yaml", extra="allow")
    __pydantic_extra__: dict[str, dict[str, Any]]
    run: RunSettings
    control: ControlSettings


class Timing(BaseModel):
    seconds: float
    hardware: str


class Summary(BaseModel):
    """What the table needs of summary.json, which a run writes when it ends."""

    model_config = ConfigDict(title="summary.json")
    gate_pass: bool | None
    commit: str | None
    untrained: dict[str, float | None] | None
    timing: Timing


class Run(NamedTuple):
    """Contents of a run's folder."""

    path: Path
    config: dict[str, Any]
    rows: list[dict[str, Any]]  # lines of metrics.jsonl
    summary: dict[str, Any] | None  # None while it has not ended

    @property
    def seed(self) -> int:
        return self.config["run"]["seed"]

    @property
    def untrained(self) -> dict[str, float | None]:
        """Metrics of the untrained control; empty if the run has not ended or had no control."""
        return (self.summary or {}).get("untrained") or {}

    def final(self, metric: str) -> float:
        """Value in the last epoch that was validated; NaN if it was NaN or is missing."""
        value = next((row[metric] for row in reversed(self.rows) if metric in row), None)
        return math.nan if value is None else value

    def margin(self, metric: str) -> float:
        """Final value minus the untrained control's; NaN without a control."""
        value = self.untrained.get(metric)
        return math.nan if value is None else self.final(metric) - value

    def peak(self, metric: str) -> tuple[float, int]:
        """Best value, and its epoch."""
        known = [(row[metric], row["epoch"]) for row in self.rows if row.get(metric) is not None]
        best = min if better(metric) == "min" else max
        return best(known, key=lambda pair: pair[0], default=(math.nan, 0))

    @property
    def seconds(self) -> float:
        """What it took over all its starts; until it has ended, without what an interruption cut short."""
        if self.summary:
            return self.summary["timing"]["seconds"]
        return sum(row["timing"]["ep_time"] for row in self.rows)


class Group(NamedTuple):
    """Runs that differ only in the seed."""

    name: str
    runs: list[Run]


@command("no file was half written")
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code: 0 done, 2 bad input, 128 + signal when interrupted."""
    parser = parser_of("compare", __doc__)
    add_words(parser)
    args = parser.parse_args(argv)
    if args.out and args.out.suffix == ".png":
        raise InputError(f"--out {args.out}: must name the Markdown file; the figure is the .png beside it")
    if args.list:
        print(to_index([run for path in args.runs for run in find_runs(path)]), end="")
        return DONE
    runs = [read_run(path) for path in args.runs]
    for run in runs:
        if not run.rows:
            print(f"{run.path}: no epoch is complete; it is left out", file=sys.stderr)
    groups = group([run for run in runs if run.rows])
    if not groups:
        raise InputError("no run has a complete epoch")
    names = [found.name for found in groups]
    if args.against is not None and args.against not in names:
        raise InputError(f"--against {args.against}: there are {', '.join(names)}")
    known = {name for found in groups for run in found.runs for row in run.rows for name in row}
    metrics = args.metrics or [name for name in DEFAULT_METRICS if name in known] or list(DEFAULT_METRICS)
    if missing := [name for name in metrics if name not in known]:
        raise InputError(f"--metrics {missing[0]}: no run has it; there are {', '.join(sorted(known))}")
    text = to_markdown(groups, metrics, args.against)
    if args.out:
        figure = args.out.with_suffix(".png")
        text += f"\n![{' and '.join(metrics)} over the epochs]({figure.name})\n"
        try:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            draw(groups, metrics, figure)
            write_atomically(args.out, text)
        except OSError as error:
            raise InputError(f"{args.out}: cannot be written ({error.strerror})") from None
    print(text, end="")
    return DONE


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes."""
    parser.add_argument("--list", action="store_true", help="list the runs in these folders, and compare nothing")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--out", type=Path, help="Markdown file to write; a figure of the curves goes beside it")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help=f"default: {', '.join(DEFAULT_METRICS)}")
    parser.add_argument("--against", metavar="NAME", help="row to subtract from the others, seed by seed")


def find_runs(folder: Path) -> list[Run]:
    """The runs in a folder and in the folders in it, oldest first; a line on stderr names those that cannot be read.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise InputError(f"{shown(folder)}: no such folder")
    found = []
    # what begins with a dot, and what stands in a run, is none
    for where, names, files in os.walk(folder):
        names[:] = sorted(name for name in names if not name.startswith("."))
        if "config.yaml" in files:
            names.clear()
            try:
                found.append(read_run(Path(where)))
            except InputError as error:
                print(error, file=sys.stderr)
    if not found:
        raise InputError(f"{shown(folder)}: no run is in it")
    return sorted(found, key=lambda run: (run.path / "config.yaml").stat().st_mtime)


def to_index(runs: list[Run]) -> str:
    """A Markdown table with a line for each run: where it stands, its best metric beside the control, its gate."""
    rows = [["run", "task", "epochs", "metric", "last", "untrained", "gate", "hours", "commit"], ["---"] * 9]
    for run in runs:
        metric, task = (
            run.config.get(part, {}).get(key, "-") for part, key in (("eval", "best_metric"), ("data", "name"))
        )
        last, control = run.final(metric), run.untrained.get(metric)
        verdicts = {True: "passed", False: "failed", None: "none"}
        rows.append(
            [
                str(run.path),
                task,
                f"{run.rows[-1]['epoch'] if run.rows else 0} of {run.config['run']['epochs']}",
                metric,
                f"{last:.4g}",
                "-" if control is None else f"{control:.4g}",
                verdicts[run.summary["gate_pass"]] if run.summary else "not ended",
                f"{run.seconds / 3600:.2f}",
                (run.summary or {}).get("commit") or "-",
            ]
        )
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |\n" for row in rows)


def read_run(path: Path) -> Run:
    """Read a run's folder.

    Raises:
        InputError: it is not the folder of a run, or a file cannot be read or is damaged.
    """
    try:
        config = migrated(read((path / "config.yaml").read_text(encoding="utf-8"), Config))
        json.dumps(config, sort_keys=True)  # runs are grouped by this text
        Settings.model_validate(config, strict=True)
        summary = None
        if (path / "summary.json").exists():
            summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
            Summary.model_validate(summary, strict=True)
        run = Run(path, config, read_rows(path / "metrics.jsonl"), summary)
        _ = run.seconds  # a missing field should fail here
    except FileNotFoundError as error:
        hint = "`seqjepa compare --list FOLDER` lists the runs in a folder"
        raise InputError(f"{path}: not the folder of a run ({Path(error.filename).name} is missing); {hint}") from None
    except PermissionError as error:
        raise InputError(f"{shown(error.filename or path)}: cannot be read ({error.strerror})") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        kind = error.title if isinstance(error, ValidationError) else type(error).__name__
        raise InputError(f"{path}: not the folder of a run ({kind}: {first_line(error)})") from None
    return run


def group(runs: list[Run]) -> list[Group]:
    """Groups of runs with one config, in the order in which they were given, named after the run without its seed.

    Raises:
        InputError: two runs have one config and one seed.
    """
    found: dict[str, Group] = {}
    for run in runs:
        fields = leaves(run.config)
        compared = [name for name in fields if not Config.is_free(name) or name.startswith(ALSO_COMPARED)]
        key = json.dumps({name: fields[name] for name in compared if name != "run.seed"}, sort_keys=True)
        name = run.config["run"]["name"].removesuffix(f"-{run.seed}")
        taken = {other.name for other_key, other in found.items() if other_key != key}
        if key not in found:
            found[key] = Group(name if name not in taken else run.path.name, [])
        for other in found[key].runs:
            if run.seed == other.seed:
                both = f"{run.path} and {other.path} have one config and seed {run.seed}"
                raise InputError(f"{both}: give one of them; runs of other images are told apart by data.name")
        found[key].runs.append(run)
    return list(found.values())


def differences(one: Group, other: Group, metric: str) -> list[float]:
    """Final values of `one` minus those of `other`, for each seed with which both have ended, without NaN."""
    by_seed = {run.seed: run.final(metric) for run in other.runs if run.summary}
    found = [run.final(metric) - by_seed[run.seed] for run in one.runs if run.summary and run.seed in by_seed]
    return [difference for difference in found if not math.isnan(difference)]


def to_markdown(groups: list[Group], metrics: list[str], against: str | None = None) -> str:
    """The comparison as a Markdown table with a row for each group, and notes.

    Values of the group named `against` are subtracted from the others, seed by seed.
    """
    runs = [run for found in groups for run in found.runs]
    baseline = next((found for found in groups if found.name == against), None)
    headings = ["run", "seeds"]
    for metric in metrics:
        headings += [metric, "margin over untrained", "peak (epoch)"]
        headings += [f"minus {against}, same seeds"] if baseline else []
    rows = []
    # percentages have one decimal place, shares three
    places = {metric: 1 if any(abs(run.final(metric)) > 2 for run in runs) else 3 for metric in metrics}
    for found in groups:
        row = [found.name, ", ".join(str(run.seed) for run in found.runs)]
        for metric in metrics:
            peaks = [run.peak(metric) for run in found.runs]
            epochs = ", ".join(str(epoch) for _, epoch in peaks)
            row += [spread([run.final(metric) for run in found.runs], places[metric])]
            row += [spread([run.margin(metric) for run in found.runs], places[metric], signed=True)]
            row += [f"{spread([value for value, _ in peaks], places[metric])} ({epochs})"]
            if baseline:
                paired = [] if found is baseline else differences(found, baseline, metric)
                row += [f"{spread(paired, places[metric], signed=True)} (n = {len(paired)})" if paired else ""]
        hardware = sorted({run.summary["timing"]["hardware"] for run in found.runs if run.summary})
        rows.append([*row, _gate(found), f"{mean(run.seconds for run in found.runs):.0f}", "; ".join(hardware)])
    headings += ["gate", "seconds", "hardware"]
    cells = ([cell.replace("|", r"\|") for cell in row] for row in (headings, ["---"] * len(headings), *rows))
    lines = [f"| {' | '.join(row)} |" for row in cells]
    notes = "Final epoch; mean, and in brackets the standard deviation over seeds; n where some have no value."
    if commits := {run.summary["commit"] for run in runs if run.summary and run.summary["commit"]}:
        notes += f" Commit {', '.join(sorted(commits))}."
    limits = [(run.rows[-1]["epoch"], run.config["control"]["max_epochs"]) for run in runs if run.untrained]
    if fewer := sorted({at_most for epochs, at_most in limits if at_most < epochs}):
        notes += f" The untrained control's probes had {' or '.join(map(str, fewer))} epochs, a longer run's more."
    return "\n".join([*lines, "", notes, ""])


def spread(values: list[float], digits: int, *, signed: bool = False) -> str:
    """Mean and standard deviation of the values that are not NaN, and their number if some are, as text."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    text = f"{mean(known):{'+' if signed else ''}.{digits}f}"
    text += f" ({stdev(known):.{digits}f})" if len(known) > 1 else ""
    return text + (f" (n = {len(known)})" if len(known) < len(values) else "")


def _gate(found: Group) -> str:
    if running := [run for run in found.runs if not run.summary]:
        last = ", ".join(f"{run.rows[-1]['epoch']} of {run.config['run']['epochs']}" for run in running)
        return f"epoch {last}, not ended"
    verdicts = [run.summary["gate_pass"] for run in found.runs if run.summary]
    return "none" if set(verdicts) == {None} else f"{verdicts.count(True)} of {len(verdicts)}"


def draw(groups: list[Group], metrics: list[str], path: Path) -> None:
    """Draw metrics over epochs: a line for each group, a band over its seeds, and a grey band for all controls."""
    figure = new_figure(4.8 * len(metrics) + 1.6, 4.2)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for number, found in enumerate(groups):
            points: dict[int, list[float]] = {}
            for row in (row for run in found.runs for row in run.rows if row.get(metric) is not None):
                points.setdefault(row["epoch"], []).append(row[metric])
            epochs = sorted(points)
            style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":")[number // 10 % 3]}
            axes.plot(epochs, [mean(points[epoch]) for epoch in epochs], label=_plain(found.name), marker=".", **style)
            if len(found.runs) > 1:
                low, high = ([pick(points[epoch]) for epoch in epochs] for pick in (min, max))
                axes.fill_between(epochs, low, high, color=style["color"], alpha=0.15)
        controls = [run.untrained.get(metric) for found in groups for run in found.runs]
        if controls := [value for value in controls if value is not None]:
            axes.axhspan(min(controls), max(controls), color="0.5", alpha=0.3, label="untrained, all runs")
        axes.set_title(metric)
        epoch_axis(axes, [row["epoch"] for found in groups for run in found.runs for row in run.rows])
        axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # in a run's name, which the table shows in full
        figure.savefig(path, dpi=120)


def _plain(name: str) -> str:
    """A name that matplotlib shows unchanged: dollars begin formulas, an underscore hides a line from the legend."""
    return (" " if name.startswith("_") else "") + name.replace("$", r"\$")


if __name__ == "__main__":
    sys.exit(main())
