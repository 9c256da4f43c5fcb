"""Grids for tests: lists of rows, and their canvas."""

import torch

from seqjepa.loaders.grids.moves import OUTSIDE


def random_grid(rng, largest):
    h, w, n = rng.randint(1, largest), rng.randint(1, largest), rng.randint(1, 6)
    colours = rng.sample(range(10), n)
    density = rng.random()
    return [[rng.choice(colours) if rng.random() < density else colours[0] for _ in range(w)] for _ in range(h)]


def on_canvas(grids, side):
    canvas = torch.full((len(grids), side, side), OUTSIDE)
    for place, g in zip(canvas, grids, strict=True):
        place[: len(g), : len(g[0])] = torch.tensor(g)
    return canvas
