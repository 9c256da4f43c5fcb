"""Our loaders (resident, FFCV) beside a DataLoader with Pillow. bench/loaders.py has the long table."""

from __future__ import annotations

import pytest
from common import loaders_of, random_images
from pillow import PillowSequences
from torch.utils.data import DataLoader

from seqjepa.engine.config import compose
from seqjepa.loaders.images.beton import BetonImages, has_ffcv
from seqjepa.loaders.loader import SequenceLoader
from seqjepa.loaders.write import write_beton

BATCH, BATCHES, THEIRS = 256, 4, 128  # sequences in our batch, batches in our turn; sequences in a turn of theirs


@pytest.mark.parametrize("task", ["cifar10_rot", "cifar100_aug"])
@pytest.mark.parametrize(
    "kind", ["resident", pytest.param("ffcv", marks=pytest.mark.skipif(not has_ffcv(), reason=""))]
)
def test_loader(beside, device, task, kind, tmp_path):
    config = compose([f"configs/data/{task}.yaml", f"data.batch_size={BATCH}"]).config
    images = random_images(config.data.dataset, BATCH * BATCHES)
    loader = loaders_of(images, config, device, compiled=device.type == "cuda").train
    if kind == "ffcv":
        mean, std = images.statistics()
        path = tmp_path / "train.beton"
        sidecar = write_beton(images, path, split="train")
        store = BetonImages(path, sidecar, batch_size=BATCH, threads=1, device=device)
        loader = SequenceLoader(store, loader.sampler, loader.sequence, mean=mean, std=std, device=device)
    reader = DataLoader(PillowSequences(images, config.sequence), THEIRS)
    epochs = iter(range(10**6))

    def ours() -> int:
        return sum(len(batch.labels) for batch in loader.epoch(next(epochs)))

    def theirs() -> None:
        views, *_ = next(iter(reader))
        views.to(device)

    beside(ours, {"DataLoader with Pillow, no workers": theirs}, BATCH * BATCHES, "sequences", THEIRS)
