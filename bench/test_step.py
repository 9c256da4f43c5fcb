"""The training step beside the peer's, both including their data: drawing, rendering and moving it to the device."""

from __future__ import annotations

import os

import pytest
import torch
from common import loaders_of, random_images
from peer import Peer

from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.step import TrainingStep

ON_GPU = torch.cuda.is_available()
BATCH = 512 if ON_GPU else 64
WORKERS = min(8, len(os.sched_getaffinity(0))) if ON_GPU else 0  # the peer's; on two cores they would slow the step
MODES = ("default", "graph") if ON_GPU else ("none",)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # torch has threads when the peer's workers start
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", ["cifar10_rot", "cifar100_aug"])
def test_step(beside, device, task, mode):
    torch.compiler.reset()
    words = [f"configs/data/{task}.yaml", "configs/tier/paper.yaml", "configs/variant/baseline.yaml"]
    config = compose([*words, f"data.batch_size={BATCH}", f"run.compile={mode}"]).config
    images = random_images(config.data.dataset, 32 * BATCH)
    peer = Peer(config, images, device, WORKERS)
    accelerator = build_accelerator(config.run, 1)
    loaders = loaders_of(images, config, device, compiled=mode != "none")
    training = TrainingStep(config, loaders, accelerator)
    batches = (batch for epoch in range(10**6) for batch in loaders.train.epoch(epoch))
    steps = iter(range(training.total_steps))
    beside(lambda: training.step(next(batches), next(steps)), {"the peer": peer.step}, BATCH, "sequences")
