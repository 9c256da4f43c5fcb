"""The training step beside the peer's, both with their data: drawn, rendered, moved, learned from."""

from __future__ import annotations

import pytest
from common import loaders_of, random_images
from peer import Peer

from seqjepa.engine.compose import compose
from seqjepa.engine.environment import build_accelerator, compile_mode
from seqjepa.engine.learner import Learner

BATCH = {"cpu": 64, "cuda": 512}
WORKERS = {"cpu": 0, "cuda": 8}  # of the peer: on two cores workers would take the step's


@pytest.mark.parametrize("task", ["cifar10_rot", "cifar100_aug"])
def test_step(beside, device, task):
    batch = BATCH[device.type]
    words = [f"configs/data/{task}.yaml", "configs/tier/paper.yaml", "configs/variant/baseline.yaml"]
    config = compose([*words, f"data.batch_size={batch}"]).config
    images = random_images(config.data.dataset, 32 * batch)
    peer = Peer(config, images, device, WORKERS[device.type])
    accelerator = build_accelerator(config.run, 1)
    compiled = compile_mode(config.run, accelerator) != "none"
    loaders = loaders_of(images, config, device, compiled=compiled)
    learner = Learner(config, loaders, accelerator)
    batches = (batch for epoch in range(10**6) for batch in loaders.train.epoch(epoch))
    steps = iter(range(learner.total_steps))
    beside(lambda: learner.step(next(batches), next(steps)), {"the peer": peer.step}, batch, "sequences")
