"""Curves of white-box layers: what is measured, where it is written and drawn, and steps that are too long."""

import json

import pytest
import torch
from accelerate import Accelerator

from seqjepa.engine.analysis.layers import LayerCurves, layer_curves, layer_metrics
from seqjepa.engine.config import compose
from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.models.white_box.layers import CrateLayer, subspace_rate
from seqjepa.engine.reports.figures.subspaces import NetworkSweeps, draw_layers
from seqjepa.engine.train import main
from seqjepa.loaders.batch import Batch
from seqjepa.loaders.sequences import ActionSpace

CRATE = ("model.aggregator.kind=crate", "model.aggregator.num_layers=3")


def without(tiny, *words):
    """Words of a small run, without the settings of the aggregator that others replace."""
    return [
        word for word in tiny("control.enabled=false", "gates.rules.digits_affine=[]") if "aggregator" not in word
    ] + [*words]


def test_the_curves_are_those_of_the_layers():
    config = compose(["tests/small.yaml", *CRATE, "model.predictor.kind=crate"]).config
    torch.manual_seed(0)
    model = SeqJEPA(config.model, config.target, ActionSpace(5)).eval()
    views, actions = torch.rand(6, 4, 3, 24, 24), torch.randn(6, 3, 5)
    batch = Batch(views, actions, torch.zeros(6, 4, 4), torch.zeros(6), torch.zeros(6))
    curves = layer_curves(model, batch, 3, Accelerator(cpu=True))
    assert set(curves) == {"aggregator", "predictor"}
    z = model.encoder(views[:, :3])
    tokens = torch.cat([z, torch.cat([model.embed(actions)[:, :2], torch.zeros(6, 1, 32)], 1)], -1)
    x = torch.cat([model.aggregator.token.expand(6, -1, -1), tokens], 1)
    found = curves["aggregator"]
    for number, layer in enumerate(model.aggregator.layers):
        attention = layer.attention
        between = x + attention(layer.norm1(x))
        x = layer(x)
        assert found.rate_after[number] == pytest.approx(
            subspace_rate(attention.project(layer.norm1(between))).item(), rel=1e-3
        )
        # the layer's output is its code; a number near zero may be rounded to either side of it
        assert found.zeros[number] == pytest.approx((x == 0).float().mean().item(), abs=0.005)
        assert found.active[number] == pytest.approx(
            ((x > 0).flatten(0, 1).float().mean(0) > 0.01).float().mean().item(), abs=0.02
        )
    assert len(found.rate) == 3
    plain = compose(["tests/small.yaml"]).config
    assert layer_curves(SeqJEPA(plain.model, plain.target, ActionSpace(5)), batch, 3, Accelerator(cpu=True)) == {}


def test_views_beyond_the_target_and_failures_leave_no_trace():
    config = compose(["tests/small.yaml", *CRATE]).config
    torch.manual_seed(0)
    model = SeqJEPA(config.model, config.target, ActionSpace(5)).eval()
    views, actions = torch.rand(6, 5, 3, 24, 24), torch.randn(6, 4, 5)
    rest = torch.zeros(6, 5, 4), torch.zeros(6), torch.zeros(6)
    accelerator = Accelerator(cpu=True)
    longer = layer_curves(model, Batch(views, actions, *rest), 3, accelerator)
    assert longer == layer_curves(model, Batch(views[:, :4], actions[:, :3], *rest), 3, accelerator)
    with pytest.raises(RuntimeError):
        layer_curves(model, Batch(views, actions[..., :2], *rest), 3, accelerator)
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_tost_has_rates_but_no_codes(tmp_path):
    config = compose(["tests/small.yaml", "model.aggregator.kind=mean", "model.aggregator.kind=tost"]).config
    torch.manual_seed(0)
    model = SeqJEPA(config.model, config.target, ActionSpace(5)).eval()
    batch = Batch(torch.rand(6, 4, 3, 24, 24), torch.randn(6, 3, 5), *[torch.zeros(6)] * 3)
    curves = layer_curves(model, batch, 3, Accelerator(cpu=True))
    assert len(curves["aggregator"].rate) == 2
    assert set(layer_metrics(curves)) == {
        f"layers_rate{when}_aggregator_{n}" for when in ("", "_after") for n in (1, 2)
    }
    figure = draw_layers({"one": NetworkSweeps({}, {}, curves)}, "aggregator")
    assert len(figure.axes) == 1


def test_a_frozen_dictionary_is_not_clipped(tiny, tmp_path):
    words = (
        "model.encoder.kind=crate",
        "model.encoder.dim=16",
        "model.encoder.side=24",
        "model.encoder.num_layers=1",
    )
    kept = [word for word in tiny("control.enabled=false", "gates.rules.digits_affine=[]") if "encoder" not in word]
    assert main([*kept, *words, "run.epochs=1", "model.encoder.longest_step=0.3", "ablation.freeze_encoder=true"]) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["dictionary_step_encoder"] > 0.6


def test_names_of_the_metrics():
    curves = {"aggregator": LayerCurves([3.0, 2.0], [2.5, 1.5], [0.1, 0.2], [1.0, 0.9])}
    found = layer_metrics(curves)
    assert len(found) == 8
    assert found["layers_rate_aggregator_2"] == 2.0
    assert found["layers_rate_after_aggregator_1"] == 2.5


def test_they_are_logged_and_drawn_beside_the_untrained_network(tiny, tmp_path):
    assert main(without(tiny, *CRATE, "run.epochs=1", "diagnostics.every=1")) == 0
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["layers_rate_aggregator_1"] > 0
    assert 0 < row["dictionary_step_aggregator"] < 2
    assert (tmp_path / "run" / "figures" / "layers_aggregator.png").stat().st_size > 5_000
    assert evaluate([str(tmp_path / "run"), "eval.subspace=true"]) == 0
    (folder,) = (tmp_path / "run" / "eval").iterdir()
    measured = json.loads((folder / "subspace.json").read_text())
    for network in ("trained", "untrained"):
        assert measured[network]["layers_zeros_aggregator_3"] > 0
    assert (folder / "layers_aggregator.png").stat().st_size > 5_000


def test_long_steps_are_told_of_and_can_be_limited(tiny, tmp_path, capsys, monkeypatch):
    made = CrateLayer.__init__

    def large(self, config, width):
        made(self, config, width)
        with torch.no_grad():
            self.coding.dictionary *= 2  # a step of four times 0.8

    monkeypatch.setattr(CrateLayer, "__init__", large)
    words = without(tiny, *CRATE, "run.epochs=1")
    assert main(words) == 0
    told = "model.aggregator.longest_step=1 limits it"
    assert told in capsys.readouterr().out
    assert main([*words, "model.aggregator.longest_step=1", "run.overwrite=true"]) == 0
    assert told not in capsys.readouterr().out
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["dictionary_step_aggregator"] <= 1.01
