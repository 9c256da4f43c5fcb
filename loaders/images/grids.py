"""Generated grids of colours, on which programs of moves begin. They are drawn by counters, the same everywhere."""

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...configs.errors import InputError
from ..draws import GRID_STREAM, words
from ..grids.moves import NUM_COLOURS, OUTSIDE
from .base import Dataset, Images

NUMBERS = {"train": 50_000, "test": 5_000}
SMALLEST, LARGEST = 6, 14
PART = 10_000  # grids that are drawn at a time


class Grids(Dataset):
    """Grids of 6 to 14 rows and columns on a canvas of 14 x 14, whose cells outside are 10."""

    views = "grids"
    side = LARGEST
    needs_root = False
    statistics = (0.0,), (1.0,)  # colours are names: nothing is normalised
    number_of_words: int

    def cells(self, height: Tensor, width: Tensor, words: Tensor) -> Tensor:
        """Colours, int64 [N, 14, 14], of which those outside do not matter.

        Args:
            height, width: int64 [N].
            words: random, int64 [N, number_of_words].
        """
        raise NotImplementedError

    def check(self, place: Path | None, size: Sequence[int], num_classes: int) -> None:
        if place is not None:
            raise InputError(f"{place}: {self.name} are generated; only null is allowed", "data.root")

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        self.check(root, (), 0)
        pixels = _drawn(type(self), split)
        return Images(self, pixels, np.zeros(len(pixels), np.int64), [])


@functools.cache
def _drawn(kind: type[Grids], split: str) -> np.ndarray:
    """All grids of a split, uint8 [N, 14, 14, 1]."""
    grids, parts, line = kind(""), [], torch.arange(LARGEST)
    for start in range(0, NUMBERS[split], PART):
        index = torch.arange(start, min(start + PART, NUMBERS[split])) + (split == "test") * NUMBERS["train"]
        drawn = words(0, GRID_STREAM, 0, index, 1, 2 + kind.number_of_words)[:, 0]
        height, width = (SMALLEST + (drawn[:, i] * (LARGEST - SMALLEST + 1) >> 32) for i in (0, 1))
        inside = (line[:, None] < height[:, None, None]) & (line < width[:, None, None])
        parts.append(torch.where(inside, grids.cells(height, width, drawn[:, 2:]), OUTSIDE).byte())
    return torch.cat(parts)[..., None].numpy()


class NoiseGrids(Grids):
    """Each cell has, with probability 0.7, one of the grid's four to six colours, the background among them."""

    number_of_words = 1 + 2 * LARGEST**2

    def cells(self, height: Tensor, width: Tensor, words: Tensor) -> Tensor:
        colours = 4 + (words[:, :1] * 3 >> 32)
        chosen, colour = words[:, 1:].chunk(2, 1)
        found = torch.where(chosen < round(0.7 * 2**32), colour * colours >> 32, 0)
        return found.view(-1, LARGEST, LARGEST)


class ObjectGrids(Grids):
    """Two to six shapes on a background of 0, later ones over earlier: boxes and lines, filled, hollow or speckled."""

    most = 6
    longest = 6  # rows or columns of a shape
    number_of_words = 1 + most * (7 + longest**2)

    def cells(self, height: Tensor, width: Tensor, words: Tensor) -> Tensor:
        count = 2 + (words[:, 0] * (self.most - 1) >> 32)
        found = torch.zeros(len(words), LARGEST, LARGEST, dtype=torch.int64)
        line = torch.arange(LARGEST)
        for number, drawn in enumerate(words[:, 1:].chunk(self.most, 1)):
            sides = ((0, height - 1), (1, width - 1))
            a, b = (1 + (drawn[:, i] * size.clamp(max=self.longest) >> 32) for i, size in sides)
            flat = drawn[:, 2] >> 29  # in 0 to 7: a quarter are lines
            a, b = torch.where(flat == 0, 1, a), torch.where(flat == 1, 1, b)
            top, left = drawn[:, 3] * (height - a + 1) >> 32, drawn[:, 4] * (width - b + 1) >> 32
            y, x = line[:, None] - top[:, None, None], line - left[:, None, None]
            a, b = a[:, None, None], b[:, None, None]
            box = (y >= 0) & (y < a) & (x >= 0) & (x < b)
            edge = (y == 0) | (y == a - 1) | (x == 0) | (x == b - 1)
            kind = (drawn[:, 5] * 100 >> 32)[:, None, None]
            last = self.longest - 1
            cell = y.clamp(0, last) * self.longest + x.clamp(0, last)  # within the shape
            speckles = drawn[:, 7:].gather(1, cell.flatten(1)).view_as(cell) < round(0.6 * 2**32)
            shape = box & torch.where(kind < 40, True, torch.where(kind < 75, edge, speckles))
            shape &= (number < count)[:, None, None]
            found = torch.where(shape, (1 + (drawn[:, 6] * (NUM_COLOURS - 1) >> 32))[:, None, None], found)
        return found
