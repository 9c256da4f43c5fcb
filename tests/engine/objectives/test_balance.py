"""GradNorm: where its factors end, whatever the scale of the terms."""

import pytest
import torch

from seqjepa.engine.objectives.config import GradNormConfig


def settled(scales, ratios, steps=400, **settings):
    """Factors of terms whose gradients have norms in proportion to factor times scale, and whose losses fall so far."""
    balance = GradNormConfig(first=2, **settings).build(len(scales))
    scales, ratios = torch.tensor(scales), torch.tensor(ratios)
    for step in range(steps):
        balance.update(balance.factors * scales, 3.0 * scales * (ratios if step >= 2 else torch.ones_like(ratios)))
        assert balance.factors.sum().item() == pytest.approx(len(scales), rel=1e-5)
        if step < 2:
            assert (balance.factors == 1).all()
    return balance.factors


def test_a_term_that_is_scaled_by_100_ends_with_the_same_pull():
    factors = settled([1.0, 100.0, 1.0], [0.5, 0.5, 0.5])
    pull = factors * torch.tensor([1.0, 100.0, 1.0])
    torch.testing.assert_close(pull, pull.mean().expand(3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_what_has_still_to_learn_pulls_more(alpha):
    """r = 1.6, 0.4: the pulls are in the ratio 4 to the power of alpha."""
    pull = settled([2.0, 5.0], [0.8, 0.2], alpha=alpha) * torch.tensor([2.0, 5.0])
    assert (pull[0] / pull[1]).item() == pytest.approx(4.0**alpha, rel=1e-3)


def test_what_is_not_finite_changes_nothing():
    balance = GradNormConfig(first=1).build(2)
    balance.update(torch.ones(2), torch.ones(2))
    balance.update(torch.tensor([torch.nan, 1.0]), torch.ones(2))
    assert (balance.factors == 1).all()
    balance.update(torch.tensor([0.0, 1.0]), torch.ones(2))  # a term without a gradient
    assert balance.factors.isfinite().all()
