"""Scores on grids: chance for a constant, everything for one who knows, and ties in parts."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seqjepa.engine.config import compose
from seqjepa.engine.evaluation import grids
from seqjepa.engine.evaluation.grids import grid_scores, purity
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.loaders.grids.objects import shape_keys

GRIDS = ("configs/data/arc_programs.yaml", "configs/tier/arc_smoke.yaml", "data.train_subset=200", "data.val_subset=64")
FEW = ("data.train_subset=96", "data.val_subset=32")


def built(*words):
    """A step on programs, and its loaders."""
    config = compose([*GRIDS, "run.precision=fp32", "data.batch_size=32", *words]).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    torch.manual_seed(0)
    return TrainingStep(config, loaders, accelerator), loaders


@pytest.fixture
def opened(request):
    training, loaders = built(*getattr(request, "param", ()))

    def measure(model, **more):
        given = model.eval(), training.objective, training.losses.spans, loaders.train, loaders.validation
        return grid_scores(*given, **more)

    return training.model, measure, loaders


class Cells(nn.Module):
    """A network whose features are the cells, times a scale, and which predicts the view that comes `late`r."""

    def __init__(self, scale, late=0):
        super().__init__()
        self.scale, self.late = scale, late
        self.projector, self.sharpening, self.target = None, None, SimpleNamespace(joint=True)

    def encoder(self, views):
        return nn.functional.pad(views.flatten(2) * self.scale, (0, 1), value=1.0)

    def forward(self, views, actions, inverse, spans):
        z = self.encoder(views)
        result = SimpleNamespace(prediction=z[:, -1 - self.late], target=z[:, -1], tokens=None, projections=None)
        return SimpleNamespace(float=lambda: result)


def test_a_constant_is_at_chance(opened):
    """All sixteen are equally near: a tie counts in parts, and nothing can be told from it."""
    found = opened[1](Cells(0.0))
    assert found["next_cf16"] == pytest.approx(100 / 16)
    assert found["next_copy16"] == pytest.approx(100 / 16)
    assert 100 / 64 <= found["next_top1"] < 100 / 16  # of 64, of which some are equal
    assert found["move_acc"] < 30
    assert found["length_acc"] == pytest.approx(100 / 3, abs=15)
    assert found["size_r2"] < 0.05
    assert "val_nce" not in found  # there are not 8,703 grids


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_among_the_grids_of_training_a_prediction_is_picked_by_cosine(opened, monkeypatch, scale):
    monkeypatch.setattr(grids, "NEGATIVES", 500)
    found = opened[1](Cells(scale, late=1))["val_nce"]
    if scale == 0:  # all alike: chance
        assert found == pytest.approx(math.log(501), rel=1e-5)
        return
    loaders, lost = opened[2], []
    others = torch.cat(
        [batch.views.flatten(2) for batch in loaders.train.restricted(loaders.train.sampler.indices).epoch(0)]
    )
    others = nn.functional.pad(others.flatten(0, 1)[:500].double() * scale, (0, 1), value=1.0)
    for batch in loaders.validation.epoch(0):
        cells = nn.functional.pad(batch.views.flatten(2).double() * scale, (0, 1), value=1.0)
        for before, last in zip(cells[:, -2], cells[:, -1], strict=True):
            cosines = nn.functional.cosine_similarity(before, torch.cat([last[None], others]), dim=1)
            lost.append(-(cosines / 0.07).log_softmax(0)[0].item())
    assert found == pytest.approx(sum(lost) / len(lost), rel=1e-3)


def test_who_knows_the_next_grid_is_right(opened):
    found = opened[1](Cells(1.0))
    assert found["next_cf16"] > 97  # an alternative may be the same grid
    assert found["next_top1"] == pytest.approx(100)
    assert found["next_copy16"] < 40
    assert found["size_r2"] > 0.5


def test_who_copies_scores_as_the_copy_does(opened):
    found = opened[1](Cells(1.0, late=1))
    assert found["next_cf16"] == found["next_copy16"]


@pytest.mark.parametrize("opened", [FEW], indirect=True, ids=["few"])
def test_actions_of_another_are_told_to_a_shuffled_network(opened):
    model, measure, _ = opened
    seen, original = [], type(model).forward

    def forward(self, views, actions, *more):
        seen.append(actions)
        return original(self, views, actions, *more)

    model.forward = forward.__get__(model)
    plain, shuffled = measure(model), measure(model, shuffled=True)
    half = len(seen) // 2
    assert half > 2
    for given, other in zip(seen[:half], seen[half:], strict=True):
        assert torch.equal(other, given.roll(1, 0))
    assert plain["move_acc"] == shuffled["move_acc"]  # what is read from z alone
    assert plain["size_r2"] > 0.5


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("objective.prediction.kind=mse",),
        ("target.kind=ema", "model.projector.kind=none"),
        ("model.neck.kind=linear", "model.neck.dim=16"),
        (
            *("target.kind=stop_gradient", "target.sharpening.kind=softmax", "target.sharpening.temperature=1"),
            *("objective.prediction.kind=cosine", "model.projector.kind=none"),
        ),
    ],
)
def test_candidates_are_compared_as_targets_are(words):
    """A prediction that is the true target is nearest to the true grid, whatever the targets pass through."""
    training, loaders = built(*FEW, *words)
    for batch in loaders.train.epoch(0):
        training.step(batch, 0)  # batch norms have seen a batch
    model, original = training.model.eval(), type(training.model).forward

    def knows(self, *given):
        output = original(self, *given)
        return output._replace(prediction=output.target)

    model.forward = knows.__get__(model)
    given = training.objective, training.losses.spans, loaders.train, loaders.validation
    assert grid_scores(model, *given)["next_cf16"] > 85  # ties of grids that look alike count in parts


def test_purity_counts_the_commonest_label_of_each_code():
    """Three of four of code 7, one of two of code 0, and one alone: 5 of 7; of the other part all with their code."""
    codes = torch.tensor([[7, 1], [7, 1], [7, 1], [7, 2], [0, 1], [0, 2], [3, 0]])
    labels = torch.tensor([4, 4, 4, 0, 4, 0, 2])
    assert purity(codes, labels) == pytest.approx(100 * (5 / 7 + 1) / 2)


@pytest.mark.parametrize(("codes_are", "change"), [("colour", ""), ("shape", ""), ("colour", "blank=1.0")])
def test_codes_that_are_the_colours_or_shapes_of_objects_are_pure(codes_are, change, monkeypatch):
    """An object's colour is told by its features; there are fewer slots than objects, or no object at all."""
    codes = ("kind=ema", "codes=10")
    words = [*(f"model.encoder.quantiser.{setting}" for setting in codes), "model.encoder.slots=4"]
    words += [f"sequence.changes.{change}"] if change else []
    training, loaders = built(*words)
    encoder = training.model.encoder
    encode = type(encoder)._encoded

    def coloured(self, grids):
        features, found = encode(self, grids)
        objects = self.objects(grids)
        number = objects.features[..., 10:20].argmax(-1) if codes_are == "colour" else shape_keys(objects) % 99991
        return features, found._replace(codes=torch.where(objects.present, number, -1)[..., None])

    monkeypatch.setattr(type(encoder), "_encoded", coloured)
    given = training.model.eval(), training.objective, training.losses.spans, loaders.train, loaders.validation
    found = grid_scores(*given)
    if change:
        assert math.isnan(found["codes_colour"])
        assert math.isnan(found["codes_colour_chance"])
        assert math.isnan(found["codes_shape"])
    else:
        other = "shape" if codes_are == "colour" else "colour"
        assert found[f"codes_{codes_are}"] == 100
        assert found[f"codes_{codes_are}_chance"] < 60
        assert found[f"codes_{other}"] < 80  # a shape that is there once has one colour
    if codes_are == "colour" and not change:
        assert found["codes_active"] == 90  # no object is black
