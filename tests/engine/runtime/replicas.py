"""One rank of test_distributed.py: trains tiny networks for six steps each, and prints what it measured, as JSON.

Arguments: for each network the words of a command line, as a JSON list of lists.
"""

from __future__ import annotations

import json
import os
import sys

import torch
from torch import nn

from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.validation import validate

STEPS = 6


class ExactBatchNorm(nn.BatchNorm2d):
    """torch's, in the layout that it sums exactly: channels_last on a CPU is off by 1e-5 to 1e-4 (2.15)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


def train(words: list[str]) -> dict:
    config = compose(words).config
    accelerator = build_accelerator(config.run, config.optim.accumulate)
    loaders = open_loaders(config, accelerator)
    torch.manual_seed(0)
    training = TrainingStep(config, loaders, accelerator)
    if accelerator.num_processes == 1:
        for module in training.model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = ExactBatchNorm
    losses, order = [], []
    batches = (batch for epoch in range(STEPS) for batch in loaders.train.epoch(epoch))
    for step, batch in zip(range(STEPS), batches, strict=False):
        loss = training.step(batch, step)
        losses.append(accelerator.reduce(loss, "mean").item())
        order += accelerator.gather(batch.index).tolist()
        if (step + 1) % config.run.log_every == 0:
            training.embeddings()
    return {
        "losses": losses,
        "order": order,
        **training.epoch_metrics(),
        **validate(training, loaders.validation).metrics,
    }


if __name__ == "__main__":
    found = [train(words) for words in json.loads(sys.argv[1])]
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(found), flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that is torn down: not what is tested here
