"""Which runs share an untrained control, and which must not."""

import os

import pytest
import torch

from seqjepa.engine.config import compose
from seqjepa.engine.reports.console import Reporter
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.runtime.interrupts import Interrupts
from seqjepa.engine.training import untrained_control as control
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.untrained_control import control_key
from seqjepa.loaders.loader import build_loaders

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture
def key(tiny):
    def make(*words):
        config = compose(tiny(*words)).config
        loaders = build_loaders(
            config.data, config.sequence, config.actions, seed=0, device=build_accelerator(config.run, 1).device
        )
        return control_key(config, loaders, build_accelerator(config.run, 1))

    return make


def test_what_only_training_knows_of_is_shared(key):
    for words in (
        ["objective.rate.weight=0.1", "objective.rate.features=both"],
        ["optim.lr=1e-5", "target.decay=0.5", "run.epochs=5"],  # max_epochs is less than either
        ["objective.prediction.kind=mse", "objective.prediction.weight=2.0"],
        ["early_stop.metric=online_r2_test", "diagnostics.every=7", "checkpoint.keep=1"],
    ):
        assert key(*words) == key(), words
    projected = ("model.projector.kind=mlp", "model.projector.dim=8", "target.kind=shared")
    assert key(*projected, "objective.sigreg.weight=0.1") == key(*projected, "objective.variance.weight=1.0")
    # with or without gradient an untrained target is the same
    assert key("target.kind=shared") == key("target.kind=stop_gradient")


def test_what_the_answers_depend_on_is_not(key):
    keys = [
        key(),
        key("target.kind=stop_gradient"),
        key("target.kind=stop_gradient", "target.batch_statistics=own"),
        key("target.sharpening.kind=softmax"),
        key("target.sharpening.kind=softmax", "objective.prediction.kind=cross_entropy"),
        key("objective.reading.kind=both"),
        key("objective.rate.normalize=unit"),
        key("model.predictor_action=false"),
        key("sequence.num_observed=2"),
        key("control.max_epochs=2"),
        key("run.seed=1"),
    ]
    assert len(set(keys)) == len(keys)


def test_other_code_and_other_libraries_have_controls_of_their_own(key, monkeypatch):
    """The digest of the code is tested module by module beside the code that makes it."""
    before = key()
    monkeypatch.setattr(control, "code_digest", lambda: "of other code")
    code = key()
    monkeypatch.setattr(control, "versions", lambda: {"torch": "of another version"})
    assert len({before, code, key()}) == 3


def test_every_setting_that_decides_what_is_learnt_is_in_the_key(key):
    """But for those that an untrained network knows nothing of."""
    for words in (
        ["sequence.scale=[0.5,1.0]"],
        ["actions.normalization=none"],
        ["probes.lr=1e-2"],
        ["data.val_subset=60"],
        ["ablation.shuffle_actions=true"],
        ["optim.accumulate=2"],
        ["run.batch_statistics=process"],
        ["model.aggregator.dropout=0.2"],
        ["objective.reading.kind=both"],
    ):
        assert key(*words) != key(), words


def test_ranks_of_the_control_are_those_of_its_last_batches(tiny, monkeypatch):
    """One batch of each epoch is measured, whatever `run.log_every` is; computed here from what that batch gives."""
    config = compose(tiny("run.log_every=1000", "control.max_epochs=2", "model.aggregator.dropout=0")).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    seen, original = [], TrainingStep.step

    def step(self, batch, number):
        result = original(self, batch, number)
        output = self.losses(self.step_inputs(batch).split(1)[0], self.device_step).output
        seen.append({side: getattr(output, side).detach().double() for side in ("prediction", "target")})
        return result

    monkeypatch.setattr(TrainingStep, "step", step)
    with Interrupts(os.getppid()) as interrupts, Reporter(False) as reporter:
        found = control.untrained_control(config, loaders, accelerator, reporter, interrupts)
    last = seen[len(loaders.train) - 1 :: len(loaders.train)]
    assert len(last) == 2
    for side in ("prediction", "target"):
        ranks = []
        for rows in last:
            share = torch.linalg.svdvals(rows[side] - rows[side].mean(0)).square()
            share = share[share > 0] / share.sum()
            ranks.append((-(share * share.log()).sum()).exp().item())
        assert found[f"{side}_rank"] == pytest.approx(sum(ranks) / 2, rel=1e-3)
