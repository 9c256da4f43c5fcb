"""Alarms: each failure is brought about on purpose, and nothing else is told of."""

import json

import pytest
import torch

from seqjepa.engine.config import compose
from seqjepa.engine.train import main
from seqjepa.engine.training.alarms import alarms, pinned_sigreg
from seqjepa.kernels import sigreg

pytestmark = pytest.mark.usefixtures("blank_figures")

SIGREG = ("model.projector.kind=mlp", "model.projector.dim=64", "target.kind=shared", "objective.prediction.kind=mse")
SIGREG += ("objective.sigreg.weight=0.1", "objective.sigreg.num_slices=64", "data.batch_size=64")


def config(*words):
    return compose(["tests/small.yaml", *words]).config


def rows(*values, **same):
    """Epochs with these values of the prediction's loss."""
    return [{"epoch": n, "loss_prediction": v, "share_prediction": 1.0, **same} for n, v in enumerate(values, 1)]


def test_a_term_that_passes_twice_its_least_value():
    (said,) = alarms(rows(1.0, 0.2, 0.3, 0.41), config())
    assert said == "loss_prediction is 0.41, more than twice its least value, 0.2 in epoch 2"
    assert not alarms(rows(1.0, 0.2, 0.3, 0.39), config())
    assert not alarms(rows(1.0, 0.2, 0.3, 0.41, share_prediction=0.04), config())  # too small to be in the way
    assert not alarms(rows(0.0, 0.1), config())  # a hinge that was met once


def test_codes_that_are_no_longer_used():
    found = [
        {"epoch": 1, "codes_perplexity": 30.0},
        {"epoch": 2},  # not validated
        {"epoch": 3, "codes_perplexity": None},
        {"epoch": 4, "codes_perplexity": 16.0},
    ]
    assert not alarms(found, config())
    (said,) = alarms([*found, {"epoch": 5, "codes_perplexity": 14.0}], config())
    assert said == "codes_perplexity is 14, less than half of what it was, 30"


def epochs(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tells_of_a_term_that_grows(tiny, tmp_path, capsys):
    """Dimensions that the variance term spreads, and that correlate, because little is asked of their covariance."""
    words = ("model.projector.kind=mlp", "model.projector.dim=64", "model.projector.hidden=16", "target.kind=shared")
    words += ("objective.prediction.kind=mse", "objective.variance.weight=4", "objective.covariance.weight=0.4")
    words += ("run.epochs=4", "optim.schedule=constant", "gates.rules.digits_affine=[]")
    assert main(tiny(*words)) == 0
    said, rows = capsys.readouterr().out, epochs(tmp_path)
    least = [min(row["loss_covariance"] for row in rows[: n + 1]) for n in range(4)]
    told = [r["share_covariance"] >= 0.05 and r["loss_covariance"] > 2 * v for r, v in zip(rows, least, strict=True)]
    assert not told[1]
    assert told[3]
    assert said.count("alarm: loss_covariance is") == said.count("alarm: loss") == sum(told)


def test_a_run_tells_of_codes_that_fall_out_of_use(tiny, tmp_path, capsys):
    """Codes that follow slowly, and are never drawn anew, are left behind by tokens that move."""
    words = ("sequence.kind=program", "data.dataset=object_grids", "actions.normalization=none")
    words += ("model.encoder.kind=grid_objects", "model.encoder.dim=32", "model.encoder.num_layers=1")
    codes = ("kind=ema", "codes=32", "redraw=0")
    words += (*(f"model.encoder.quantiser.{setting}" for setting in codes), "objective.prediction.kind=infonce")
    words += ("run.epochs=5", "optim.lr=3e-4", "optim.schedule=constant", "control.enabled=false")
    assert main(tiny(other=words)) == 0
    said, used = capsys.readouterr().out, [row["codes_perplexity"] for row in epochs(tmp_path)]
    told = [now < max(used[: n + 1]) / 2 for n, now in enumerate(used)]
    assert not told[1]
    assert told[4]
    assert said.count("alarm: codes_perplexity is") == sum(told)


@pytest.mark.parametrize(
    ("kind", "told"), [("unit", True), ("unit and positive", True), ("almost zero", True), ("gauss", False)]
)
def test_sigreg_that_does_not_move_the_projections(kind, told):
    """Of unit length in 256 dimensions it is within a hundredth of its value for zeros."""
    asked = config(*SIGREG, "model.projector.dim=256")
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    if "positive" in kind:
        x = x.relu()
    if "unit" in kind:
        x = torch.nn.functional.normalize(x, dim=1)
    if kind == "almost zero":
        x = torch.full_like(x, 1e-3)
    loss = sigreg(x, num_slices=64, seed=1).item()
    pinned = pinned_sigreg(asked, 1, torch.device("cpu"))
    found = alarms([{"epoch": 1, "loss_sigreg": loss, "share_sigreg": 0.5}], asked, pinned)
    assert bool(found) is told
    if told:
        assert "as of projections that are all zero" in found[0]
    assert pinned_sigreg(config(), 1, torch.device("cpu")) is None


def test_a_run_tells_of_steps_that_are_clipped_and_of_shares(tiny, tmp_path, capsys):
    words = ("run.epochs=3", "optim.clip_norm=1e-3", "optim.lr=1e-3")
    assert main(tiny(*words)) == 0
    said = capsys.readouterr().out
    assert said.count("alarm: the gradient was clipped in 100 % of the steps (optim.clip_norm = 0.001)") == 3
    for row in epochs(tmp_path):
        assert row["grad_norm_max"] >= row["grad_norm"] > 1e-3
        assert row["clipped"] == 100
        assert row["share_prediction"] == 1
    assert main(tiny("run.epochs=1", "optim.clip_norm=1e6", "objective.rate.weight=0.1", run="free")) == 0
    assert "alarm" not in capsys.readouterr().out
    (row,) = [json.loads(line) for line in (tmp_path / "free" / "metrics.jsonl").read_text().splitlines()]
    assert row["clipped"] == 0
    parts = {name: abs(row[f"loss_{name}"]) for name in ("prediction", "rate")}
    share = 0.1 * parts["rate"] / (parts["prediction"] + 0.1 * parts["rate"])
    assert row["share_rate"] == pytest.approx(share)
