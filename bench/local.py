"""What an encoder loses that learns block by block: beside the same terms end to end, EMA, and only its last block.

    python bench/local.py --data data/mnist --jobs 2 run.threads=1

Runs are written to runs/local/<task>/<arm>-<seed>; the same command goes on where it stopped. The table has class and
action from z by ridge regressions on test images, the bytes that a sequence keeps for the backward pass, and the time
of a step beside the first arm's.
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import median

import torch
from common import arm_folder, command_line, interleaved, loaders_of, random_images, train_arms, wait, with_range

from seqjepa.engine.config import compose
from seqjepa.engine.evaluation.measure import evaluate
from seqjepa.engine.reports.console import Reporter
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.step import TrainingStep

LOCAL = ("configs/variant/local.yaml",)
ARMS = {
    "block by block": LOCAL,
    "pairs of blocks": (*LOCAL, "model.local.reach=2"),
    "the same terms end to end": (*LOCAL, "model.local.heads=last", "model.local.reach=all"),
    "last block alone": (*LOCAL, "model.local.heads=last"),
    "EMA end to end": ("configs/variant/baseline.yaml", "target.decay=0.99"),
}
NETWORK = ("model.encoder.kind=convnet", "model.encoder.width=32", "model.predictor.hidden=256", "probes.hidden=256")
LENGTH = ("data.train_subset=4000", "data.val_subset=2000", "data.batch_size=64", "run.epochs=10", "optim.lr=1e-3")
MILD = ("sequence.translation=[-4,4]", "sequence.scale=[0.6,1.0]")
MEASURES = {
    "class from the image, %": "z_top1",
    "class from the mean of its views, %": "mean_top1_3",
    "R² of the action": "z_r2",
}


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--task", default="mnist_affine", help="a file of configs/data (default: %(default)s)")
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1], help="seeds of each arm (default: 42 0 1)")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    place = Path("runs/local") / args.task
    words = [f"configs/data/{args.task}.yaml", *NETWORK, *LENGTH, *(MILD if args.task == "mnist_affine" else ())]
    words += ["eval.every=5", f"data.root={args.data}", *args.settings]
    if code := train_arms(place, ARMS, args.seeds, words, args.jobs):
        return code
    found = {}
    for arm in ARMS:
        folders = [arm_folder(place, arm, seed) for seed in args.seeds]
        found[arm] = [evaluate([folder], ["eval.protocol=ridge"], Reporter(False))[0]["ridge"] for folder in folders]
    print(table(found, costs(words)))
    return 0


def costs(words: list[str]) -> dict[str, tuple[float, float]]:
    """Largest number of bytes kept at a time for backward, and seconds of a step, by arm, on images of noise."""
    steps, kept = {}, {}
    for arm, more in ARMS.items():
        config = compose([*words, *more, "control.enabled=false"]).config
        accelerator = build_accelerator(config.run, 1)
        images = random_images(config.data.dataset, 4 * config.data.batch_size)
        loaders = loaders_of(images, config, accelerator.device, compiled=False)
        training, batch = TrainingStep(config, loaders, accelerator), next(loaders.train.epoch(0))
        kept[arm] = _peak(training, batch)

        def step(training=training, batch=batch) -> int:
            training.step(batch, 0)
            wait()
            return 1

        steps[arm] = step
    seconds = {arm: 1 / median(rates) for arm, rates in interleaved(steps, 7).items()}
    return {arm: (kept[arm], seconds[arm]) for arm in ARMS}


class _Kept:
    """A tensor that is kept for backward; counts the bytes of all that are, each storage once."""

    alive: dict[int, tuple[int, int]] = {}  # number of holders and bytes of each storage
    most = 0

    def __init__(self, x: torch.Tensor):
        self.x, self.place = x, x.untyped_storage().data_ptr()
        holders, _ = self.alive.get(self.place, (0, 0))
        self.alive[self.place] = holders + 1, x.untyped_storage().nbytes()
        type(self).most = max(self.most, sum(size for _, size in self.alive.values()))

    def __del__(self):
        holders, size = self.alive[self.place]
        if holders == 1:
            del self.alive[self.place]
        else:
            self.alive[self.place] = holders - 1, size


def _peak(training: TrainingStep, batch) -> float:
    """Largest number of bytes that a step keeps for backward at a time, parameters included."""
    _Kept.alive, _Kept.most = {}, 0
    with torch.autograd.graph.saved_tensors_hooks(_Kept, lambda kept: kept.x):
        training.step(batch, 0)
    return _Kept.most


def table(found: dict[str, list[dict]], cost: dict[str, tuple[float, float]]) -> str:
    """A table of the arms, each with the scores of its runs."""
    headings = [*MEASURES, "kept for backward, MiB", "a step"]
    lines = [f"| arm | {' | '.join(headings)} |", f"| --- |{' --- |' * len(headings)}"]
    first = next(iter(cost.values()))[1]
    untrained = [run["untrained"] for run in next(iter(found.values()))]
    rows = {"untrained": untrained} | {arm: [run["trained"] for run in runs] for arm, runs in found.items()}
    for arm, runs in rows.items():
        cells = [with_range([run[name] for run in runs]) for name in MEASURES.values()]
        cells += [f"{cost[arm][0] / 2**20:.1f}", f"{cost[arm][1] / first:.2f}"] if arm in cost else ["", ""]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
