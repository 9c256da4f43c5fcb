"""Which images are there? Datasets, with their pixels, labels and statistics.

A dataset is one subclass of `Dataset` in a file of its own and one line in `DATASETS`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .base import Dataset

__all__ = ["DATASETS", "find_dataset"]

# each value of `data.dataset`, with the module and the class behind it, which are imported when they are used
DATASETS = {
    "digits": ".digits:Digits",
    "cifar10": ".cifar:CIFAR10",
    "cifar100": ".cifar:CIFAR100",
    "mnist": ".mnist:MNIST",
    "imagefolder": ".folder:ImageFolder",
    "noise_grids": ".grids:NoiseGrids",
    "object_grids": ".grids:ObjectGrids",
    "arc14": ".arc:Arc14",
    "arc30": ".arc:Arc30",
}


def find_dataset(name: str) -> Dataset:
    """The dataset with a name in `DATASETS`."""
    module, _, kind = DATASETS[name].partition(":")
    return getattr(importlib.import_module(module, __package__), kind)(name)
