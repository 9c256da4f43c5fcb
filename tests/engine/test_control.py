"""Which runs share an untrained control, and which must not."""

import pytest

from seqjepa.engine.compose import compose
from seqjepa.engine.control import control_key
from seqjepa.engine.environment import build_accelerator
from seqjepa.loaders.loader import build_loaders


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
        ["rate.weight=0.1", "rate.target=both"],
        ["optim.lr=1e-5", "target.decay=0.5", "run.epochs=5"],  # max_epochs is less than either
        ["objective.prediction=mse", "objective.prediction_weight=2.0"],
        ["early_stop.metric=online_r2_test", "diagnostics.every=7", "checkpoint.keep=1"],
    ):
        assert key(*words) == key(), words
    projected = ("model.projector_dim=8", "target.kind=shared")
    assert key(*projected, "sigreg.weight=0.1") == key(*projected, "vicreg.variance=1.0")
    # with or without gradient an untrained target is the same
    assert key("target.kind=shared") == key("target.kind=stop_gradient")


def test_what_the_answers_depend_on_is_not(key):
    keys = [
        key(),
        key("target.kind=stop_gradient"),
        key("target.kind=stop_gradient", "target.batch_statistics=own"),
        key("target.sharpening=true"),
        key("target.sharpening=true", "objective.prediction=cross_entropy"),
        key("objective.symmetric=true"),
        key("rate.normalize=unit"),
        key("model.predictor_action=false"),
        key("sequence.num_observed=2"),
        key("control.max_epochs=2"),
        key("run.seed=1"),
    ]
    assert len(set(keys)) == len(keys)
