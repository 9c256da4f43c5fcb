"""Opens the data of a run for its processes."""

import contextlib

import torch
from accelerate import Accelerator

from ...configs.errors import InputError
from ...loaders.loader import Loaders, build_loaders
from ..config import Config
from ..runtime.accelerator import compile_mode


def open_loaders(config: Config, accelerator: Accelerator) -> Loaders:
    """Open what a run trains on; each process reads its part of every batch.

    Raises:
        InputError: as `build_loaders`; the encoder cannot see images of this size; the part of a process cannot be cut
            into micro-batches of two or more.
    """
    # one process of each machine downloads what is missing, the others find it
    with accelerator.local_main_process_first() if config.data.download else contextlib.nullcontext():
        loaders = build_loaders(
            config.data,
            config.sequence,
            config.actions,
            config.stream,
            seed=config.run.seed,
            device=accelerator.device,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            micro_batches=config.optim.accumulate,
            threads=torch.get_num_threads(),
            compiled=accelerator.device.type == "cuda" and compile_mode(config.run, accelerator) != "none",
        )
    size = loaders.sequence.image_size
    config.model.encoder.settled(size).check_images(size)
    local_batch = config.data.batch_size // accelerator.num_processes
    if local_batch % config.optim.accumulate:
        raise InputError(f"does not divide the {local_batch} sequences of a process", "optim.accumulate")
    own_statistics = accelerator.num_processes == 1 or config.run.batch_statistics == "process"
    if own_statistics and local_batch // config.optim.accumulate < 2:
        raise InputError("gives a process one sequence per micro-batch; batch norm needs two", "data.batch_size")
    return loaders
