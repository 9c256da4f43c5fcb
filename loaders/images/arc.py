"""Grids of ARC's tasks, on which programs can begin."""

from pathlib import Path

import numpy as np

from ...configs.errors import InputError
from ..grids.arc import ArcTask, on_canvas, read_tasks
from .base import Dataset, Images

FOLDERS = {"train": "training", "test": "evaluation"}
HELD_OUT = 10  # of so many tasks one is for testing, where a folder does not say which are


class ArcGrids(Dataset):
    """The grids of all tasks, each once: inputs and outputs of demonstrations and tests, without their rules.

    `data.root` has training/ and evaluation/, as ARC-AGI-1 and 2 have; of any other folder with tasks, every tenth
    task is for testing. Grids lie on a canvas whose cells outside are 10; what does not fit on it is left out.
    """

    views = "grids"
    statistics = (0.0,), (1.0,)  # colours are names: nothing is normalised
    side: int

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        assert root is not None  # it is needed
        try:
            there = [(root / folder).is_dir() for folder in FOLDERS.values()]
            if any(there) and not all(there):
                (one, other) = sorted(FOLDERS.values(), key=lambda folder: not (root / folder).is_dir())
                raise InputError(f"{root}: has {one}/, but not {other}/")
            tasks = read_tasks(root / FOLDERS[split] if all(there) else root)
        except InputError as error:
            raise InputError(str(error), "data.root") from None
        if not all(there):
            tasks = [task for n, task in enumerate(tasks, start=1) if (n % HELD_OUT == 0) == (split == "test")]
        grids = distinct(tasks)
        fitting = [grid for grid in grids if max(len(grid), len(grid[0])) <= self.side]
        if not fitting:
            found = f"none of the {len(grids)} {split} grids has at most {self.side} rows and columns"
            raise InputError(f"{root}: {found}", "data.root")
        pixels = on_canvas(fitting, self.side)[..., None].byte().numpy()
        return Images(self, pixels, np.zeros(len(pixels), np.int64), [])


class Arc14(ArcGrids):
    """Grids of up to 14 rows and columns, the canvas of the generated ones."""

    side = 14


class Arc30(ArcGrids):
    """All grids; they have at most 30 rows and columns."""

    side = 30


def distinct(tasks: list[ArcTask]) -> list[list[list[int]]]:
    """The grids of tasks, each once, in the order in which they come."""
    grids = (grid for task in tasks for pair in (*task.demonstrations, *task.tests) for grid in pair)
    return list({repr(grid): grid for grid in grids}.values())
