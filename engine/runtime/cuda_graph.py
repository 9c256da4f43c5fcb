"""A training step as one CUDA graph: the host launches one program, however many kernels it has."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...loaders.batch import each, tensors

__all__ = ["GraphedStep"]

WARM_UP = 3  # steps before the capture: optimisers make their state, kernels compile and choose their algorithms


class GraphedStep:
    """Runs a step as it is three times, then captures it, and replays the capture from then on.

    A replay repeats what was captured on the same memory. So all that changes from step to step has to be a tensor
    that is written in place; batches are copied to where the captured one lay, and must be of its shapes.

    Args:
        work: takes a batch, changes what it changes in place, returns a tensor.
        device: of all of it.
    """

    def __init__(self, work: Callable[[NamedTuple], Tensor], device: torch.device):
        self.work = work
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: NamedTuple | None = None  # where each batch is copied to
        self.steps = 0

    def __call__(self, batch: NamedTuple) -> Tensor:
        """What `work` returns; overwritten by the next step."""
        if self.batch is None:
            self.batch = each(batch, Tensor.clone)
        for place, field in zip(tensors(self.batch), tensors(batch), strict=True):
            place.copy_(field, non_blocking=True)
        self.steps += 1
        if self.steps <= WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.work(self.batch)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.capture()
        self.graph.replay()
        return self.result

    def capture(self) -> None:
        """Record a step; nothing is computed yet."""
        gc.collect()  # what is freed within a capture could break it
        self.graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that reads data or logs may use the device meanwhile
        with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
            self.result = self.work(self.batch)
