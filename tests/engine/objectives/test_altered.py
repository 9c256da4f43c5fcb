"""Invariances of z of grids: what is altered, against the moves of programs, and what the terms then are."""

import pytest
import torch
from grid_data import on_canvas

from seqjepa.engine.objectives.config import MirroredConfig, RecolouredConfig, ShiftedConfig
from seqjepa.loaders.grids.moves import COLUMNS, DX, DY, MOVE, Move, apply
from seqjepa.loaders.images import find_dataset

WORDS = ("sequence.kind=program", "data.dataset=object_grids", "actions.normalization=none", "gates.enforce=false")
WORDS += ("objective.prediction.kind=infonce", "control.enabled=false")
TERMS = tuple(f"objective.{name}.weight=0.1" for name in ("recoloured", "shifted", "mirrored"))


@pytest.fixture(scope="module")
def grids():
    images = find_dataset("object_grids").read(None, "test", False)
    return torch.as_tensor(images.pixels[:60, ..., 0]).long().view(20, 3, 1, 14, 14)


def moved(grids, **columns):
    flat = grids.flatten(0, 2)
    steps = torch.zeros(len(flat), len(COLUMNS), dtype=torch.int64)
    for number, values in ((MOVE, columns["move"]), (DX, columns.get("dx", 0)), (DY, columns.get("dy", 0))):
        steps[:, number] = torch.as_tensor(values)
    return apply(flat, steps).view_as(grids)


def test_colours_change_places_in_all_grids_alike(grids):
    term, seen = RecolouredConfig(weight=1.0).build(), set()
    for step in range(20):
        found = term.views(grids.float(), torch.tensor(step))
        assert found.dtype == torch.float32
        pairs = set(zip(grids.flatten().tolist(), found.flatten().tolist(), strict=True))
        table = dict(pairs)
        assert len(pairs) == len(table) == 11  # each colour becomes one colour
        assert table[0] == 0
        assert table[10] == 10
        assert sorted(table.values()) == list(range(11))
        seen.add(tuple(table[colour] for colour in range(11)))
    assert len(seen) == 20


def test_rows_or_columns_are_reversed(grids):
    term, seen = MirroredConfig(weight=1.0).build(), []
    ways = [moved(grids, move=move) for move in (Move.MIRROR_X, Move.MIRROR_Y)]
    for step in range(20):
        found = term.views(grids, torch.tensor(step))
        seen.append([torch.equal(found, way) for way in ways])
    assert all(sum(ways) == 1 for ways in seen)
    assert 3 < seen.count([True, False]) < 17


def test_grids_are_shifted_by_shares_of_their_sides():
    """Each grid by one shift, and all by whole cells next to one share of their sides, of at most a fifth."""
    term, seen = ShiftedConfig(weight=1.0, most=0.2).build(), set()
    generator = torch.Generator().manual_seed(0)
    sides = [(h, w) for h in (5, 9, 12, 14) for w in (6, 10, 14)]
    full = [torch.randint(1, 10, (h, w), generator=generator).tolist() for h, w in sides]
    grids = on_canvas(full, 14)[:, None, None]
    for step in range(12):
        found = term.views(grids, torch.tensor(step))
        bounds = [[-0.2, 0.2], [-0.2, 0.2]]
        for number, (h, w) in enumerate(sides):
            one, other = grids[number : number + 1], found[number]
            shifts = [
                (dy, dx)
                for dy in range(-3, 4)
                for dx in range(-3, 4)
                if torch.equal(moved(one, move=Move.TRANSLATE, dy=dy, dx=dx)[0], other)
            ]
            assert len(shifts) == 1
            for bound, cells, size in zip(bounds, shifts[0], (h, w), strict=True):
                bound[:] = max(bound[0], (cells - 0.5) / size), min(bound[1], (cells + 0.5) / size)
        assert all(low <= high for low, high in bounds)
        seen.add(tuple(map(tuple, bounds)))
    assert len(seen) > 9


@pytest.fixture
def training(build):
    def make(*words):
        training, loaders = build(*WORDS, *words)
        return training, next(loaders.train.epoch(0))

    return make


@pytest.mark.parametrize("target", ["ema", "shared"])
def test_a_term_is_the_distance_of_two_encodings(training, target):
    step, batch = training("model.encoder.kind=grid_objects", f"target.kind={target}", *TERMS)
    (given,) = step.step_inputs(batch).split(1)
    found = step.losses.eval()(given, torch.tensor(5)).terms
    views = batch.views if target == "shared" else batch.views[:, :-1]
    z = step.model.encoder(views)
    for name in ("recoloured", "shifted", "mirrored"):
        other = step.model.encoder(step.objective.others[name].views(views, torch.tensor(5)))
        assert found[f"loss_{name}"].item() == pytest.approx((z - other).square().mean().item(), rel=1e-5)
        assert found[f"loss_{name}"].item() > 1e-4


def test_who_sees_no_colours_loses_nothing_by_them(training):
    """Of the features of objects, only the colours are left out of the first layer."""
    step, batch = training("model.encoder.kind=grid_objects", "target.kind=shared", *TERMS)
    with torch.no_grad():
        step.model.encoder.embedding[0].weight[:, 10:20] = 0
    (given,) = step.step_inputs(batch).split(1)
    found = step.losses.eval()(given, torch.tensor(0)).terms
    assert found["loss_recoloured"].item() < 1e-10
    assert found["loss_mirrored"].item() > 1e-4


def test_training_makes_z_invariant(training):
    """With a large weight z of altered grids comes nearer to z than without one, relative to its variance."""
    ratios = {}
    for weight in (0, 10):
        torch.manual_seed(0)
        words = ("model.encoder.kind=grid_objects", "target.kind=shared", "optim.lr=1e-3", "optim.schedule=constant")
        step, batch = training(*words, "optim.warmup_epochs=0", f"objective.recoloured.weight={weight}")
        for number in range(25):
            step.step(batch, number)
        term = RecolouredConfig(weight=1.0).build()
        with torch.no_grad():
            z = step.model.eval().encoder(batch.views)
            other = step.model.encoder(term.views(batch.views, torch.tensor(100)))
        ratios[weight] = ((z - other).square().mean() / z.var(0).mean()).item()
    assert ratios[10] < ratios[0] / 2
    assert "z_grad_norm_recoloured" in step.train_losses


def test_images_are_not_altered(tiny, refused):
    refused(tiny(TERMS[0]), "objective.recoloured.weight", "only grids are altered")
