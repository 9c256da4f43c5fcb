"""Terms of tokens: against loops, and how they change with the scale of tokens."""

import math

import numpy as np
import pytest
import torch

from seqjepa.engine.models.encoders.base import Tokens
from seqjepa.engine.models.seq_jepa import Output
from seqjepa.engine.objectives.config import CommitmentConfig, RelationalConfig, UsageConfig

STEP, NONE = torch.tensor(0), torch.zeros(1)


def drawn(batch=6, views=4, slots=7, width=5, seed=0) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, views, slots, width, generator=generator)
    present = torch.rand(batch, views, slots, generator=generator) < 0.8
    meet = torch.rand(batch, views, slots, slots, generator=generator) < 0.3
    meet = (meet | meet.transpose(-1, -2)) & present[..., None] & present[..., None, :]
    return Tokens(x * present[..., None], present, meet & ~torch.eye(slots, dtype=torch.bool))


def value(config, tokens: Tokens) -> torch.Tensor:
    return config.build()(Output(*[NONE] * 6, tokens=tokens).float(), STEP)


def far_of(tokens: Tokens, n: int, v: int) -> dict[tuple[int, int], float]:
    """Squared distances of the pairs that meet in a view."""
    x, meet = tokens.tokens[n, v].double(), tokens.adjacent[n, v]
    return {(i, j): float((x[i] - x[j]).square().sum()) for i, j in meet.nonzero().tolist()}


@pytest.mark.parametrize("form", ["squares", "squares_over_variance"])
def test_squares_are_compared_slot_by_slot(form):
    tokens, total = drawn(), 0.0
    for n in range(6):
        maps = [np.zeros((7, 7)) for _ in range(4)]
        for v, m in enumerate(maps):
            for pair, distance in far_of(tokens, n, v).items():
                m[pair] = distance
        mean = sum(maps[:3]) / 3
        total += ((mean - maps[3]) ** 2).mean() + 0.5 * np.mean([(m - mean) ** 2 for m in maps[:3]])
    expected = total / 6
    if form == "squares_over_variance":
        there = tokens.tokens[tokens.present].double().numpy()
        expected /= there.var(0).mean()
    found = value(RelationalConfig(weight=1, form=form, spread=0.5), tokens)
    assert found.item() == pytest.approx(expected, rel=1e-4)


def test_quantiles_are_compared_over_the_mean_distance():
    tokens = drawn()
    tokens.adjacent[0, 1] = False  # a view in which nothing meets is left out
    tokens.adjacent[1, 3] = False  # and so are all others beside such a last one
    lost = []
    for n in range(6):
        last = list(far_of(tokens, n, 3).values())
        for v in range(3):
            distances = list(far_of(tokens, n, v).values())
            if len(distances) >= 4 and len(last) >= 4:
                ours, theirs = (
                    np.quantile(np.array(d) / np.mean(d), [0.1, 0.3, 0.5, 0.7, 0.9]) for d in (distances, last)
                )
                gap = np.abs(ours - theirs)
                lost.append(np.where(gap < 1, gap**2 / 2, gap - 0.5).mean())
    assert 3 < len(lost) < 17
    assert value(RelationalConfig(weight=1), tokens).item() == pytest.approx(np.mean(lost), rel=1e-4)


@pytest.mark.parametrize(("form", "degree"), [("quantiles", 0), ("squares_over_variance", 2), ("squares", 4)])
def test_how_relations_grow_with_the_scale_of_tokens(form, degree):
    tokens, config = drawn(), RelationalConfig(weight=1, form=form)
    scaled = tokens._replace(tokens=10 * tokens.tokens)
    ratio = (value(config, scaled) / value(config, tokens)).item()
    assert ratio == pytest.approx(10.0**degree, rel=1e-5 if degree == 0 else 1e-3)


@pytest.mark.parametrize("form", ["quantiles", "squares", "squares_over_variance"])
def test_the_last_view_gets_no_gradient(form):
    tokens = drawn()
    tokens.tokens.requires_grad_()
    value(RelationalConfig(weight=1, form=form), tokens).backward()
    assert (tokens.tokens.grad[:, -1] == 0).all()
    assert tokens.tokens.grad[:, :-1].abs().sum() > 0
    assert tokens.tokens.grad.isfinite().all()
    alike = Tokens(*(x[:, :1].expand(-1, 4, *x.shape[2:]) for x in (tokens.tokens.detach(), *tokens[1:3])))
    assert value(RelationalConfig(weight=1, form=form), alike).item() == pytest.approx(0, abs=1e-6)


def test_commitment_is_the_mean_over_tokens_that_are_there():
    tokens = drawn()
    error = torch.rand(6, 4, 7).masked_fill(~tokens.present, 0.0)
    found = value(CommitmentConfig(weight=1), tokens._replace(error=error))
    assert found.item() == pytest.approx(error[tokens.present].mean().item(), rel=1e-5)
    nothing = tokens._replace(error=torch.zeros(6, 4, 7), present=torch.zeros(6, 4, 7, dtype=torch.bool))
    assert value(CommitmentConfig(weight=1), nothing).item() == 0


def test_usage_says_how_far_codes_are_from_being_alike():
    shares = torch.zeros(6, 4, 2, 8)
    shares[..., 0, :] = 3.0  # all alike
    shares[..., 1, 5] = 2.0  # always the same
    tokens = drawn()._replace(shares=shares)
    assert value(UsageConfig(weight=1), tokens).item() == pytest.approx(0.5)
    shares[..., 1, 2] = 2.0  # one of two
    assert value(UsageConfig(weight=1), tokens).item() == pytest.approx((1 - math.log(2) / math.log(8)) / 2)
    shares[..., 1, 2] = 1.0  # and twice as often the other
    shares.requires_grad_()
    value(UsageConfig(weight=1), tokens).backward()
    assert shares.grad[0, 0, 1, 5] > 0 > shares.grad[0, 0, 1, 2]
