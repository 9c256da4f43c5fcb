"""What is forgotten on a stream of tasks, and what a buffer saves: arms side by side, a process per run.

    python bench/streams.py actions --data data/mnist --jobs 2 run.threads=1
    python bench/streams.py classes --task cifar10_rot --data data/cifar10 --seeds 42 0 1

Runs are written to runs/streams/<task>-<stream>/<arm>-<seed>; the same command goes on where it stopped. A table has
the mean over seeds of each summary, with their range, and the score of the untrained network; another one the largest
fall of the earlier tasks' cosine after a boundary, the steps until it was back at 95 % (of each seed), and how alike z
stayed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean

from common import arm_folder, command_line, train_arms, with_range

ARMS = {
    "nothing kept": (),
    "reservoir": ("stream.buffer.kind=reservoir",),
    "balanced": ("stream.buffer.kind=balanced",),
    "coreset": ("stream.buffer.kind=coreset",),
    "distillation": ("model.memory.kind=encoder", "objective.distillation.weight=1"),
    "all at once": ("stream.mixed=true",),
}
SHOWN = ("average", "backward", "forgetting")


def main() -> int:
    parser = command_line(__doc__)
    parser.add_argument("stream", help="a file of configs/stream")
    parser.add_argument("--task", default="mnist_affine", help="a file of configs/data (default: %(default)s)")
    parser.add_argument("--data", required=True, help="folder of the images")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 0, 1], help="seeds of each arm (default: 42 0 1)")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="arms to run (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings for all runs")
    args = parser.parse_intermixed_args()
    place = Path("runs/streams") / f"{args.task}-{args.stream}"

    words = [f"configs/data/{args.task}.yaml", "configs/tier/stream.yaml", f"configs/stream/{args.stream}.yaml"]
    arms = {arm: ARMS[arm] for arm in args.arms}
    if code := train_arms(place, arms, args.seeds, [*words, f"data.root={args.data}", *args.settings], args.jobs):
        return code
    found = {
        arm: [
            json.loads((arm_folder(place, arm, seed) / "summary.json").read_text(encoding="utf-8"))
            for seed in args.seeds
        ]
        for arm in arms
    }
    print(table({arm: [run["stream"]["measures"] for run in runs] for arm, runs in found.items()}))
    print(f"\n{changes(found)}")
    return 0


def table(found: dict[str, list[dict]]) -> str:
    """A table of the arms, each with the measures of its runs."""
    first = next(iter(found.values()))
    lines = [f"| measure | arm | {' | '.join(SHOWN)} |", f"| --- | --- |{' --- |' * len(SHOWN)}"]
    for measure in first[0]:
        digits = 1 if "class" in measure else 3  # percent
        untrained = [fmean(run[measure]["untrained"]) for runs in found.values() for run in runs]
        lines.append(f"| {measure} | untrained | {with_range(untrained, digits)} | | |")
        for arm, runs in found.items():
            cells = [with_range([run[measure][name] for run in runs], digits) for name in SHOWN]
            lines.append(f"| {measure} | {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def changes(found: dict[str, list[dict]]) -> str:
    """A table of what a boundary does to what was learnt before it."""
    lines = ["| arm | largest fall of cosine | steps to come back | CKA of z | overlap of z |"]
    lines.append(f"| --- |{' --- |' * 4}")
    for arm, runs in found.items():
        final = [run["final"] for run in runs]
        steps = [f.get("stream_cosine_recovery") for f in final]
        told = ", ".join("never" if number is None else f"{number:.0f}" for number in steps)
        columns = [[f[f"stream_{name}"] for f in final] for name in ("cosine_drop", "cka", "overlap")]
        fall, cka, overlap = (with_range(values, 3) for values in columns)
        lines.append(f"| {arm} | {fall} | {told} | {cka} | {overlap} |")
    drift = [run["stream"]["drift"] for runs in found.values() for run in runs]
    untrained = [[fmean(each[name]["untrained"][:-1]) for each in drift] for name in ("cka", "overlap")]
    lines.append(f"| untrained | | | {' | '.join(with_range(values, 3) for values in untrained)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
