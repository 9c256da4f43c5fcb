"""What tests of the engine share: a training step with its loaders."""

import pytest
import torch

from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.step import TrainingStep
from seqjepa.loaders.loader import build_loaders


@pytest.fixture
def build(tiny):
    """Build the step of the tiny run with these words, which may choose other kinds of parts, and its loaders."""

    def make(*words, device="cpu", **loading):
        config = compose(tiny(other=words)).config
        loaders = build_loaders(
            config.data, config.sequence, config.actions, seed=0, device=torch.device(device), **loading
        )
        accelerator = build_accelerator(config.run, config.optim.accumulate)
        torch.manual_seed(0)
        return TrainingStep(config, loaders, accelerator), loaders

    return make
