"""Likeness of features: invariances, closed forms, and CKA by another formula."""

import math

import pytest
import torch

from seqjepa.engine.analysis.similarity import linear_cka, shared_directions


@pytest.fixture
def features():
    torch.manual_seed(0)
    return torch.randn(400, 12) @ torch.diag(torch.linspace(0.2, 3, 12)) + 5


def rotation(width):
    return torch.linalg.qr(torch.randn(width, width))[0]


def test_cka_is_that_of_centred_kernels(features):
    """HSIC by the Gram matrices of all pairs of rows, centred by H = I - 1/N."""
    other = torch.tanh(features[:, :7] @ torch.randn(7, 9))
    x, y = features.double(), other.double()
    centre = torch.eye(400, dtype=torch.float64) - 1 / 400
    k, q = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = (k * q).sum() / math.sqrt((k * k).sum() * (q * q).sum())
    assert linear_cka(features, other) == pytest.approx(expected.item(), rel=1e-9)
    assert linear_cka(other, features) == pytest.approx(expected.item(), rel=1e-9)


def test_cka_does_not_see_rotation_scale_and_shift(features):
    assert linear_cka(features, 3 * features @ rotation(12) - 2) == pytest.approx(1, abs=1e-6)
    assert linear_cka(features, features.roll(1, 0)) < 0.1
    # of orthogonal columns, by hand: one of two equal dimensions is shared
    signs = torch.tensor([[1.0, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert linear_cka(signs[:, :2], signs[:, 1:]) == pytest.approx(1 / 2)
    assert linear_cka(signs[:, :1], signs[:, 1:]) == 0


def test_directions_see_a_rotation(features):
    assert shared_directions(features, features) == pytest.approx(1)
    assert shared_directions(features, 3 * features - 2) == pytest.approx(1)
    assert shared_directions(features, features @ rotation(12)) < 0.9
    line = torch.randn(50, 1)
    along, across = line * torch.tensor([1.0, 0, 0]), line * torch.tensor([0, 1.0, 0])
    assert shared_directions(along, across) == pytest.approx(0, abs=1e-12)
    assert shared_directions(along, line * torch.tensor([1.0, 1.0, 0])) == pytest.approx(1 / 2, abs=1e-6)


def test_constant_features_have_neither(features):
    constant = torch.ones(400, 12)
    assert math.isnan(linear_cka(constant, features))
    assert math.isnan(shared_directions(constant, features))
    assert math.isnan(shared_directions(features, constant))
    assert math.isnan(shared_directions(features, features.clone().fill_(math.nan)))


def test_directions_that_have_collapsed_are_not_shared(features):
    """One direction is left: what the others of an eigenbasis happen to be does not count."""
    left = torch.linalg.eigh(torch.cov(features.T)).eigenvectors[:, -1]
    collapsed = (features @ left)[:, None] * left
    filled = round(1 / shared_directions(features, collapsed))
    assert filled > 3
    assert shared_directions(features, collapsed) == pytest.approx(1 / filled, rel=1e-4)
