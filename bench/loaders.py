"""Compares loaders (FFCV, resident, torch's DataLoader with Pillow): `python bench/loaders.py CIFAR100`.

CIFAR100 is a folder with train/ and test/, or torchvision's own. Each loader's sequences per second are given beside
what the training step of this machine consumes (the paper's whole model with ResNet-18, batch 64).
"""

from __future__ import annotations

import tempfile
from statistics import median

from common import command_line, cpu, existing_folder, interleaved, record, spread, wait
from pillow import PillowSequences
from torch.utils.data import DataLoader

from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.step import TrainingStep
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.images.beton import has_ffcv
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.write import main as write

BATCH, SEQUENCES, STEP_BATCH = 256, 2048, 64


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("root", type=existing_folder, metavar="CIFAR100")
    root = parser.parse_args().root
    words = ["configs/data/cifar100_aug.yaml", "run.threads=1", f"data.train_subset={SEQUENCES}"]
    config = compose([*words, f"data.root={root}", f"data.batch_size={BATCH}"]).config
    accelerator = build_accelerator(config.run, 1)
    device = accelerator.device
    sections = (config.sequence, config.actions)
    loaders = {"resident": build_loaders(config.data, *sections, seed=0, device=device)}
    with tempfile.TemporaryDirectory() as betons:
        if has_ffcv() and write([str(root), betons, "--dataset", "cifar100"]) == 0:
            data = config.data.model_copy(update={"root": betons, "loader": "ffcv"})
            loaders["ffcv"] = build_loaders(data, *sections, seed=0, device=device)
        contenders = {name: epoch_of(loader.train) for name, loader in loaders.items()}
        train = loaders["resident"].train
        pixels, labels, _ = (x.cpu().numpy() for x in next(train.images.batches([train.sampler.indices])))
        dataset = PillowSequences(Images(find_dataset("cifar100"), pixels, labels, []), config.sequence)
        for workers in (0, 2):
            reader = DataLoader(dataset, BATCH, num_workers=workers, persistent_workers=workers > 0)
            contenders[f"DataLoader with Pillow, {workers} workers"] = count(reader)
        contenders["training step"] = training_step([*words, f"data.root={root}"], accelerator)
        rates = interleaved(contenders)
    consumed = rates.pop("training step")
    print(f"cifar100_aug, sequences a second on {device.type}, {cpu()}: median (range) of 5, interleaved")
    print("one thread, and one more for each worker\n" if "ffcv" in rates else "FFCV is not installed: left out\n")
    print("| loader | yields | the training step consumes | ratio |\n| --- | --- | --- | --- |")
    for name, values in rates.items():
        print(f"| {name} | {spread(values)} | {spread(consumed)} | {median(values) / median(consumed):.1f} |")
    rows = [{"loader": name, "rates": values} for name, values in rates.items()]
    print(f"\nbench/history/{record('loaders', [*rows, {'training step': consumed}], 1).name}")


def training_step(words: list[str], accelerator):
    """Number of sequences in a few finished optimiser steps of the paper's model."""
    config = compose([*words, f"data.batch_size={STEP_BATCH}"]).config
    loaders = build_loaders(config.data, config.sequence, config.actions, seed=0, device=accelerator.device)
    training = TrainingStep(config, loaders, accelerator)
    batches = [batch for batch, _ in zip(loaders.train.epoch(0), range(4), strict=False)]

    def work() -> int:
        for number, batch in enumerate(batches):
            training.step(batch, number)
        wait()
        return STEP_BATCH * len(batches)

    return work


def epoch_of(loader):
    """Number of sequences in one finished epoch."""

    def work() -> int:
        total = sum(len(batch.views) for batch in loader.epoch(0))
        wait()
        return total

    return work


def count(reader: DataLoader):
    return lambda: sum(len(views) for views, *_ in reader)


if __name__ == "__main__":
    main()
