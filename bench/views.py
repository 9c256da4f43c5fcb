"""What a training step costs against the number of views, and against what is predicted from what.

    python bench/views.py                                # the minutes tier, the baseline
    python bench/views.py configs/variant/rate_inverse.yaml run.threads=1

A step always passes 512 views through the encoder; with more views in a sequence it has fewer sequences. Images are
noise, because no timing depends on what they show.
"""

from __future__ import annotations

from statistics import median

import torch
from common import command_line, interleaved, loaders_of, random_images, record, spread, wait

from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.step import TrainingStep

FILES = ("configs/data/cifar100_aug.yaml", "configs/tier/minutes.yaml")
PASSES = 512  # views of a step
READINGS = {
    "forward": (),
    "prefixes": ("objective.reading.kind=prefixes",),
    "windows of 1": ("objective.reading.kind=windows", "objective.reading.length=1"),
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("words", nargs="*", metavar="FILE or section.key=value")
    words = parser.parse_args().words
    contenders = {}
    for views in (2, 4, 8, 16, 32):
        for reading, chosen in READINGS.items():
            size = (f"sequence.num_observed={views - 1}", f"data.batch_size={PASSES // views}")
            config = compose([*FILES, *words, *chosen, *size, "data.train_subset=null", "data.val_subset=null"]).config
            accelerator = build_accelerator(config.run, 1)
            images = random_images("cifar100", 2 * config.data.batch_size)
            loaders = loaders_of(images, config, accelerator.device)
            training = TrainingStep(config, loaders, accelerator)

            def step(training=training, loaders=loaders) -> int:
                training.step(next(loaders.train.epoch(0)), 0)
                wait()
                return PASSES

            contenders[views, reading] = step
    rates = interleaved(contenders)
    print("| views | reading | views a second, median (range) of 5, interleaved | beside 4 views, forward |")
    print("| --- | --- | --- | --- |")
    for (views, reading), values in rates.items():
        ratios = [value / other for value, other in zip(values, rates[4, "forward"], strict=True)]
        print(f"| {views} | {reading} | {spread(values)} | {median(ratios):.2f} |")
    rows = [{"views": views, "reading": reading, "rates": values} for (views, reading), values in rates.items()]
    print(f"\nbench/history/{record('views', rows, torch.get_num_threads()).name}")


if __name__ == "__main__":
    main()
