"""What a run trains on, opened for its processes."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator

from ...loaders.loader import Loaders, build_loaders
from ..config import Config
from ..runtime.accelerator import compile_mode

__all__ = ["open_loaders"]


def open_loaders(config: Config, accelerator: Accelerator) -> Loaders:
    """Open what a run trains on; each process reads its part of every batch.

    Raises:
        InputError: as `build_loaders`.
    """
    # one process of each machine fetches what is missing, the others find it
    alone = accelerator.local_main_process_first() if config.data.download else contextlib.nullcontext()
    with alone:
        return build_loaders(
            config.data,
            config.sequence,
            config.actions,
            seed=config.run.seed,
            device=accelerator.device,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            micro_batches=config.optim.accumulate,
            threads=torch.get_num_threads(),
            compiled=accelerator.device.type == "cuda" and compile_mode(config.run, accelerator) != "none",
        )
