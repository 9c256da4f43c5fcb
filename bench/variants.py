"""Repeats the reference code's experiments: each variant and its controls, on CIFAR-10 rotations, a process per run.

    python bench/variants.py quick run.threads=1 --data data/cifar10 --jobs 2
    python bench/variants.py lite --data data/cifar10 --seeds 42 0 1

Runs are written to runs/variants/<tier>/<name>-<seed>. Given again, the same command skips finished runs and continues
stopped ones. `seqjepa compare runs/variants/quick/*` makes the table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from seqjepa.configs.console import open_console

ROOT = Path(__file__).resolve().parent.parent


class Experiment(NamedTuple):
    """A variant, and settings on top of its file."""

    name: str
    variant: str
    settings: tuple[str, ...] = ()


COSINE = ("optim.schedule=cosine", "optim.warmup_epochs=2", "optim.min_lr=1e-5")
REPEATED = (  # their spread over seeds is the yardstick for all
    Experiment("exp_a_ema_rate", "exp_a_ema_rate"),
    Experiment("ema", "baseline"),
)
SINGLE = (
    Experiment("exp_b_stopgrad", "exp_b_stopgrad"),
    Experiment("exp_b_tuned", "exp_b_tuned"),
    Experiment("exp_c_symmetric", "exp_c_symmetric"),
    Experiment("exp_a_cosine", "exp_a_ema_rate", COSINE),  # exp_c_symmetric without the backward reading
    Experiment("exp_b_high", "exp_b_high"),
    Experiment("exp_b_003", "exp_b_stopgrad", ("objective.rate.weight=0.03",)),  # exp_b_tuned without its schedule
    Experiment("stopgrad", "stopgrad"),  # exp_b without the rate
    Experiment("exp_d_sharpening", "exp_d_sharpening"),
    Experiment("exp_d_cross_entropy", "exp_d_cross_entropy"),
    Experiment("sigreg", "sigreg"),
    Experiment(
        "exp_a_no_dropout", "exp_a_ema_rate", ("model.aggregator.dropout=0.0",)
    ),  # noise raises the rate as well
    Experiment("exp_a_raw_actions", "exp_a_ema_rate", ("actions.normalization=none",)),  # as in the reference code
)


def main() -> int:
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tier", help="quick, lite, ...: a file of configs/tier")
    parser.add_argument("--data", required=True, help="folder of CIFAR-10")
    parser.add_argument("--seeds", type=int, nargs="+", help="seeds of all runs; default 42, and 0 and 1 for A and EMA")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="run only these experiments")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    repeated = [(e, seed) for e in REPEATED for seed in (args.seeds or (42, 0, 1))]
    runs = repeated + [(e, seed) for seed in (args.seeds or (42,)) for e in SINGLE]
    if args.only:
        runs = [(e, seed) for e, seed in runs if e.name in args.only]

    def train(run: tuple[Experiment, int]) -> int:
        experiment, seed = run
        folder = Path("runs/variants") / args.tier / f"{experiment.name}-{seed}"
        if (folder / "summary.json").exists():
            print(f"{folder}: done before", flush=True)
            return 0
        command = [sys.executable, ROOT / "engine/train.py", "configs/data/cifar10_rot.yaml"]
        command += [f"configs/tier/{args.tier}.yaml", f"configs/variant/{experiment.variant}.yaml"]
        command += [f"data.root={args.data}", f"run.dir={folder}", f"run.name={folder.name}", f"run.seed={seed}"]
        command += ["run.resume=auto", *experiment.settings, *args.settings]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "console.log").open("a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
        print(f"{folder}: exit code {code}", flush=True)
        return code

    with ThreadPoolExecutor(args.jobs) as pool:
        return max(map(abs, pool.map(train, runs)), default=0)


if __name__ == "__main__":
    sys.exit(main())
