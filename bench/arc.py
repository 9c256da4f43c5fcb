"""What a network of grids learns in equal time: encoders, codes or objectives side by side, a process per run.

    python bench/arc.py encoders run.threads=1
    python bench/arc.py codes --seconds 40 --seeds 42 0 1 run.threads=1

The CPU time of a step of each arm is measured first, and each gets as many steps as fit, so that its schedule ends with
its time. Runs are written to runs/arc/<table>/<arm>-<seed>; the same command goes on where it stopped. The table has
means over seeds, with ranges if there are several: steps, the scores of `grid_scores`, and, with codes, how many are
used.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import fmean

import yaml
from common import arm_folder, command_line, train_arms, wait, with_range

from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep

WORDS = ["configs/data/arc_programs.yaml", "configs/tier/arc_smoke.yaml"]
WORDS += ["data.fixed_views=false", "data.curriculum.kind=none"]  # new programs in each epoch, of any difficulty
CODES = "model.encoder.quantiser."
PATH = (f"{CODES}place=path", "objective.commitment.weight=0.25")
TEACHER = ("target.kind=ema", "target.decay=0.99", "objective.sigreg.weight=0.001")
TABLES: dict[str, dict[str, tuple[str, ...]]] = {
    "encoders": {
        "16 objects": (),
        "16 objects, legacy features": ("model.encoder.features=legacy",),
        "16 objects, all attend": ("model.encoder.attention=all",),
        "48 objects": ("model.encoder.slots=48",),
        "cells": ("model.encoder.kind=grid_cells",),
        "convnet": ("model.encoder.kind=grid_convnet",),
        "16 objects, frozen": ("ablation.freeze_encoder=true",),
        "16 objects, wrong actions": ("ablation.shuffle_actions=true",),
    },
    "codes": {
        "none": (),
        "256 beside the path": (f"{CODES}kind=ema",),
        "256 in the path": (f"{CODES}kind=ema", *PATH),
        "256 in the path, not drawn anew": (f"{CODES}kind=ema", f"{CODES}redraw=0", *PATH),
        "4 x 256 in the path": (f"{CODES}kind=ema", f"{CODES}groups=4", *PATH),
        "240 by rounding": (f"{CODES}kind=fsq", PATH[0]),
        "4 x 240 by rounding": (f"{CODES}kind=fsq", f"{CODES}groups=4", PATH[0]),
        "256 drawn": (f"{CODES}kind=gumbel", PATH[0], "objective.usage.weight=0.05"),
    },
    "objectives": {
        "InfoNCE": (),
        "InfoNCE, learnt scale": ("objective.prediction.scale_limits=[0.05,0.2]",),
        "InfoNCE + SIGReg": ("objective.sigreg.weight=0.001",),
        "InfoNCE, teacher": TEACHER,
        "InfoNCE, teacher, queue": (*TEACHER, "objective.prediction.queue=8192"),
        "0.7 MSE + 0.3 SIGReg": (
            *("objective.prediction.kind=mse", "objective.prediction.weight=0.7", "objective.sigreg.weight=0.3"),
        ),
        "0.95 MSE + 0.05 SIGReg": (
            *("objective.prediction.kind=mse", "objective.prediction.weight=0.95", "objective.sigreg.weight=0.05"),
        ),
        "MSE + variance + covariance": (
            *("objective.prediction.kind=mse", "objective.variance.weight=1", "objective.covariance.weight=0.04"),
        ),
        "InfoNCE + relations": ("objective.relational.weight=0.1",),
        "InfoNCE + relations as coded": ("objective.relational.weight=0.025", "objective.relational.form=squares"),
    },
}
SHOWN = ("next_cf16", "next_top1", "move_acc", "size_r2", "objects_r2", "colours_r2", "val_nce")


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("table", choices=TABLES, help="what is compared")
    parser.add_argument("--seconds", type=float, default=40.0, help="CPU seconds of training (default: %(default)g)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42], help="seeds of each arm (default: 42)")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    place, arms = Path("runs/arc") / args.table, TABLES[args.table]
    words = [*WORDS, "eval.every=99", "gates.rules.arc_programs=[]", *args.settings]
    for arm, settings in arms.items():
        if all((arm_folder(place, arm, seed) / "summary.json").exists() for seed in args.seeds):
            continue
        sized = (*settings, *size(place / f"{arm.replace(' ', '-')}.json", args.seconds, [*words, *settings]))
        if code := train_arms(place, {arm: sized}, args.seeds, words, 1):
            return code
    print(table({arm: [_summary(arm_folder(place, arm, seed)) for seed in args.seeds] for arm in arms}))
    return 0


def size(path: Path, seconds: float, words: list[str]) -> list[str]:
    """Settings of epochs and programs that take so many CPU seconds of training, measured once and kept in a file."""
    if not path.exists():
        batch = compose(words).config.data.batch_size
        steps = max(1, round(seconds / step_seconds(words, batch)))
        epochs = -(-steps * batch // 48_000)  # of which the last is validated
        path.parent.mkdir(parents=True, exist_ok=True)
        found = [f"run.epochs={epochs}", f"data.train_subset={batch * max(1, round(steps / epochs))}"]
        path.write_text(json.dumps(found), encoding="utf-8")
    found = json.loads(path.read_text(encoding="utf-8"))
    print(f"{path.stem}: {' '.join(found)}", flush=True)
    return found


def step_seconds(words: list[str], batch: int, steps: int = 8) -> float:
    """CPU seconds of a training step, after a few that do not count."""
    few = [f"data.train_subset={batch * (steps + 3)}", "data.val_subset=96", "control.enabled=false"]
    config = compose([*words, *few]).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    training, started = TrainingStep(config, loaders, accelerator), 0.0
    for step, batch in zip(range(steps + 3), loaders.train.epoch(0), strict=False):
        if step == 3:
            wait()
            started = time.process_time()
        training.step(batch, step)
    wait()
    return (time.process_time() - started) / steps


def _summary(folder: Path) -> dict:
    found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    data = config["data"]
    return {**found["final"], "steps": config["run"]["epochs"] * (data["train_subset"] // data["batch_size"])}


def table(found: dict[str, list[dict]]) -> str:
    """A table of the arms, each with the final metrics of its runs."""
    coded = any(run.get("codes_active") is not None for runs in found.values() for run in runs)
    shown = (*SHOWN, *(("codes_active", "codes_perplexity") if coded else ()))
    lines = [f"| | steps | {' | '.join(shown)} |", f"| --- | --- |{' --- |' * len(shown)}"]
    for arm, runs in found.items():
        cells = [_cell([run[name] for run in runs if run.get(name) is not None], name) for name in shown]
        lines.append(f"| {arm} | {fmean(run['steps'] for run in runs):.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(values: list[float], name: str) -> str:
    digits = 3 if name.endswith("_r2") else 2 if name == "val_nce" else 1
    if not values:
        return ""
    return with_range(values, digits) if len(values) > 1 else f"{values[0]:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
