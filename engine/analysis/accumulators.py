"""Metrics that accumulate on the device without host syncs, and are copied to the host once per epoch."""

import copy
import math
from typing import Any, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...kernels.precision import widest


class Mean(nn.Module):
    """Mean of scalars, multiplied by `scale` (100 for percent)."""

    total: Tensor
    count: Tensor

    def __init__(self, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("count", torch.zeros(()))

    def update(self, total: Tensor, count: int) -> None:
        """Add a sum over `count` items."""
        self.total += total.detach()
        self.count += count

    def compute(self) -> float:
        """NaN before the first update."""
        return self.scale * self.total.item() / self.count.item() if self.count.item() else math.nan


class Largest(nn.Module):
    """The largest of numbers that are not negative, and the same on all processes: only one of these may add them."""

    value: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    def update(self, value: Tensor) -> None:
        self.value.copy_(self.value.maximum(value.detach().to(self.value.dtype)))

    def compute(self) -> float:
        return self.value.item()


class R2(nn.Module):
    """Coefficient of determination of each target dimension: 1 - residual / variance, over all items.

    A dimension that is constant in the data has no R² and is left out; the reference code counts it as 0.
    """

    total: Tensor
    squares: Tensor
    residual: Tensor
    count: Tensor

    def __init__(self, dims: int):
        super().__init__()
        for name in ("total", "squares", "residual"):
            self.register_buffer(name, torch.zeros(dims))
        self.register_buffer("count", torch.zeros(()))

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Add N items; both tensors are [N, dims]."""
        target = target.detach().to(self.total.dtype)
        self.total += target.sum(0)
        self.squares += target.square().sum(0)
        self.residual += (target - predicted.detach().to(self.total.dtype)).square().sum(0)
        self.count += len(target)

    def compute(self) -> list[float]:
        """R² of each dimension; NaN where it is constant."""
        count = max(self.count.item(), 1.0)
        spread = self.squares - self.total.square() / count
        # for a constant, rounding in float64 leaves 1e-16 of the squares, and float32 inputs 1e-7 of their values
        constant = spread <= 1e-10 * self.squares + 1e-12 * count
        score = 1 - self.residual / spread
        return torch.where(constant, torch.nan, score).tolist()


def mean_r2(scores: list[float]) -> float:
    """Mean over the dimensions that have an R²; NaN if none has."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan


def r2_score(predicted: Tensor, target: Tensor) -> float:
    """Mean R² of predictions [N, K] over the dimensions in which the target [N, K] varies; NaN if it does in none."""
    score = R2(target.shape[1]).to(target.device, widest(target.device))
    score.update(predicted, target)
    return mean_r2(score.compute())


class MetricBank(nn.ModuleDict):
    """Named metrics in double precision (single on Apple's GPUs), reset, reduced and read together."""

    def __init__(self, metrics: dict[str, nn.Module]):
        super().__init__(metrics)
        self.double()

    def __getitem__(self, key: str) -> Any:  # each kind of metric has an `update` of its own
        return super().__getitem__(key)

    def to(self, device: torch.device) -> Self:
        """The same on a device."""
        return super().to(device, widest(device))

    def reset(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()

    def collect(self, accelerator: Accelerator) -> Self:
        """A copy on the CPU in double precision, summed over all processes. This is the only host sync."""
        buffers = list(self.buffers())
        if not buffers:
            return self
        sums: Any = accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), reduction="sum")
        parts = sums.cpu().double().split([buffer.numel() for buffer in buffers])
        # deepcopy takes an object's copy from its memo if it is there: each buffer is copied as its sum
        return copy.deepcopy(self, {id(own): part.view_as(own) for own, part in zip(buffers, parts, strict=True)})

    def compute(self) -> dict[str, Any]:
        """The result of each metric, by name."""
        return {name: self[name].compute() for name in self}


def with_float64(x: Tensor) -> Tensor:
    """The same where float64 is: on its device, or on the CPU if that has none."""
    return x if widest(x.device) is torch.float64 else x.cpu()


def centred_cosine(prediction: Tensor, target: Tensor, accelerator: Accelerator) -> float:
    """Mean cosine of predictions and targets, of which each process has N rows [N, D], centred over all processes.

    A prediction that is the same for every input scores 0, however close it is to the mean target.
    """
    wide = widest(prediction.device)
    prediction, target = prediction.to(wide), target.to(wide)
    count = torch.tensor([float(len(prediction))], dtype=wide, device=prediction.device)
    sums = accelerator.reduce(torch.cat([prediction.sum(0), target.sum(0), count]), reduction="sum")
    mean_prediction, mean_target = (sums[:-1] / sums[-1]).chunk(2)
    cosine = torch.cosine_similarity(prediction - mean_prediction, target - mean_target, dim=-1)
    total = accelerator.reduce(cosine.sum(), reduction="sum")
    return (total / sums[-1]).item()
