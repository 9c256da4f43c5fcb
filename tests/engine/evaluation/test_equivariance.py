"""Equivariance and invariance of features whose answers are known."""

import math

import pytest
import torch

from seqjepa.engine.evaluation.equivariance import action_features, equivariance_metrics

D, CLASSES, ROWS = 12, 3, 600
TURN = {"rotation": slice(0, 2)}


def features(images, draws, *, angles="any", harmonic=1, equivariant=True, invariant=True, told=False):
    """An image is a vector, an action a turn in each of its planes: the first view at rest, the second turned."""
    images, draws = (torch.Generator().manual_seed(seed) for seed in (images, draws))
    labels = torch.randint(0, CLASSES, (ROWS,), generator=images)
    z = torch.randn(ROWS, D, generator=images)
    z[:, :CLASSES] += 6 * torch.nn.functional.one_hot(labels, CLASSES)
    angle = 2 * math.pi * torch.rand(ROWS, generator=draws)
    if angles == "right":
        angle = math.pi / 2 * torch.randint(0, 4, (ROWS,), generator=draws)
    actions = torch.stack([angle.sin(), angle.cos()], 1)
    moved = turned(z, harmonic * angle) if equivariant else torch.randn(ROWS, D, generator=draws)
    agg = z.clone() if invariant else torch.randn(ROWS, D, generator=draws)
    return {
        "first": z,
        "second": moved,
        "agg": torch.cat([agg, actions], 1) if told else agg,
        "labels": labels,
        "actions": actions,
        "index": torch.arange(ROWS),
    }


def turned(z, angle):
    a, b = z.view(ROWS, D // 2, 2).unbind(-1)
    sin, cos = angle.sin()[:, None], angle.cos()[:, None]
    return torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(1)


def metrics(**kind):
    parts = (features(1, 2, **kind), features(3, 4, **kind), features(3, 5, **kind))
    return equivariance_metrics(*parts, TURN, CLASSES)


@pytest.mark.parametrize("angles", ["any", "right"])
@pytest.mark.parametrize("harmonic", [1, 2])
def test_an_equivariant_encoder_and_an_invariant_aggregate(angles, harmonic):
    """Also one that goes round twice in a turn, which for right angles is a change of sign."""
    found = metrics(angles=angles, harmonic=harmonic)
    assert found["equivariance_error"] < 1e-4
    # without the action little is known of where z went
    assert found["equivariance_error_without_action"] > 0.7
    assert found["invariance_error_agg"] == pytest.approx(0, abs=1e-9)
    assert found["invariance_error_z"] > 0.4
    assert found["probe_class_acc_inv"] > 99
    assert found["probe_action_r2_inv"] < 0.05
    assert found["gap_class"] == pytest.approx(found["probe_class_acc_inv"] - found["probe_class_acc_eq"])
    assert found["gap_class"] > 15
    assert found["gap_action"] == pytest.approx(found["probe_action_r2_eq"] - found["probe_action_r2_inv"])


def test_noise_is_neither():
    found = metrics(equivariant=False, invariant=False)
    errors = ("equivariance_error", "equivariance_error_without_action", "invariance_error_agg", "invariance_error_z")
    for name in errors:
        assert found[name] == pytest.approx(1, abs=0.15), name
    assert abs(found["probe_class_acc_inv"] - 100 / CLASSES) < 10


def test_an_aggregate_that_keeps_the_action_leaks_it():
    assert metrics(told=True)["probe_action_r2_inv"] > 0.99


def test_numbers_of_one_factor_are_multiplied_with_each_other_alone():
    actions = torch.tensor([[2.0, 3.0, 5.0]])
    factors = {"turn": slice(0, 2), "shift": slice(2, 3)}
    assert action_features(actions, factors).tolist() == [[2, 3, 5, 4, 6, 9]]
