"""Reads tasks of ARC: folders of JSON files, each with pairs of grids that share a rule."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...configs.errors import InputError, shown
from .moves import NUM_COLOURS, OUTSIDE

LARGEST = 30  # rows or columns
Grid = list[list[int]]


class Pair(NamedTuple):
    """A grid and what the rule of its task makes of it."""

    input: Grid
    output: Grid


class ArcTask(NamedTuple):
    """A task: pairs that show its rule, and pairs to test it by."""

    name: str
    demonstrations: list[Pair]
    tests: list[Pair]

    @property
    def side(self) -> int:
        """The most rows or columns of its grids."""
        grids = [grid for pair in (*self.demonstrations, *self.tests) for grid in pair]
        return max(max(len(grid), len(grid[0])) for grid in grids)


def read_tasks(folder: Path) -> list[ArcTask]:
    """The tasks of all .json files in a folder and the folders below it, in the order of their paths.

    Further keys of a file are ignored. ARC-AGI-1 and 2 (`data/training` and `data/evaluation`, which are never read
    together unless their parent is given) and ConceptARC (`corpus`) have this form.

    Raises:
        InputError: there are no files, or one is no task; the message names it and says what is wrong.
    """
    try:
        files = sorted(folder.rglob("*.json")) if folder.is_dir() else []
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    if not files:
        raise InputError(f"{folder}: no .json files there, nor in the folders below")
    return [_read(path, path.relative_to(folder).with_suffix("").as_posix()) for path in files]


def _read(path: Path, name: str) -> ArcTask:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is not JSON") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: is no object with train and test")
    parts = []
    for key in ("train", "test"):
        pairs = content.get(key)
        if not isinstance(pairs, list) or not pairs:
            raise InputError(f"{path}: {key} is no list of pairs")
        found = []
        for number, pair in enumerate(pairs, start=1):
            grids = {}
            for side in ("input", "output"):
                value = pair.get(side) if isinstance(pair, dict) else None
                if problem := _fault(value):
                    raise InputError(f"{path}: {side} of {key} pair {number} {problem}")
                grids[side] = value
            found.append(Pair(**grids))
        parts.append(found)
    return ArcTask(name, *parts)


def _fault(grid: Any) -> str | None:
    """Why something is no grid; None if it is one."""
    if grid is None:
        return "is missing"
    if not isinstance(grid, list) or not all(isinstance(row, list) for row in grid):
        return "is no list of rows"
    if not grid or not grid[0]:
        return "is empty"
    if len({len(row) for row in grid}) > 1:
        return "has rows of different lengths"
    if max(len(grid), len(grid[0])) > LARGEST:
        return f"has {len(grid)} rows of {len(grid[0])}; at most {LARGEST} are allowed"
    for cell in (cell for row in grid for cell in row):
        if type(cell) is not int or not 0 <= cell < NUM_COLOURS:
            return f"has the colour {shown(str(cell))}; 0 to {NUM_COLOURS - 1} are allowed"
    return None


def on_canvas(grids: list[Grid], side: int) -> Tensor:
    """Grids in the upper left corner of a canvas of side x side cells, int64 [N, side, side], 10 outside."""
    canvas = torch.full((len(grids), side, side), OUTSIDE)
    for place, grid in zip(canvas, grids, strict=True):
        place[: len(grid), : len(grid[0])] = torch.tensor(grid)
    return canvas
