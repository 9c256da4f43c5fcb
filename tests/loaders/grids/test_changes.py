"""Changes of the grids on which programs begin: each against its plain form, cell by cell."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from grid_data import on_canvas, random_grid

from seqjepa.loaders.config import ActionsConfig, ChangesConfig, ProgramConfig
from seqjepa.loaders.draws import words
from seqjepa.loaders.grids.changes import changed
from seqjepa.loaders.grids.moves import OUTSIDE, apply
from seqjepa.loaders.sequences import build_sequence

NUMBER, SIDE = 800, 12


@pytest.fixture(scope="module")
def lists():
    rng = random.Random(0)
    return [random_grid(rng, SIDE) for _ in range(NUMBER)]


@pytest.fixture(scope="module")
def grids(lists):
    return on_canvas(lists, SIDE)


@pytest.fixture(scope="module")
def key():
    return words(0, 0, 0, torch.arange(NUMBER), 1, 2)[:, 0]


def cut(grid):
    """The cells of a canvas that are inside, as an array of rows and columns."""
    rows, columns = (grid != OUTSIDE).any(1), (grid != OUTSIDE).any(0)
    return grid[: int(rows.sum()), : int(columns.sum())].numpy()


def test_nothing_is_changed_unless_asked(grids, key):
    assert torch.equal(changed(grids, key, ChangesConfig()), grids)


def test_a_process_may_have_no_grids(grids, key):
    """Where a batch has fewer images than there are processes."""
    every = ChangesConfig(symmetries=True, colours=True, shift=2, lost=0.1, blank=0.1, noise=0.1)
    assert changed(grids[:0], key[:0], every).shape == (0, SIDE, SIDE)


def test_symmetries_are_the_eight_of_the_square(lists, grids, key):
    counted = Counter()
    for before, after in zip(lists, changed(grids, key, ChangesConfig(symmetries=True)), strict=True):
        turned = [np.rot90(np.array(before), -turns) for turns in range(4)]
        eight = [*turned, *(np.flipud(grid) for grid in turned)]
        matching = [number for number, grid in enumerate(eight) if np.array_equal(grid, cut(after))]
        assert matching
        if len(matching) == 1:  # of a grid that has no symmetry
            counted[matching[0]] += 1
    assert set(counted) == set(range(8))
    assert min(counted.values()) > 0.6 * sum(counted.values()) / 8


def test_colours_change_places(grids, key):
    after = changed(grids, key, ChangesConfig(colours=True))
    became = torch.zeros(10, 10)
    for one, other in zip(grids, after, strict=True):
        pairs = set(zip(one.flatten().tolist(), other.flatten().tolist(), strict=True))
        assert len({a for a, _ in pairs}) == len({b for _, b in pairs}) == len(pairs)  # one to one
        for a, b in pairs - {(OUTSIDE, OUTSIDE)}:
            became[a, b] += 1
    assert torch.equal(after == OUTSIDE, grids == OUTSIDE)
    assert (became[0, 1:] == 0).all()
    assert (became[1:, 0] == 0).all()
    shares = became[1:, 1:] / became[1:, 1:].sum(1, keepdim=True)
    assert ((shares - 1 / 9).abs() < 0.08).all()


def test_shifts_bring_in_zeros(lists, grids, key):
    after = changed(grids, key, ChangesConfig(shift=2))
    seen = set()
    for before, moved in zip(lists, after, strict=True):
        height, width = len(before), len(before[0])

        def shifted(dy, dx, before=before, height=height, width=width):
            return [
                [before[y - dy][x - dx] if 0 <= y - dy < height and 0 <= x - dx < width else 0 for x in range(width)]
                for y in range(height)
            ]

        by = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if shifted(dy, dx) == cut(moved).tolist()]
        assert by
        if len(by) == 1:
            seen.add(by[0])
    assert len(seen) == 25


def test_objects_are_lost_whole(lists, grids, key):
    after = changed(grids, key, ChangesConfig(lost=0.3))
    lost = kept = 0
    for before, less in zip(lists, after, strict=True):
        left, height, width = cut(less), len(before), len(before[0])
        assert left.shape == (height, width)
        todo = {(y, x) for y in range(height) for x in range(width)}
        while todo:
            start = todo.pop()
            part, edge = {start}, [start]
            while edge:
                y, x = edge.pop()
                for near in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                    if near in todo and before[near[0]][near[1]] == before[y][x]:
                        todo.remove(near)
                        part.add(near)
                        edge.append(near)
            colour = before[start[0]][start[1]]
            (remains,) = {int(left[y][x]) for y, x in part}
            assert remains in (colour, 0)
            if colour:
                lost, kept = lost + (remains == 0), kept + (remains != 0)
    assert lost / (lost + kept) == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", ["blank", "noise"])
def test_cells_become_blank_or_noise(kind, grids, key):
    after = changed(grids, key, ChangesConfig(**{kind: 0.2}))
    inside, moved = grids != OUTSIDE, after != grids
    assert not moved[~inside].any()
    coloured = inside & (grids != 0)
    if kind == "blank":
        assert (after[moved] == 0).all()
        assert moved[coloured].float().mean().item() == pytest.approx(0.2, abs=0.01)
    else:  # one of ten times it is the colour that was there
        assert moved[inside].float().mean().item() == pytest.approx(0.2 * 0.9, abs=0.01)
        assert ((after[moved].bincount(minlength=10) / moved.sum() - 0.1).abs() < 0.03).all()


ALL = ChangesConfig(symmetries=True, colours=True, shift=1, lost=0.15, blank=0.1, noise=0.05)


def test_a_grid_is_changed_alike_in_any_batch(grids, key):
    rows = torch.tensor([700, 3, 4, 55])
    assert torch.equal(changed(grids[rows], key[rows], ALL), changed(grids, key, ALL)[rows])


def test_programs_begin_on_the_changed_grid(grids):
    sequence = build_sequence(
        ProgramConfig(changes=ALL), (SIDE, SIDE), ActionsConfig(normalization="none"), torch.device("cpu")
    )
    views, steps = sequence.sample(grids[:100, ..., None].byte(), words(0, 0, 0, torch.arange(100), 4, 2))
    frames = views[:, :, 0].long()
    assert not torch.equal(frames[:, 0], grids[:100])
    for number in range(3):
        assert torch.equal(apply(frames[:, number], steps[:, number + 1].long()), frames[:, number + 1])
