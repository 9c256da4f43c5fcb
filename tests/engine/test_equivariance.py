"""Equivariance and invariance of networks whose answers are known."""

from types import SimpleNamespace

import pytest
import torch

from seqjepa.engine.equivariance import equivariance_metrics

D, CLASSES = 12, 3


class Network:
    """Stands for a frozen network: an image is a vector, an action a turn in each of its planes."""

    lengths = [3]
    model = SimpleNamespace(num_features=D)

    def __init__(self, *, equivariant=True, invariant=True, told=True):
        self.equivariant, self.invariant, self.told = equivariant, invariant, told

    def read(self, loader, epochs, progress):
        images = torch.Generator().manual_seed(loader.images)
        draws = torch.Generator().manual_seed(loader.draws)
        n = 600
        labels = torch.randint(0, CLASSES, (n,), generator=images)
        z = torch.randn(n, D, generator=images)
        z[:, :CLASSES] += 6 * torch.nn.functional.one_hot(labels, CLASSES)
        angle = 6.28 * torch.rand(n, generator=draws)
        actions = torch.stack([angle.sin(), angle.cos()], 1)
        a, b = z.view(n, D // 2, 2).unbind(-1)
        sin, cos = actions.unsqueeze(2).unbind(1)
        moved = torch.stack([cos * a - sin * b, sin * a + cos * b], -1).flatten(1)
        if not self.equivariant:  # where to is not told by the action
            moved = torch.randn(n, D, generator=draws)
        agg = z.clone() if self.invariant else torch.randn(n, D, generator=draws)
        if self.told:
            agg = torch.cat([agg, actions], 1)
        progress()
        return {
            "pair": torch.cat([z, moved], 1),
            "first": z,
            "agg_3": agg,
            "labels": labels,
            "actions": actions,
            "index": torch.arange(n),
        }


class Loader(SimpleNamespace):
    def redrawn(self):
        return Loader(images=self.images, draws=self.draws + 100)


LOADERS = SimpleNamespace(train=Loader(images=1, draws=2), validation=Loader(images=3, draws=4), num_classes=CLASSES)


def metrics(**kind):
    return equivariance_metrics(Network(**kind), LOADERS, lambda: None)[0]


def test_an_equivariant_encoder_and_an_invariant_aggregate():
    found = metrics(told=False)
    # turns are linear in z, with coefficients linear in sin and cos
    assert found["equivariance_error"] < 1e-4
    # without the action nothing is known of where z went, but for the mean
    assert found["equivariance_error_without_action"] > 0.9
    assert found["invariance_error_agg"] == pytest.approx(0, abs=1e-9)
    assert found["invariance_error_z"] > 0.4
    assert found["probe_class_acc_inv"] > 99
    assert found["probe_action_r2_inv"] < 0.05
    # turned by an unknown angle, the classes' means are all zero
    assert found["gap_class"] == pytest.approx(found["probe_class_acc_inv"] - found["probe_class_acc_eq"])
    assert found["gap_class"] > 30
    assert found["gap_action"] == pytest.approx(found["probe_action_r2_eq"] - found["probe_action_r2_inv"])


def test_noise_is_neither():
    found = metrics(equivariant=False, invariant=False, told=False)
    for name in (
        "equivariance_error",
        "equivariance_error_without_action",
        "invariance_error_agg",
        "invariance_error_z",
    ):
        assert found[name] == pytest.approx(1, abs=0.15), name
    assert abs(found["probe_class_acc_inv"] - 100 / CLASSES) < 10


def test_an_aggregate_that_keeps_the_action_leaks_it():
    assert metrics(told=True)["probe_action_r2_inv"] > 0.99
