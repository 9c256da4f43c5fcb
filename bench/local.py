"""What an encoder loses that learns block by block: beside the same terms end to end, EMA, and only its last block.

    python bench/local.py --data data/mnist --jobs 2 run.threads=1
    python bench/local.py --task cifar10_rot --tier quick --data data/cifar10

Runs are written to runs/local/<task>/<arm>-<seed>; the same command goes on where it stopped. Class from one moved view
and R² of the action from two are of ridge regressions on the pooled maps of each block, tested on test images. Beside
them stand the most bytes that a step keeps for its backward pass at a time, those that AdamW keeps between steps, and
the time of a step relative to the first arm's (where blocks learn in turn, the most of the turns, and their mean time).
"""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import fmean, median

import torch
import torch.nn.functional as F
from common import arm_folder, command_line, interleaved, loaders_of, random_images, train_arms, wait, with_range

from seqjepa.engine.analysis.accumulators import r2_score
from seqjepa.engine.analysis.regressions import held_out_rows, ridge_regression
from seqjepa.engine.config import compose
from seqjepa.engine.evaluation.cases import open_case
from seqjepa.engine.evaluation.frozen import rows_of, untrained_network
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.step import TrainingStep
from seqjepa.loaders.batch import Batch

LOCAL = ("configs/variant/local.yaml",)
ARMS = {
    "block by block": LOCAL,
    "one block after the other": (*LOCAL, "model.local.order=in_turn"),
    "pairs of blocks": (*LOCAL, "model.local.reach=2"),
    "the same terms end to end": (*LOCAL, "model.local.heads=last", "model.local.reach=all"),
    "last block alone": (*LOCAL, "model.local.heads=last"),
    "EMA end to end": ("configs/variant/baseline.yaml", "target.decay=0.99"),
}
NETWORK = ("model.encoder.kind=convnet", "model.encoder.width=32", "model.predictor.hidden=256", "probes.hidden=256")
LENGTH = ("data.train_subset=4000", "data.val_subset=2000", "data.batch_size=64", "run.epochs=10", "optim.lr=1e-3")
MILD = ("sequence.translation=[-4,4]", "sequence.scale=[0.6,1.0]")
Scores = list[tuple[float, float]]  # class in percent and R² of the action, of each block


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("--task", default="mnist_affine", help="a file of configs/data (default: %(default)s)")
    parser.add_argument("--tier", help="a file of configs/tier (default: ten epochs of 4,000 images, a small convnet)")
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1], help="seeds of each arm (default: 42 0 1)")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    place = Path("runs/local") / "-".join(filter(None, (args.task, args.tier)))
    length = [f"configs/tier/{args.tier}.yaml"] if args.tier else [*NETWORK, *LENGTH]
    words = [f"configs/data/{args.task}.yaml", *length, *(MILD if args.task == "mnist_affine" else ())]
    words += ["eval.every=5", f"data.root={args.data}", *args.settings]
    if code := train_arms(place, ARMS, args.seeds, words, args.jobs):
        return code
    found = {arm: [by_block(arm_folder(place, arm, seed)) for seed in args.seeds] for arm in ARMS}
    untrained = [by_block(arm_folder(place, next(iter(ARMS)), seed), trained=False) for seed in args.seeds]
    print(table({"untrained": untrained, **found}, costs(words)))
    return 0


def by_block(run: Path, *, trained: bool = True) -> Scores:
    """Scores of each block of the run's last checkpoint, or of the network that it started from."""
    case = open_case(run, [], 0)
    accelerator, loaders = case.open_data(2, print)
    model = case.model if trained else untrained_network(case.config, accelerator)
    encoder = model.to(accelerator.device).eval().encoder

    @torch.no_grad()
    def features(batch: Batch) -> dict[str, torch.Tensor]:
        found, maps = {}, batch.views[:, :2].flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for number, block in enumerate(encoder.blocks()):
            with accelerator.autocast():
                maps = block(maps)
            found[f"{number}"] = encoder.pooled(maps.float()).unflatten(0, (-1, 2))  # [B, 2, C]
        return found

    train, test = (rows_of(loader, 1, features, lambda: None) for loader in (loaders.train, loaders.validation))
    held_out, scores = held_out_rows(train["index"]), []
    for number in range(len(encoder.blocks())):
        rows, test_rows = train[f"{number}"], test[f"{number}"]
        classes = F.one_hot(train["labels"], loaders.num_classes or -1)
        labels = ridge_regression(rows[:, 1], classes, held_out, test_rows[:, 1]).argmax(-1)
        actions = ridge_regression(rows.flatten(1), train["actions"], held_out, test_rows.flatten(1))
        right = 100 * (labels == test["labels"]).double().mean().item()
        scores.append((right, r2_score(actions, test["actions"])))
    return scores


def costs(words: list[str]) -> dict[str, tuple[float, float, float]]:
    """Most bytes kept at a time for backward, and by the optimiser; seconds of a step; by arm, on images of noise."""
    steps, kept, held = {}, {}, {}
    for arm, more in ARMS.items():
        config = compose([*words, *more, "control.enabled=false"]).config
        accelerator = build_accelerator(config.run, 1)
        images = random_images(config.data.dataset, 4 * config.data.batch_size)
        loaders = loaders_of(images, config, accelerator.device, compiled=False)
        training, batch = TrainingStep(config, loaders, accelerator), next(loaders.train.epoch(0))
        parts = len(config.model.encoder.block_widths)
        turns = [-(-training.total_steps * part // parts) for part in range(parts)]
        kept[arm] = held[arm] = 0.0
        for turn in turns:
            kept[arm] = max(kept[arm], _peak(training, batch, turn))
            states = training.optimizer.state.values()
            held[arm] = max(held[arm], sum(x.nbytes for state in states for x in state.values()))

        def step(training=training, batch=batch, turns=turns) -> int:
            for turn in turns:
                training.step(batch, turn)
            wait()
            return len(turns)

        steps[arm] = step
    seconds = {arm: 1 / median(rates) for arm, rates in interleaved(steps, 7).items()}
    return {arm: (kept[arm], held[arm], seconds[arm]) for arm in ARMS}


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


def _peak(training: TrainingStep, batch, step: int) -> float:
    """Largest number of bytes that a step keeps for backward at a time, parameters included."""
    _Kept.alive, _Kept.most = {}, 0
    with torch.autograd.graph.saved_tensors_hooks(_Kept, lambda kept: kept.x):
        training.step(batch, step)
    return _Kept.most


def table(found: dict[str, list[Scores]], cost: dict[str, tuple[float, float, float]]) -> str:
    """Tables of the arms: their last block, and all blocks, each with the scores of its runs."""
    first = next(iter(cost.values()))[-1]
    lines = ["| arm | class from a moved view, % | R² of the action | kept at a time, MiB | AdamW's, MiB | a step |"]
    lines.append(f"| --- |{' --- |' * 5}")
    for arm, runs in found.items():
        cells = [with_range([run[-1][measure] for run in runs], digits) for measure, digits in ((0, 1), (1, 3))]
        kept, held, seconds = cost.get(arm, (0.0, 0.0, 0.0))
        cells += [f"{kept / 2**20:.1f}", f"{held / 2**20:.1f}", f"{seconds / first:.2f}"] if arm in cost else [""] * 3
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    lines += ["", "| arm | class by block, % | R² by block |", "| --- | --- | --- |"]
    for arm, runs in found.items():
        means = [[fmean(run[block][measure] for run in runs) for block in range(len(runs[0]))] for measure in (0, 1)]
        lines.append(
            f"| {arm} | {', '.join(f'{x:.1f}' for x in means[0])} | {', '.join(f'{x:.3f}' for x in means[1])} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
