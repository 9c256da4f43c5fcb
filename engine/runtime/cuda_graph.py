"""A training step as one CUDA graph, which the host launches at once, however many kernels it has."""

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...loaders.batch import each, tensors

WARM_UP = 3  # steps before the capture: optimisers make their state, kernels compile and choose their algorithms


class GraphedStep:
    """Runs a step three times as it is, then captures it, and from then on replays the capture.

    A replay works on the memory of the captured step. So whatever changes from step to step must be a tensor that is
    written in place. Batches are copied into the captured one, and must have its shapes.

    Args:
        work: the step: takes a batch, changes everything else in place, returns a tensor.
        device: that it runs on.
    """

    def __init__(self, work: Callable[[Any], Tensor], device: torch.device):
        self.work = work
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Any = None  # where each batch is copied to
        self.steps = 0

    def __call__(self, batch: NamedTuple) -> Tensor:
        """The result of `work`, which the next step overwrites."""
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
            gc.collect()  # memory that is freed within a capture could break it
            graph = torch.cuda.CUDAGraph()
            # thread_local: other threads, which read data or log, may use the device meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.result = self.work(self.batch)  # recorded, not run
            self.graph = graph
        self.graph.replay()
        return self.result
