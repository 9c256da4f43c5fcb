"""Codes that change while a network learns: counted by hand, of the encoder and of its teacher, and over a restart."""

import pytest
import torch

from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.train import main
from seqjepa.engine.training.churn import Churn

pytestmark = pytest.mark.usefixtures("blank_figures")
WORDS = ("sequence.kind=program", "data.dataset=object_grids", "actions.normalization=none", "target.kind=ema")
WORDS += ("model.encoder.kind=grid_objects", "model.encoder.dim=32", "model.encoder.num_layers=1")
WORDS += ("model.encoder.quantiser.kind=ema", "model.encoder.quantiser.codes=16", "control.enabled=false")
WORDS += ("objective.prediction.kind=infonce", "optim.lr=3e-3", "optim.schedule=constant")


@pytest.fixture
def trained(build):
    training, loaders = build(*WORDS)
    training.step(next(loaders.train.epoch(0)), 0)  # codebooks take their codes from a batch
    return training, loaders


def test_codes_that_change_places_are_counted(trained):
    """After two codes have changed places, what had the one has the other, and nothing else has changed."""
    training, loaders = trained
    model, churn = training.model, Churn(training.model, loaders.validation)
    assert churn.look() == {}  # nothing to compare with
    before = {name: codes.clone() for name, codes in churn.seen.items()}
    assert {name: value.item() for name, value in churn.look().items()} == {"codes_churn": 0, "codes_churn_target": 0}
    for encoder, name in ((model.encoder, "codes_churn"), (model.target.teacher, "codes_churn_target")):
        codes = encoder.quantiser.books[0].codes
        here = before[name][before[name] >= 0]
        first, second = here.bincount().topk(2).indices.tolist()
        codes[[first, second]] = codes[[second, first]]
        moved = 100 * sum(code in (first, second) for code in here.tolist()) / len(here)
        assert 0 < moved < 100
        found = {name: value.item() for name, value in churn.look().items()}
        assert found.pop(name) == pytest.approx(moved)
        assert set(found.values()) == {0.0}


def test_looking_changes_nothing(trained):
    training, _ = trained
    state = {name: value.clone() for name, value in training.model.state_dict().items()}
    training.code_changes()
    training.code_changes()
    assert training.model.training
    assert all(torch.equal(value, state[name]) for name, value in training.model.state_dict().items())


def test_a_resumed_run_compares_with_what_the_stopped_one_saw(tiny, tmp_path, interrupt_at, monkeypatch):
    words = (*WORDS, "run.log_every=2", "run.epochs=3")

    def logged(run):
        return [(row["step"], row.get("codes_churn"), row.get("codes_churn_target")) for row in run]

    assert main(tiny(run="whole", other=words)) == 0
    whole = logged(read_rows(tmp_path / "whole" / "steps.jsonl", "step"))
    assert whole[0] == (2, None, None)
    assert all(0 <= value <= 100 for row in whole[1:] for value in row[1:])
    assert any(row[1] != row[2] for row in whole[1:])
    interrupt_at(7)
    assert main(tiny(run="cut", other=words)) == 143
    monkeypatch.undo()
    assert main(tiny("run.resume=auto", run="cut", other=words)) == 0
    assert logged(read_rows(tmp_path / "cut" / "steps.jsonl", "step")) == whole
    rows = read_rows(tmp_path / "whole" / "metrics.jsonl")
    last = [row for row in whole if row[0] > 10]  # five steps an epoch
    assert all(row[2] > 0 for row in last)
    assert rows[-1]["codes_churn_target"] == pytest.approx(sum(row[2] for row in last) / len(last), rel=1e-5)
    assert {"codes_perplexity_target", "codes_active_target", "codes_shape"} <= rows[-1].keys()
