"""Codes of tokens: what they are, what follows them, and what they do to gradients."""

import math

import pytest
import torch

from seqjepa.engine.evaluation.grids import code_scores, purity
from seqjepa.engine.models.quantisers.base import Quantiser
from seqjepa.engine.models.quantisers.config import EMAQuantiserConfig, FSQQuantiserConfig, GumbelQuantiserConfig
from seqjepa.engine.models.quantisers.ema import EMACodebook
from seqjepa.engine.models.quantisers.fsq import FSQ

KINDS = [
    EMAQuantiserConfig(codes=12, groups=2),
    FSQQuantiserConfig(levels=[4, 3], groups=2),
    GumbelQuantiserConfig(size=12, groups=2),
]


def tokens(n=16, slots=5, width=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, slots, width, generator=generator)
    return x, torch.rand(n, slots, generator=generator) < 0.7


def trained(config: EMAQuantiserConfig, calls: int = 300) -> tuple[EMACodebook, torch.Tensor]:
    """A codebook that has seen `calls` batches of 1,024 points of 500 Gaussians in 64 dimensions, and 10,000 more."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(500, 64, generator=generator)

    def draw(count: int) -> torch.Tensor:
        chosen = torch.randint(500, (count,), generator=generator)
        return centres[chosen] + 0.1 * torch.randn(count, 64, generator=generator)

    book = EMACodebook(config, 64).train()
    for _ in range(calls):
        book(draw(1024)[None], torch.ones(1, 1024, dtype=torch.bool))
    return book.eval(), draw(10_000)


def test_codes_that_are_drawn_anew_find_every_mode():
    """The perplexity of the truth is about 493, its error 0.01 of the variance."""
    scores = {}
    for redraw in (0.3, 0.0):
        book, points = trained(EMAQuantiserConfig(codes=768, redraw=redraw))
        stand, number, _ = book(points[None], torch.ones(1, len(points), dtype=torch.bool))
        error = (stand[0] - points).square().sum() / (points - points.mean(0)).square().sum()
        scores[redraw] = code_scores(number[0, :, None], 768)["codes_perplexity"], error.item()
    assert scores[0.3][0] >= 450
    assert scores[0.3][1] <= 0.02
    assert scores[0.0][0] < scores[0.3][0] - 50  # codes that start at data, and stay where nothing is
    assert scores[0.0][1] > 2 * scores[0.3][1]


def test_codes_follow_the_mean_of_their_tokens():
    """Against the formulas, token by token."""
    book = EMACodebook(EMAQuantiserConfig(codes=4, decay=0.9, redraw=0.0), 3).train()
    x, present = tokens(width=3)
    book(x, present)
    flat, there = x.flatten(0, 1), present.flatten()
    first = {tuple(row) for row in flat[there].tolist()}
    counts, sums, codes = book.counts.clone().double(), book.sums.clone().double(), book.codes.clone().double()
    assert book.batches == 1
    for _ in range(3):
        new_counts, new_sums = torch.zeros(4).double(), torch.zeros(4, 3).double()
        for row in flat[there].double():
            code = int((codes - row).square().sum(1).argmin())
            new_counts[code] += 1
            new_sums[code] += row
        counts, sums = 0.9 * counts + 0.1 * new_counts, 0.9 * sums + 0.1 * new_sums
        total = counts.sum()
        codes = sums / ((counts + 1e-5) / (total + 4e-5) * total)[:, None]
        stand, number, _ = book(x, present)
        torch.testing.assert_close(book.counts.double(), counts, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(book.codes.double(), codes, rtol=1e-4, atol=1e-5)
    started = EMACodebook(EMAQuantiserConfig(codes=4, decay=0.0, redraw=0.0), 3).train()
    stand, number, _ = started(x, present)  # the codes are tokens of the batch, and none of an empty slot
    assert {tuple(row) for row in stand[present].tolist()} <= first
    assert len(set(number[present].tolist())) > 1


def test_codes_are_drawn_anew_only_when_it_is_time():
    """A code that nothing is near to moves in every third batch."""
    book = EMACodebook(EMAQuantiserConfig(codes=4, redraw=0.5, redraw_every=3), 2).train()
    there = torch.ones(1, 400, dtype=torch.bool)
    moved = []
    for batch in range(7):
        if batch:
            book.codes[3] = 1e3
            book.counts[3] = 0
            book.sums[3] = 0
        book(torch.randn(1, 400, 2, generator=torch.Generator().manual_seed(batch)), there)
        moved.append(bool(book.counts[3] > 1))
    assert moved == [True, False, False, True, False, False, True]


def test_rounding_is_the_formula_and_reaches_every_code():
    fsq = FSQ(FSQQuantiserConfig(levels=[8, 6, 5]), 4)
    numbers = 6 * torch.rand(20_000, 3, generator=torch.Generator().manual_seed(0)) - 3
    expected = []
    for column, level in zip(numbers.double().T, (8, 6, 5), strict=True):
        half, offset = (level - 1) * 1.001 / 2, 0.5 if level % 2 == 0 else 0.0
        expected.append((torch.tanh(column + math.atanh(offset / half)) * half - offset).round())
    rounded = fsq.rounded(numbers)
    assert torch.equal(rounded.double(), torch.stack(expected, 1))
    number = fsq.number(rounded)
    by_hand = [
        (a + 4) + 8 * (b + 3) + 48 * (c + 2) for a, b, c in zip(*[e.long().tolist() for e in expected], strict=True)
    ]
    assert number.tolist() == by_hand
    assert set(number.tolist()) == set(range(240))
    numbers.requires_grad_()
    fsq.rounded(numbers).sum().backward()
    bounded = 1 - torch.tanh(numbers.detach() + fsq.shift).square()
    torch.testing.assert_close(numbers.grad, bounded * fsq.bound)


@pytest.mark.parametrize("place", ["side", "path"])
@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_what_codes_do_to_tokens(config, place):
    torch.manual_seed(0)
    quantiser = Quantiser(config.model_copy(update={"place": place}), 8).train()
    x, present = tokens()
    x.requires_grad_()
    found = quantiser(x, present)
    assert found.codes.shape == (16, 5, 2)
    assert ((found.codes >= 0) == present[..., None]).all()
    assert found.codes.max() < 12
    assert (found.error[~present] == 0).all()
    (found.tokens * torch.arange(8.0)).sum().backward()
    if place == "side":
        assert found.tokens is x
        assert torch.equal(x.grad, torch.arange(8.0).expand_as(x))
        return
    error = (found.tokens - x).square().mean(-1)[present]
    torch.testing.assert_close(found.error[present], error, rtol=1e-4, atol=1e-5)
    if config.kind == "ema":  # the gradient passes as it is
        assert torch.equal(x.grad, torch.arange(8.0).expand_as(x))
        first, book = quantiser.eval()(x, present).tokens[present][:, :4], quantiser.books[0]
        torch.testing.assert_close(first, book.codes[book.nearest(x[..., :4])[present]])
    else:
        assert x.grad.abs().sum() > 0
        assert all(p.grad is not None for p in quantiser.parameters())


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config.kind)
def test_validation_changes_nothing_and_empty_slots_do_not_count(config):
    torch.manual_seed(0)
    quantiser = Quantiser(config, 8).train()
    x, present = tokens()
    quantiser(x, present)
    before = {name: value.clone() for name, value in quantiser.state_dict().items()}
    found = quantiser.eval()(x, present)
    changed = quantiser(torch.where(present[..., None], x, 1e3), present)
    assert all(torch.equal(value, before[name]) for name, value in quantiser.state_dict().items())
    assert torch.equal(found.codes, changed.codes)
    assert torch.equal(found.error, changed.error)
    if found.shares is not None:
        torch.testing.assert_close(found.shares, changed.shares)
        torch.testing.assert_close(found.shares.sum(-1), present.sum(1, keepdim=True).expand(-1, 2).float())


def test_a_batch_without_parts_leaves_the_codes():
    book = EMACodebook(EMAQuantiserConfig(codes=4), 3).train()
    x, present = tokens(width=3)
    book(x, present)
    codes = book.codes.clone()
    book(x, torch.zeros_like(present))
    torch.testing.assert_close(book.codes, codes)
    assert book.codes.isfinite().all()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_gradients_pass_through_a_softmax_that_cools(share):
    """Against the formula, at the temperature of that time; what is drawn does not depend on it."""
    config = GumbelQuantiserConfig(size=12, sharpness=3.0, temperatures=[1.0, 0.2], temperature_steps=10)
    torch.manual_seed(0)
    book = config.build(4).train()
    x, present = torch.randn(20, 5, 4, requires_grad=True), torch.ones(20, 5, dtype=torch.bool)
    book.batches.fill_(round(10 * share))
    torch.manual_seed(1)
    stand, number, likely = book(x, present)
    torch.manual_seed(1)
    noise = -torch.empty(20, 5, 12).exponential_().log()
    far = (x[..., None, :] - book.codes).square().sum(-1)
    logits = -3 * far / far.mean().detach()
    soft = ((logits + noise) / (1 - 0.8 * share)).softmax(-1)
    assert torch.equal(number, (logits + noise).argmax(-1))
    torch.testing.assert_close(likely, logits.softmax(-1))
    torch.testing.assert_close(stand, book.codes[number])
    way = torch.randn(20, 5, 4)
    (found,) = torch.autograd.grad((stand * way).sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(((soft @ book.codes.detach()) * way).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_in_validation_how_likely_codes_are_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    book = GumbelQuantiserConfig(size=12).build(4)
    x, present = torch.randn(20, 5, 4), torch.ones(20, 5, dtype=torch.bool)
    for _ in range(3):
        book.train()(x, present)
    mean = (x[..., None, :] - book.codes).square().sum(-1).mean()
    assert book.usual.item() == pytest.approx(mean.item(), rel=1e-4)
    whole, part = book.eval()(x, present)[2], book(x[:3], present[:3])[2]
    torch.testing.assert_close(whole[:3], part)


@pytest.mark.parametrize("config", [KINDS[0], KINDS[2]], ids=lambda config: config.kind)
def test_codes_of_a_network_that_is_not_trained_stay_those_of_the_first_batch(config):
    torch.manual_seed(0)
    quantiser = Quantiser(config, 8).train()
    for book in quantiser.books:
        book.still = True
    quantiser(*tokens())
    kept = {name: value.clone() for name, value in quantiser.state_dict().items() if not name.endswith("batches")}
    for seed in range(1, 4):
        quantiser(*tokens(seed=seed))
    now = quantiser.state_dict()
    if config.kind == "ema":
        assert all(torch.equal(value, now[name]) for name, value in kept.items())
        assert kept["books.0.codes"].abs().sum() > 0
    else:
        assert torch.equal(now["books.0.codes"], kept["books.0.codes"])


def test_more_codes_than_can_be_counted_are_refused():
    with pytest.raises(ValueError, match="make 1000000 codes; at most 65536 are allowed"):
        FSQQuantiserConfig(levels=[1000, 1000])


def test_scores_of_codes():
    codes = torch.tensor([[0, 0], [1, 0], [2, 0], [3, 0], [-1, -1]])
    found = code_scores(codes, 8)
    assert found["codes_perplexity"] == pytest.approx((4 + 1) / 2)
    assert found["codes_active"] == pytest.approx((50 + 12.5) / 2)


def test_purity_of_codes():
    """Code 0 has colours 1 1 2, code 1 has 3; a second part has one code for all, of which two of four are 1."""
    codes, colour = torch.tensor([[0, 5], [0, 5], [0, 5], [1, 5]]), torch.tensor([1, 1, 2, 3])
    assert purity(codes[:, :1], colour) == 75
    assert purity(codes, colour) == pytest.approx((75 + 50) / 2)
    assert purity(torch.arange(4)[:, None], colour) == 100
