"""Contenders for the recipe of a ten-minute run: chosen on held-out training images, tested once, over seeds.

    python bench/records.py search --data data/cifar10 --jobs 2    # eight settings of each contender
    python bench/records.py test --data data/cifar10 --jobs 2      # the best setting of each, three seeds
    python bench/records.py record --data data/cifar10             # the winner at full length, beside its controls
    python bench/records.py table                                  # the tables of bench/records

Runs are written to runs/records. Given again, a command skips finished runs and continues stopped ones. All networks are
judged by the same ridge probes on frozen features (`eval.protocol=ridge`), and all contenders get the same number of
encoder passes over images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from seqjepa.configs.console import open_console

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/records")
LENGTH = 3  # observed views of the aggregate that is judged
SEEDS = (0, 1, 2)


class Contender(NamedTuple):
    """An objective, and the settings that are tried for it."""

    words: tuple[str, ...]
    swept: dict[str, tuple[float, ...]]
    views: int = 4

    @property
    def trials(self) -> list[tuple[str, ...]]:
        """The settings that are tried, as words of the command line."""
        values = product(*self.swept.values())
        return [
            tuple(f"{field}={value:g}" for field, value in zip(self.swept, chosen, strict=True)) for chosen in values
        ]


RATES = (1e-3, 3e-3)  # learning rates that every contender tries
PROJECTED = ("model.projector.kind=mlp", "model.projector.dim=128", "model.projector.hidden=512")
ONLINE = ("target.kind=stop_gradient", *PROJECTED)
# EMP-SSL's: half the coding rate of unit projections at each view position, against collapse
SPREAD = ("objective.rate.features=projections", "objective.rate.normalize=unit", "objective.rate.scale.kind=eps")
SPREAD += ("objective.rate.scale.eps=0.04", "objective.rate.weight=0.5")
TOGETHER = (*SPREAD, "objective.invariance.weight=200")
ALONE = ("objective.prediction.weight=0",)
INVERSE = ("model.inverse.kind=mlp",)
PREDICTION = ("objective.prediction.weight=50",)

CONTENDERS = {
    "ema": Contender((), {"optim.lr": (5e-4, *RATES, 6e-3), "target.decay": (0.99, 0.996)}),
    "exp_a": Contender((), {"optim.lr": RATES, "objective.rate.weight": (0.003, 0.01, 0.03, 0.1)}),
    "vicreg": Contender(
        (*ONLINE, *ALONE, "objective.invariance.distance=mse", "objective.variance.weight=25"),
        {"optim.lr": RATES, "objective.invariance.weight": (10, 25), "objective.covariance.weight": (1, 4)},
    ),
    "sigreg": Contender(
        (
            *ONLINE,
            "objective.invariance.distance=mse",
            "objective.invariance.weight=1",
            "objective.prediction.kind=mse",
        ),
        {"optim.lr": RATES, "objective.sigreg.weight": (0.02, 0.05, 0.1, 0.2)},
    ),
    "rate_prediction": Contender(
        ("target.kind=shared", *PROJECTED, *SPREAD),
        {"optim.lr": RATES, "objective.prediction.weight": (50, 100, 200, 400)},
    ),
    "rate_invariance": Contender(
        (*ONLINE, *SPREAD, *ALONE), {"optim.lr": RATES, "objective.invariance.weight": (50, 100, 200, 400)}
    ),
    "rate_invariance_prediction": Contender(
        (*ONLINE, *TOGETHER), {"optim.lr": RATES, "objective.prediction.weight": (10, 30, 100, 200)}
    ),
    "action_vicreg": Contender(
        (
            *("target.kind=shared", *PROJECTED, "objective.prediction.kind=mse", "objective.variance.weight=25"),
            *("objective.reading.kind=windows", "objective.reading.length=1"),
        ),
        {"optim.lr": RATES, "objective.prediction.weight": (10, 25), "objective.covariance.weight": (1, 4)},
    ),
    "rate_invariance_inverse": Contender(
        (*ONLINE, *TOGETHER, *ALONE, *INVERSE), {"optim.lr": RATES, "objective.inverse.weight": (20, 60, 120, 240)}
    ),
    "all_4": Contender(
        (*ONLINE, *TOGETHER, *PREDICTION, *INVERSE), {"optim.lr": RATES, "objective.inverse.weight": (20, 60, 120, 240)}
    ),
    "all_8": Contender(
        (*ONLINE, *TOGETHER, *PREDICTION, *INVERSE, "sequence.num_observed=7", "data.batch_size=64"),
        {"optim.lr": RATES, "objective.inverse.weight": (20, 60, 120, 240)},
        views=8,
    ),
    "all_16": Contender(
        (*ONLINE, *TOGETHER, *PREDICTION, *INVERSE, "sequence.num_observed=15", "data.batch_size=64"),
        {"optim.lr": RATES, "objective.inverse.weight": (20, 60, 120, 240)},
        views=16,
    ),
}


class Plan(NamedTuple):
    """A run: its folder, and the words of its command line, without the data."""

    folder: Path
    words: tuple[str, ...]


def plan(folder: Path, contender: Contender, settings: tuple[str, ...], images: int, passes: int) -> Plan:
    """A run of `passes` encoder passes over the views of `images` images."""
    epochs = passes // (images * contender.views)
    assert epochs * images * contender.views == passes
    words = (
        f"run.epochs={epochs}",
        f"data.train_subset={images}",
        f"eval.every={epochs}",
        f"checkpoint.every={epochs}",
    )
    return Plan(folder, (*contender.words, *settings, *words))


def searched() -> dict[str, list[Plan]]:
    """The runs of the search, by contender."""
    return {
        name: [
            plan(RUNS / "search" / f"{name}-{number}", contender, (*trial, "data.held_out=2000"), 2_500, 40_000)
            for number, trial in enumerate(contender.trials)
        ]
        for name, contender in CONTENDERS.items()
    }


def common(data: str) -> list[str]:
    """Words of every run."""
    files = ("data/cifar100_aug", "tier/minutes")
    words = [str(ROOT / "configs" / f"{name}.yaml") for name in files]
    words += ["data.dataset=cifar10", f"data.root={data}", "run.resume=auto", "control.enabled=false"]
    return [*words, "diagnostics.every=0", "tracking.wandb=disabled"]


def train(job: tuple[Plan, list[str]]) -> str:
    """Train a run in this process, unless it has ended; returns a line about it."""
    (folder, words), shared = job
    if (folder / "summary.json").exists():
        return f"{folder}: done before"
    from seqjepa.engine.train import main

    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "console.log").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        with contextlib.redirect_stderr(log):
            code = main([*shared, *words, f"run.dir={folder}", f"run.name={folder.name}"])
    return f"{folder}: exit code {code}"


def judge(folders: list[Path]) -> None:
    """Fit the ridge probes to those runs that have none yet; they share an untrained control."""
    waiting = [folder for folder in folders if (folder / "summary.json").exists() and not scores_of(folder)]
    if waiting:
        from seqjepa.engine.evaluate import main

        log = waiting[0] / "evaluation.log"
        with (
            log.open("a", encoding="utf-8") as file,
            contextlib.redirect_stdout(file),
            contextlib.redirect_stderr(file),
        ):
            words = ["eval.protocol=ridge", f"eval.lengths=[{LENGTH}]", "eval.renderings=1", "run.threads=1"]
            main([*map(str, waiting), *words])


def scores_of(folder: Path) -> dict[str, dict[str, float]] | None:
    """Scores of the trained and the untrained network of a run; None if it has not been judged."""
    found = sorted(folder.glob("eval/*-ridge/eval.json"))
    return json.loads(found[-1].read_text(encoding="utf-8"))["ridge"] if found else None


def score(found: dict[str, float]) -> float:
    """What the search maximises: class from the aggregate and R² of the action, in percent, with equal weight."""
    return (found[f"agg_top1_{LENGTH}"] + 100 * found["z_r2"]) / 2


def best_trials() -> dict[str, int]:
    """Number of the best trial of each contender that has been searched completely."""
    best = {}
    for name, plans in searched().items():
        found = [scores_of(run.folder) for run in plans]
        if all(found):
            values = [score(one["trained"]) for one in found if one]
            best[name] = values.index(max(value for value in values if not math.isnan(value)))
    return best


def run_all(groups: dict[str, list[Plan]], shared: list[str], jobs: int) -> None:
    """Train and judge all runs, several at a time."""
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(train, [(run, shared) for plans in groups.values() for run in plans]):
            print(line, flush=True)
        list(pool.map(judge, [[run.folder for run in plans] for plans in groups.values()]))


def main() -> int:
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["search"])
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these contenders")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    groups = {name: plans for name, plans in searched().items() if not args.only or name in args.only}
    run_all(groups, [*common(args.data), *args.settings], args.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
