"""A recipe for ten minutes on two cores: searched on held-out training images, tested once, recorded beside controls.

    python bench/records.py search --data data/cifar10 --jobs 2      # eight settings of each contender
    python bench/records.py test --data data/cifar10 --jobs 2        # the best of each, on test images, three seeds
    python bench/records.py record rate_inverse --data data/cifar10  # a variant at full length, with its controls
    python bench/records.py show                                     # the tables

Runs are written to runs/records, results to bench/records. Given again, a command skips finished runs and continues
stopped ones. All networks are judged by the same ridge probes on frozen features (`eval.protocol=ridge`). In `search`
and `test` all contenders get the same number of encoder passes over views. `record` writes a row only if it beats the
last row of its task by more than the spread over seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from contenders import CONTENDERS, Contender

from seqjepa.configs.console import open_console

BENCH = Path(__file__).resolve().parent
CONFIGS, RECORDS, RUNS = BENCH.parent / "configs", BENCH / "records", Path("runs/records")
SEEDS = (0, 1, 2)
LENGTH = 3  # observed views of the aggregate that is judged
MEASURES = {"z": "z_top1", "agg": f"agg_top1_{LENGTH}", "mean z": f"mean_top1_{LENGTH}", "R²": "z_r2"}
TASKS = {
    "cifar10_aug": ("data/cifar100_aug.yaml", "data.dataset=cifar10"),
    "cifar100_aug": ("data/cifar100_aug.yaml",),
    "mnist_affine": ("data/mnist_affine.yaml",),
}
CONTROLS = {
    "trained": (),
    "shuffled": ("ablation.shuffle_actions=true",),
    "frozen": ("ablation.freeze_encoder=true",),
}
JUDGED = ("eval.protocol=ridge", f"eval.lengths=[{LENGTH}]", "eval.renderings=1", "run.threads=1")


class Plan(NamedTuple):
    """A run."""

    folder: Path
    words: tuple[str, ...]  # of its command line
    curve: bool = False  # whether the checkpoints of all epochs are judged, not only the last

    @property
    def ended(self) -> bool:
        return (self.folder / "summary.json").exists()

    def scores(self) -> list[dict[str, Any]]:
        """Its evaluations in the order of their epochs; the last is of the final network."""
        files = sorted(self.folder.glob("eval/*-ridge/eval.json"))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


# --------------------------------------------------------------------------------------------------------- what is run


def contender_plan(
    folder: Path, contender: Contender, words: Iterable[str], images: int, passes: int, *, curve: bool = False
) -> Plan:
    """A run of `passes` encoder passes over the views of a number of images."""
    epochs, rest = divmod(passes, images * contender.views)
    assert not rest, "contenders must get the same number of passes"
    length = (f"run.epochs={epochs}", f"data.train_subset={images}", f"eval.every={epochs}")
    return Plan(folder, (*contender.words, *words, *length), curve)


def searched() -> dict[str, list[Plan]]:
    """The runs of the search, by contender."""
    found: dict[str, list[Plan]] = {}
    for name, contender in CONTENDERS.items():
        for number, trial in enumerate(contender.trials):
            words = (*trial, "data.held_out=2000")
            found.setdefault(name, []).append(
                contender_plan(RUNS / "search" / f"{name}-{number}", contender, words, 2_500, 40_000)
            )
    return found


def tested() -> dict[str, list[Plan]]:
    """The runs of the best trial of each contender, by contender; every epoch is judged."""
    chosen = best_trials()
    if missing := CONTENDERS.keys() - chosen:
        raise SystemExit(f"the search has not ended for {', '.join(sorted(missing))}")
    return {
        name: [
            contender_plan(
                RUNS / "test" / f"{name}-{seed}",
                contender,
                (*contender.trials[chosen[name]], f"run.seed={seed}", "checkpoint.keep=9"),
                6_250,
                100_000,
                curve=True,
            )
            for seed in SEEDS
        ]
        for name, contender in CONTENDERS.items()
    }


def recorded(task: str, variant: str, settings: list[str]) -> dict[str, list[Plan]]:
    """The runs of a variant with some settings, and of its controls, by control."""
    file = CONFIGS / "variant" / f"{variant}.yaml"
    if not file.exists():
        raise SystemExit(f"{variant}: no such file in configs/variant")
    return {
        control: [
            Plan(
                RUNS / task / "-".join([variant, *settings, control, str(seed)]),
                (str(file), *settings, *words, f"run.seed={seed}"),
            )
            for seed in SEEDS
        ]
        for control, words in CONTROLS.items()
    }


def common(task: str, data: str) -> list[str]:
    """Words of every run, before its own."""
    file, *words = TASKS[task]
    files = [str(CONFIGS / file), str(CONFIGS / "tier/minutes.yaml")]
    words += [f"data.root={data}", "run.resume=auto", "control.enabled=false", "diagnostics.every=0"]
    return [*files, *words, "tracking.wandb=disabled"]


# ------------------------------------------------------------------------------------------------------------- running


def train(job: tuple[Plan, list[str]]) -> tuple[str, int]:
    """Train a run in this process, unless it has ended; returns a line about it and its exit code."""
    plan, words = job
    if plan.ended:
        return f"{plan.folder}: done before", 0
    from seqjepa.engine.train import main

    plan.folder.mkdir(parents=True, exist_ok=True)
    with _printing_to(plan.folder / "console.log"):
        code = main([*words, *plan.words, f"run.dir={plan.folder}", f"run.name={plan.folder.name}"])
    return f"{plan.folder}: exit code {code}", code


def judge(plans: list[Plan]) -> tuple[str, int]:
    """Fit the ridge probes where that has not been done. Runs that are given together share an untrained control."""
    waiting = []
    for plan in plans:
        checkpoints = sorted(plan.folder.glob("checkpoints/epoch-????"))
        for path in checkpoints if plan.curve else checkpoints[-1:]:
            if not (plan.folder / "eval" / f"{path.name}-ridge" / "eval.json").exists():
                waiting.append(str(path))
    if not waiting:
        return "", 0
    from seqjepa.engine.evaluate import main

    log = plans[0].folder / "evaluation.log"
    with _printing_to(log):
        code = main([*waiting, *JUDGED])
    return f"{len(waiting)} checkpoints judged, as {log} says: exit code {code}", code


@contextlib.contextmanager
def _printing_to(path: Path):
    with path.open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


def run_all(groups: dict[str, list[Plan]], words: list[str], jobs: int) -> None:
    """Train and judge all runs, several at a time; the runs of a group are judged together."""
    stages = [(train, [(plan, words) for group in groups.values() for plan in group]), (judge, groups.values())]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for work, jobs_of_stage in stages:
            for line, code in pool.map(work, jobs_of_stage):
                if line:
                    print(line, flush=True)
                if code >= 128:  # a signal: what runs now is saved, the rest is left
                    pool.shutdown(cancel_futures=True)
                    raise SystemExit(code)


# ------------------------------------------------------------------------------------------------------------- results


def score(found: dict[str, float]) -> float:
    """What is maximised: class from the aggregate and R² of the action, in percent, with equal weight."""
    return (found[MEASURES["agg"]] + 100 * found[MEASURES["R²"]]) / 2


def best_trials() -> dict[str, int]:
    """Number of the best trial of each contender that has been searched completely."""
    stored = _read("search.json")
    return {name: max(range(len(rows)), key=lambda number: rows[number]["score"]) for name, rows in stored.items()}


def search_results() -> dict[str, list[dict[str, Any]]]:
    """Settings, scores and diverged runs of all trials of the contenders whose trials have all ended."""
    found = {}
    for name, plans in searched().items():
        if not all(plan.ended for plan in plans):
            continue
        rows = []
        for plan, trial in zip(plans, CONTENDERS[name].trials, strict=True):
            scores = plan.scores()[-1]["ridge"]
            rows.append({"settings": trial, "score": score(scores["trained"]), **_measures(scores["trained"])})
        found[name] = rows
    return found


def test_results() -> dict[str, Any]:
    """Measures of each contender by encoder passes, with the untrained network's at 0: one value for each seed."""
    found: dict[str, Any] = {}
    for name, plans in tested().items():
        if not all(plan.ended for plan in plans):
            continue
        curves = [plan.scores() for plan in plans]
        per_epoch = 100_000 // len(curves[0])
        points = {0: [scores[-1]["ridge"]["untrained"] for scores in curves]}
        for number in range(len(curves[0])):
            points[(number + 1) * per_epoch] = [scores[number]["ridge"]["trained"] for scores in curves]
        found[name] = {
            "settings": CONTENDERS[name].trials[best_trials()[name]],
            "passes": {passes: _over_seeds(values) for passes, values in points.items()},
        }
    return found


def record_row(task: str, variant: str, settings: list[str]) -> dict[str, Any]:
    """A row of the record table."""
    groups = recorded(task, variant, settings)
    last = {control: [plan.scores()[-1] for plan in plans] for control, plans in groups.items()}
    summaries = [json.loads((plan.folder / "summary.json").read_text(encoding="utf-8")) for plan in groups["trained"]]
    facts = last["trained"][0]
    rows = [json.loads(line) for line in (groups["trained"][0].folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "date": str(date.today()),
        "task": task,
        "recipe": " ".join([variant, *settings]),
        "seeds": SEEDS,
        "images": facts["images"],
        "passes": facts["images"]["train"] * (facts["num_observed"] + 1) * len(rows),
        "seconds": [summary["timing"]["seconds"] for summary in summaries],
        "hardware": summaries[0]["timing"]["hardware"],
        "commit": facts["trained_commit"],
        "measures": {
            "untrained": _over_seeds([found["ridge"]["untrained"] for found in last["trained"]]),
            **{control: _over_seeds([found["ridge"]["trained"] for found in runs]) for control, runs in last.items()},
        },
        "factors": {
            factor: [found["ridge"]["trained"][f"z_r2_{factor}"] for found in last["trained"]]
            for factor in facts["factors"]
        },
    }


def beats(new: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether a row's mean score exceeds another's by more than the larger of their deviations over seeds."""
    scores = [
        [
            (agg + 100 * r2) / 2
            for agg, r2 in zip(*(row["measures"]["trained"][name] for name in ("agg", "R²")), strict=True)
        ]
        for row in (new, old)
    ]
    return mean(scores[0]) - mean(scores[1]) > max(map(stdev, scores))


def _measures(scores: dict[str, float]) -> dict[str, float]:
    return {name: scores[key] for name, key in MEASURES.items()}


def _over_seeds(scores: list[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [one[key] for one in scores] for name, key in MEASURES.items()}


def _read(name: str) -> Any:
    path = RECORDS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _write(name: str, content: Any) -> None:
    RECORDS.mkdir(exist_ok=True)
    (RECORDS / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------- tables and figure


def shown(values: list[float], places: int, *, signed: bool = False) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):{'+' if signed else ''}.{places}f} ({stdev(values):.{places}f})"


def margins(row: dict[str, Any], name: str, control: str) -> list[float]:
    """A measure minus that of a control, seed by seed."""
    pairs = zip(row["measures"]["trained"][name], row["measures"][control][name], strict=True)
    return [trained - other for trained, other in pairs]


def record_table(rows: list[dict[str, Any]]) -> str:
    """The record table as Markdown: three lines for each row, one for each measure."""
    lines = [
        "| task, recipe, passes, seconds | measure | trained | over untrained | over shuffled actions | over frozen |"
    ]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        first = f"{row['task']}, `{row['recipe']}`, {row['passes']:,}, {mean(row['seconds']):.0f} s"
        for name, title, places in (
            ("agg", "class, agg, %", 1),
            ("z", "class, z, %", 1),
            ("R²", "R² of the action", 3),
        ):
            cells = [shown(row["measures"]["trained"][name], places)]
            cells += [
                shown(margins(row, name, other), places, signed=True) for other in ("untrained", "shuffled", "frozen")
            ]
            lines.append(f"| {' | '.join([first, title, *cells])} |")
            first = ""
    return "\n".join(lines)


def contender_table(results: dict[str, Any]) -> str:
    """The contenders after their last pass, best first."""
    lines = ["| contender | settings | class, z, % | class, agg, % | class, mean z, % | R² of the action |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    last = {name: found["passes"][str(max(map(int, found["passes"])))] for name, found in results.items()}
    order = sorted(last, key=lambda name: -(mean(last[name]["agg"]) + 100 * mean(last[name]["R²"])))
    for name in order:
        cells = [shown(last[name][measure], 3 if measure == "R²" else 1) for measure in ("z", "agg", "mean z", "R²")]
        settings = ", ".join(word.removeprefix("objective.") for word in results[name]["settings"])
        lines.append(f"| {' | '.join([f'`{name}`', settings, *cells])} |")
    first = results[order[0]]["passes"]["0"]
    cells = [shown(first[measure], 3 if measure == "R²" else 1) for measure in ("z", "agg", "mean z", "R²")]
    return "\n".join([*lines, f"| {' | '.join(['untrained', '', *cells])} |"])


def main() -> int:
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["search", "test", "record", "show"])
    parser.add_argument("variant", nargs="?", help="for record: a file of configs/variant")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="for record: settings on top of it")
    parser.add_argument("--data", help="folder of the images")
    parser.add_argument("--task", choices=TASKS, default="cifar10_aug", help="for record (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each run (default: %(default)s)")
    args = parser.parse_intermixed_args()
    if args.stage == "show":
        if results := _read("contenders.json"):
            print(contender_table(results), "\n")
        print(record_table(_read("records.json") or []))
        return 0
    if args.data is None:
        parser.error("--data is needed")
    if args.stage == "record" and args.variant is None:
        parser.error("record needs a variant")
    task = args.task if args.stage == "record" else "cifar10_aug"
    stages = {"search": searched, "test": tested, "record": lambda: recorded(task, args.variant, args.settings)}
    run_all(stages[args.stage](), [*common(task, args.data), f"run.threads={args.threads}"], args.jobs)
    if args.stage == "search":
        _write("search.json", search_results())
    elif args.stage == "test":
        _write("contenders.json", test_results())
        print(contender_table(_read("contenders.json")))
    else:
        row, rows = record_row(task, args.variant, args.settings), _read("records.json") or []
        print(record_table([row]))
        last = next((old for old in reversed(rows) if old["task"] == task), None)
        if last and not beats(row, last):
            print(f"no record: {last['recipe']} is not beaten by more than the spread over seeds")
            return 1
        _write("records.json", [*rows, row])
    return 0


if __name__ == "__main__":
    sys.exit(main())
