"""Each move, against its definition in plain Python on lists, on thousands of grids."""

import random

import pytest
import torch
from grid_data import on_canvas, random_grid

from seqjepa.loaders.grids.moves import COLUMNS, Move, apply, region, sizes


def mirror_x(g, p):
    return g[::-1]


def mirror_y(g, p):
    return [row[::-1] for row in g]


def rotate(g, p):
    for _ in range(p["turns"]):
        g = [list(column) for column in zip(*g[::-1], strict=True)]
    return g


def translate(g, p):
    h, w = len(g), len(g[0])
    found = [[p["first"]] * w for _ in range(h)]
    for y in range(h):
        for x in range(w):
            if 0 <= y + p["dy"] < h and 0 <= x + p["dx"] < w:
                found[y + p["dy"]][x + p["dx"]] = g[y][x]
    return found


def recolour(g, p):
    return [[p["second"] if c == p["first"] else c for c in row] for row in g]


def invert(g, p):
    colours = sorted({c for row in g for c in row})
    return [[colours[len(colours) - 1 - colours.index(c)] for c in row] for row in g]


def threshold(g, p):
    return [[p["second"] if c > p["level"] else p["first"] for c in row] for row in g]


def spread(inside, y, x):
    """Cells of a set that are reached from one of them, by a stack."""
    found, todo = set(), [(y, x)] if (y, x) in inside else []
    while todo:
        y, x = todo.pop()
        if (y, x) in inside and (y, x) not in found:
            found.add((y, x))
            todo += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return found


def flood(g, p):
    colour = g[p["y"]][p["x"]]
    cells = {(y, x) for y, row in enumerate(g) for x, c in enumerate(row) if c == colour}
    reached = spread(cells, p["y"], p["x"])
    return [[p["first"] if (y, x) in reached else c for x, c in enumerate(row)] for y, row in enumerate(g)]


def extract(g, p):
    cells = [c for row in g for c in row]
    common = max(cells, key=lambda c: (cells.count(c), -cells.index(c)))
    inside = {(y, x) for y, row in enumerate(g) for x, c in enumerate(row) if c != common}
    shape = spread(inside, p["y"], p["x"])
    if not shape:
        return [[p["first"]]]
    ys, xs = [y for y, _ in shape], [x for _, x in shape]
    return [
        [g[y][x] if (y, x) in shape else p["first"] for x in range(min(xs), max(xs) + 1)]
        for y in range(min(ys), max(ys) + 1)
    ]


def merge(g, p):
    h, w, pair = len(g), len(g[0]), (p["first"], p["second"])

    def near(y, x, colour):
        around = [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
        return any(0 <= i < h and 0 <= j < w and g[i][j] == colour for i, j in around)

    found = [list(row) for row in g]
    for y in range(h):
        for x in range(w):
            for one, other in (pair, pair[::-1]):
                if g[y][x] == one and near(y, x, other):
                    found[y][x] = p["third"]
    return found


PLAIN = (mirror_x, mirror_y, rotate, translate, recolour, invert, threshold, flood, extract, merge)


def step(move, g, rng):
    h, w = len(g), len(g[0])
    p = {"move": int(move), "turns": rng.randint(1, 3), "dx": rng.randint(-w, w), "dy": rng.randint(-h, h)}
    p |= {"y": rng.randrange(h), "x": rng.randrange(w), "level": rng.randint(0, 9)}
    palette = sorted({c for row in g for c in row})
    p |= {name: rng.choice([*palette, rng.randrange(10)]) for name in ("first", "second", "third")}
    return p


@pytest.mark.parametrize(("largest", "number"), [(14, 1000), (30, 200)])
@pytest.mark.parametrize("move", list(Move), ids=lambda move: move.name.lower())
def test_a_move_is_its_definition(move, largest, number):
    rng = random.Random(int(move))
    grids = [random_grid(rng, largest) for _ in range(number)]
    given = [step(move, g, rng) for g in grids]
    expected = on_canvas([PLAIN[move](g, p) for g, p in zip(grids, given, strict=True)], largest)
    steps = torch.tensor([[p[name] for name in COLUMNS] for p in given])
    found = apply(on_canvas(grids, largest), steps)
    assert torch.equal(found, expected)
    # most of them do something, so that the identity would not pass
    assert (found != on_canvas(grids, largest)).flatten(1).any(1).double().mean() > 0.3


def test_moves_of_a_batch_do_not_see_each_other():
    rng = random.Random(0)
    grids = [random_grid(rng, 14) for _ in range(300)]
    given = [step(rng.choice(list(Move)), g, rng) for g in grids]
    steps, canvas = torch.tensor([[p[name] for name in COLUMNS] for p in given]), on_canvas(grids, 14)
    whole = apply(canvas, steps)
    for row in range(0, 300, 37):
        assert torch.equal(apply(canvas[row : row + 1], steps[row : row + 1])[0], whole[row])


def test_regions_that_wind_are_found_whole():
    """A staircase and a spiral, in which a cell is many turns away from another."""
    side = 30
    stairs = torch.zeros(side, side, dtype=torch.bool)
    for number in range(side - 1):
        stairs[number, number] = stairs[number, number + 1] = True
    spiral = torch.zeros(side, side, dtype=torch.bool)
    y, x, dy, dx = 0, 0, 0, 1
    for _ in range(1000):
        spiral[y, x] = True
        ahead = [(y + k * dy, x + k * dx) for k in (1, 2)]
        blocked = not (0 <= ahead[0][0] < side and 0 <= ahead[0][1] < side)
        blocked = blocked or (0 <= ahead[1][0] < side and 0 <= ahead[1][1] < side and bool(spiral[ahead[1]]))
        if blocked:
            dy, dx = dx, -dy
            if spiral[(y + 2 * dy) % side, (x + 2 * dx) % side]:
                break
        y, x = y + dy, x + dx
    masks = torch.stack([stairs, spiral])
    assert masks.flatten(1).sum(1).min() > 50
    start = torch.tensor([0, 0])
    assert torch.equal(region(masks, start, start), masks)
    alone = torch.zeros(1, side, side, dtype=torch.bool)
    alone[0, 3, 3] = alone[0, 4, 4] = True  # a corner does not connect
    assert region(alone, torch.tensor([3]), torch.tensor([3])).sum() == 1
    assert region(alone, torch.tensor([3]), torch.tensor([4])).sum() == 0


def test_sizes_are_those_of_the_grid():
    rng = random.Random(1)
    grids = [random_grid(rng, 14) for _ in range(100)]
    heights, widths = sizes(on_canvas(grids, 14))
    assert heights.tolist() == [len(g) for g in grids]
    assert widths.tolist() == [len(g[0]) for g in grids]
