"""The objects of grids, against a plain loop over cells."""

import random

import pytest
import torch
from grid_data import on_canvas, random_grid

from seqjepa.loaders.grids.objects import FEATURES, components, find_objects, shape_keys
from seqjepa.loaders.images import find_dataset

NEIGHBOURS = {4: [(0, 1), (0, -1), (1, 0), (-1, 0)]}
NEIGHBOURS[8] = NEIGHBOURS[4] + [(1, 1), (1, -1), (-1, 1), (-1, -1)]


def plain_objects(g, slots, connectivity):
    """Cells of each object, in the order of the slots."""
    h, w = len(g), len(g[0])
    seen, found = set(), []
    for start in [(y, x) for y in range(h) for x in range(w)]:
        if start in seen or g[start[0]][start[1]] == 0:
            continue
        cells, todo = set(), [start]
        while todo:
            y, x = todo.pop()
            if (y, x) in cells or not (0 <= y < h and 0 <= x < w) or g[y][x] != g[start[0]][start[1]]:
                continue
            cells.add((y, x))
            todo += [(y + dy, x + dx) for dy, dx in NEIGHBOURS[connectivity]]
        seen |= cells
        found.append(sorted(cells))
    return sorted(found, key=lambda cells: -len(cells))[:slots]  # stable: the first cell decides


def plain_features(g, cells, kind):
    h, w = len(g), len(g[0])
    inside, area = set(cells), len(cells)
    ys, xs = [y for y, _ in cells], [x for _, x in cells]
    top, left, bottom, right = min(ys), min(xs), max(ys), max(xs)
    tall, wide = bottom - top + 1, right - left + 1
    edges = sum((y + dy, x + dx) not in inside for y, x in cells for dy, dx in NEIGHBOURS[4])
    colour = g[ys[0]][xs[0]]
    common = [edges / (h * w), tall / h, wide / w]
    places = [sum(ys) / area / h, sum(xs) / area / w, top / h, left / w, bottom / h, right / w]
    if kind == "legacy":
        return [area / (h * w), *common, wide / tall, 1, colour, *places, area / (h * w), *[0] * 9]
    one_hot = [float(colour == c) for c in range(10)]
    middles = [(top + int((i + 0.5) / 5 * tall), left + int((j + 0.5) / 5 * wide)) for i in range(5) for j in range(5)]
    shape = [float(place in inside) for place in middles]
    return [(area / (h * w)) ** 0.5, *common, *places, *one_hot, *shape, h / 14, w / 14]


def meet(one, other):
    """Whether no row and no column lies between the boxes of two objects."""
    boxes = [(min(v), max(v)) for cells in (one, other) for v in zip(*cells, strict=True)]
    return all(a[1] + 1 >= b[0] and b[1] + 1 >= a[0] for a, b in ((boxes[0], boxes[2]), (boxes[1], boxes[3])))


def test_shapes_are_alike_if_cells_are_but_for_their_place():
    rng = random.Random(3)
    grids = [random_grid(rng, 6) for _ in range(200)]
    objects = find_objects(on_canvas(grids, 7), slots=8)
    keys, shapes = shape_keys(objects).tolist(), {}
    for g, row in zip(grids, keys, strict=True):
        cells = plain_objects(g, 8, 4)
        assert row[len(cells) :] == [0] * (8 - len(cells))
        for places, key in zip(cells, row, strict=False):
            top, left = min(y for y, _ in places), min(x for _, x in places)
            shapes.setdefault(tuple((y - top, x - left) for y, x in places), set()).add(key)
    assert all(len(found) == 1 for found in shapes.values())
    assert len(set.union(*shapes.values())) == len(shapes) > 100


def grids_of(kind):
    if kind == "random":
        rng = random.Random(3)
        return [random_grid(rng, 14) for _ in range(300)]
    pixels = find_dataset(kind).read(None, "test", False).pixels[:300, ..., 0]
    return [[[int(c) for c in row if c < 10] for row in g if row[0] < 10] for g in pixels]


@pytest.mark.parametrize("connectivity", [4, 8])
@pytest.mark.parametrize("features", ["rich", "legacy"])
@pytest.mark.parametrize("kind", ["random", "noise_grids", "object_grids"])
def test_objects_are_those_of_a_plain_loop(kind, features, connectivity):
    grids, slots = grids_of(kind), 16
    found = find_objects(on_canvas(grids, 14), slots, features, connectivity)
    assert found.features.shape == (len(grids), slots, FEATURES[features])
    for row, g in enumerate(grids):
        objects = plain_objects(g, slots, connectivity)
        assert found.present[row].tolist() == [n < len(objects) for n in range(slots)]
        expected = torch.zeros(slots, FEATURES[features])
        if objects:
            expected[: len(objects)] = torch.tensor([plain_features(g, cells, features) for cells in objects])
        torch.testing.assert_close(found.features[row], expected, rtol=0, atol=3e-7)
        adjacent = torch.zeros(slots, slots, dtype=torch.bool)
        for i, one in enumerate(objects):
            for j, other in enumerate(objects):
                adjacent[i, j] = i != j and meet(one, other)
        assert torch.equal(found.adjacent[row], adjacent)
        cells = {(y, x): n for n, object_cells in enumerate(objects) for y, x in object_cells}
        assert all(found.slots[row, y, x] == cells.get((y, x), slots) for y in range(len(g)) for x in range(len(g[0])))


@pytest.mark.parametrize("connectivity", [4, 8])
def test_sixteen_rounds_are_enough_and_any_number_is_no_more_than_right(connectivity):
    grids = on_canvas(grids_of("noise_grids"), 14)
    exact = components(grids, connectivity)
    assert torch.equal(components(grids, connectivity, rounds=16), exact)
    few = components(grids, connectivity, rounds=1)
    assert (few >= exact).all()
    assert (few != exact).any()


def test_grids_of_a_batch_do_not_see_each_other():
    grids = on_canvas(grids_of("object_grids"), 14)
    whole = find_objects(grids)
    for row in range(0, 300, 41):
        alone = find_objects(grids[row : row + 1])
        for one, other in zip(alone, whole, strict=True):
            assert torch.equal(one[0], other[row])


def test_a_grid_of_background_alone_has_no_objects():
    found = find_objects(on_canvas([[[0, 0], [0, 0]]], 14))
    assert not found.present.any()
    assert not found.features.any()
    assert (found.slots == 16).all()
