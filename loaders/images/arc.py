"""Grids of ARC's tasks, on which programs can begin."""

from pathlib import Path

import numpy as np

from ...configs.errors import InputError
from ..grids.arc import ArcTask, on_canvas, read_tasks
from .base import Dataset, Images

FOLDERS = ("training", "evaluation")
HELD_OUT = 10  # of so many tasks one is for testing, where a folder does not say which are


class ArcGrids(Dataset):
    """The grids of all tasks, each once: inputs and outputs of demonstrations and tests, without their rules.

    `data.root` has training/ and evaluation/, as ARC-AGI-1 and 2 have; of any other folder with tasks, every tenth
    task is for testing. No grid is in both splits. Grids lie on a canvas whose cells outside are 10; what does not fit
    on it is left out.
    """

    views = "grids"
    statistics = (0.0,), (1.0,)  # colours are names: nothing is normalised
    side: int

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        assert root is not None  # it is needed
        try:
            train, test = _splits(root)
        except InputError as error:
            raise InputError(str(error), "data.root") from None
        known = {repr(grid) for grid in distinct(train)}
        grids = distinct(train) if split == "train" else [g for g in distinct(test) if repr(g) not in known]
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


def _splits(root: Path) -> tuple[list[ArcTask], list[ArcTask]]:
    """The tasks to train on, and those to test on."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    there = [(root / folder).is_dir() for folder in FOLDERS]
    if all(there):
        train, test = (read_tasks(root / folder) for folder in FOLDERS)
        return train, test
    if any(there):
        one, other = sorted(FOLDERS, key=lambda folder: not (root / folder).is_dir())
        raise InputError(f"{root}: has {one}/, but not {other}/")
    for folder in sorted(root.rglob(FOLDERS[0])):  # else tasks for evaluation would be trained on
        if (folder.parent / FOLDERS[1]).is_dir():
            raise InputError(f"{root}: {FOLDERS[0]}/ and {FOLDERS[1]}/ are in {folder.parent}, which is to be given")
    tasks = read_tasks(root)
    last = slice(HELD_OUT - 1, None, HELD_OUT)
    return [task for number, task in enumerate(tasks, start=1) if number % HELD_OUT], tasks[last]


def distinct(tasks: list[ArcTask]) -> list[list[list[int]]]:
    """The grids of tasks, each once, in the order in which they come."""
    grids = (grid for task in tasks for pair in (*task.demonstrations, *task.tests) for grid in pair)
    return list({repr(grid): grid for grid in grids}.values())
