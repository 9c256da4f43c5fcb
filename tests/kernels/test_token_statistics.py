"""Token-statistics attention and its gradients against the formula in float64, and the invariances that it has."""

from functools import partial

import pytest
import torch
from torch import func
from torch.testing import assert_close

from seqjepa.kernels import causal_statistics, token_statistics, token_statistics_attention
from seqjepa.kernels._ops import ops
from seqjepa.kernels.token_statistics import token_statistics_reference

triton = pytest.mark.triton
SHAPES = [(2, 5, 3, 7), (3, 70, 4, 24), (1, 1, 1, 1), (2, 3, 2, 1), (4, 4, 4, 40), (1, 300, 1, 5), (0, 3, 2, 4)]


def drawn(shape, device, dtype=torch.float32):
    torch.manual_seed(0)
    w = torch.randn(shape, device=device).to(dtype).requires_grad_()
    temperature = torch.linspace(0.5, 2, shape[2], device=device).requires_grad_()
    return w, temperature, torch.randn(shape, device=device)


def definition(w, temperature):
    """TSSA of arXiv 2412.17810, one head and one batch at a time."""
    w = w.double()
    out = torch.empty_like(w)
    for batch, tokens in enumerate(w):  # [N, h, p]
        unit = tokens / tokens.norm(dim=0)
        membership = torch.softmax(temperature.double() * unit.square().sum(2), dim=1)  # [N, h]
        for head in range(tokens.shape[1]):
            share = membership[:, head] / (membership[:, head].sum() + 1e-8)
            moment = (share[:, None] * tokens[:, head].square()).sum(0)
            out[batch, :, head] = -tokens[:, head] * membership[:, head, None] / (1 + moment)
    return out


def causal_definition(w, temperature):
    """The same with running sums: a token's weight stays what it was when the token came."""
    w = w.double()
    out = torch.empty_like(w)
    for batch, tokens in enumerate(w):
        moment, total, second = 0, 0, 0
        for place, token in enumerate(tokens):  # [h, p]
            moment = moment + token.square()
            share = torch.softmax(temperature.double() * (token.square() / moment).sum(1), dim=0)
            total, second = total + share, second + share[:, None] * token.square()
            out[batch, place] = -token * share[:, None] / (1 + second / (total + 1e-8)[:, None])
    return out


def gradients(function, w, temperature, slope, **options):
    y = function(w, temperature, **options)
    return y, *torch.autograd.grad((y * slope.to(y.dtype)).sum(), [w, temperature])


@triton
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_output_and_gradients(shape, causal, device):
    """A few roundings of float32, and a weight is known as well as its score: by the score's own size."""
    w, temperature, slope = drawn(shape, device)
    found = gradients(token_statistics_attention, w, temperature, slope, causal=causal)
    exact_w, exact_t = (x.detach().double().requires_grad_() for x in (w, temperature))
    expected = gradients(token_statistics_reference, exact_w, exact_t, slope, causal=causal)
    formula = causal_definition if causal else definition
    assert_close(expected[0], formula(exact_w, exact_t), rtol=1e-12, atol=1e-12)
    squares = exact_w.detach().square()
    moments = squares.cumsum(1) if causal else squares.sum(1, keepdim=True)
    score = (squares / moments).sum(-1).max().item() * 2 if len(w) else 0.0
    for got, true in zip(found, expected, strict=True):
        assert got.dtype == torch.float32
        # with one head its weight is 1 whatever the temperature: a gradient of exactly zero
        assert (got - true).norm() <= (1e-6 + 2**-24 * score) * true.norm() + 1e-9


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_differences(causal):
    w, temperature, _ = drawn((2, 21, 3, 2), "cpu", torch.float64)  # more than two chunks of a causal program
    function = partial(token_statistics_attention, causal=causal)
    assert torch.autograd.gradcheck(function, (w, temperature.double()))


@triton
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, causal, device):
    w, temperature, slope = drawn((2, 33, 4, 16), device, dtype)
    slope = slope.to(dtype)
    y, dw, _ = gradients(token_statistics_attention, w, temperature, slope, causal=causal)
    exact, exact_t = w.detach().double().requires_grad_(), temperature.detach().double().requires_grad_()
    expected = gradients(token_statistics_reference, exact, exact_t, slope, causal=causal)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-10
    assert y.dtype == dw.dtype == dtype
    assert (y - expected[0]).norm() <= step * expected[0].norm()
    assert (dw - expected[1]).norm() <= step * expected[1].norm()


@triton
@pytest.mark.parametrize("causal", [False, True])
def test_strides_do_not_matter(causal, device):
    w, temperature, slope = drawn((2, 9, 3, 5), device)
    turned = w.detach().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).requires_grad_()
    assert not turned.is_contiguous()
    for got, expected in zip(
        gradients(token_statistics_attention, turned, temperature, slope, causal=causal),
        gradients(token_statistics_attention, w, temperature, slope, causal=causal),
        strict=True,
    ):
        assert_close(got, expected)


@triton
def test_invariances(device):
    w, temperature, _ = (x.detach() for x in drawn((2, 12, 3, 8), device))
    y = token_statistics_attention(w, temperature)
    order = torch.randperm(12, device=device)
    assert_close(token_statistics_attention(w[:, order], temperature), y[:, order])  # equivariant to permutations
    flipped = w.clone()
    flipped[:, 1:] *= -1
    assert torch.equal(token_statistics_attention(flipped, temperature)[:, 0], y[:, 0])  # squares have no sign
    # channels may be rotated within no head: each has a norm of its own; but heads may change places
    heads = torch.tensor([2, 0, 1], device=device)
    turned = token_statistics_attention(w[:, :, heads], temperature[heads])
    assert_close(turned, y[:, :, heads])


@triton
@pytest.mark.parametrize("causal", [False, True])
def test_a_zero_token_asks_nothing_of_the_others(causal, device):
    w, temperature, slope = drawn((2, 6, 3, 4), device)
    with torch.no_grad():
        w[:, 2] = 0
    y = token_statistics_attention(w, temperature, causal=causal)
    assert torch.equal(y[:, 2], torch.zeros_like(y[:, 2]))
    (dw,) = torch.autograd.grad((y[:, 2] * slope[:, 2]).sum(), w)
    assert torch.count_nonzero(dw[:, [0, 1, 3, 4, 5]]) == 0
    nothing = token_statistics_attention(torch.zeros_like(w), temperature, causal=causal)
    assert torch.count_nonzero(nothing) == 0


@triton
def test_the_first_causal_token_is_shared_by_all_heads(device):
    """Its squares are its moments, so that each head's score is the same: the weight is 1 / h, S is its own square."""
    w, _, slope = (x.detach() for x in drawn((2, 40, 4, 40), device))
    even = w.new_ones(4)
    y = token_statistics_attention(w, even, causal=True)
    assert_close(y[:, 0], -w[:, 0] / 4 / (1 + w[:, 0].square()))
    # no token depends on later ones, in its own chunk or another, and no gradient goes back to them
    for place in (39, 30):
        changed = w.clone()
        changed[:, place] += 1
        changed.requires_grad_()
        again = token_statistics_attention(changed, even, causal=True)
        assert torch.equal(again[:, :place], y[:, :place])
        assert (again[:, place] != y[:, place]).any()
        (dw,) = torch.autograd.grad((again * slope)[:, :place].sum(), changed)
        assert torch.count_nonzero(dw[:, place:]) == 0


@triton
def test_causal_chunks_follow_one_another(device):
    """What a program keeps for a chunk are the sums over all tokens before it."""
    w = drawn((2, 40, 4, 40), device)[0].detach()
    _, sums, totals = ops.causal_statistics(w, w.new_ones(4))
    size = causal_statistics.plan(4, 40)[0]["BLOCK_N"]
    assert sums.shape[1] == totals.shape[1] == -(-40 // size) > 2
    squares = w.square()
    moments = squares.cumsum(1)
    weights = (squares / moments).sum(-1).softmax(-1)
    for chunk in range(sums.shape[1]):
        before = slice(0, chunk * size)
        assert_close(sums[:, chunk, 0], squares[:, before].sum(1))
        assert_close(sums[:, chunk, 1], (squares * weights[..., None])[:, before].sum(1))
        assert_close(totals[:, chunk], weights[:, before].sum(1))


def test_it_keeps_little_more_than_its_input():
    """Saved for backward: the tokens, a weight for each head, and three numbers for each channel.

    A causal program keeps two numbers of each channel for each of its chunks instead.
    """
    w, temperature, _ = drawn((4, 256, 4, 40), "cpu")
    kept = {}

    def remember(x):
        kept[x.data_ptr()] = x.numel() * x.element_size()
        return x

    def bytes_of(function, **options):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
            function(w, temperature, **options)
        return sum(kept.values())

    size = w.numel() * w.element_size()
    assert bytes_of(token_statistics_attention) < 1.05 * size
    assert bytes_of(token_statistics_reference) > 3 * size
    chunk = causal_statistics.plan(4, 40)[0]["BLOCK_N"]
    assert bytes_of(token_statistics_attention, causal=True) < (1.01 + 2.1 / chunk) * size


def test_the_longest_sequences_can_be_launched():
    """CUDA takes at most 65,535 programs on every axis but the first."""
    w = torch.empty(2, 2**22, 12, 64, device="meta")
    sizes, *grids = token_statistics._plan(w)
    assert grids[1] == (2 * 2**22 // sizes["BLOCK_N"],)
    assert all(programs <= 65535 for grid in grids for programs in grid[1:])


@pytest.mark.parametrize("permuted", [False, True])
def test_opcheck(permuted):
    """Fake tensors have the shapes, dtypes and strides of real ones, whatever the strides of the tokens."""
    w = drawn((2, 9, 3, 5), "cpu")[0].detach()
    w = w.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) if permuted else w
    temperature = torch.ones(3)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(ops.token_statistics.default, (w.clone().requires_grad_(), temperature), test_utils=checks)
    y, *saved = ops.token_statistics(w, temperature)
    arguments = (torch.ones_like(y), w, temperature, *saved)
    torch.library.opcheck(ops.token_statistics_backward.default, arguments, test_utils=checks)
    torch.library.opcheck(ops.causal_statistics.default, (w.clone().requires_grad_(), temperature), test_utils=checks)
    y, *saved = ops.causal_statistics(w, temperature)
    arguments = (torch.ones_like(y), w, temperature, *saved)
    torch.library.opcheck(ops.causal_statistics_backward.default, arguments, test_utils=checks)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, where forward mode starts
@pytest.mark.parametrize("causal", [False, True])
def test_it_compiles_maps_and_is_differentiated_once(causal):
    w, temperature, slope = drawn((3, 6, 2, 4), "cpu")
    attention = partial(token_statistics_attention, causal=causal)
    expected = gradients(attention, w, temperature, slope)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for got, true in zip(gradients(compiled, w, temperature, slope), expected, strict=True):
        assert_close(got, true)
    many = torch.stack([w.detach(), 2 * w.detach()])
    mapped = func.vmap(attention, in_dims=(0, None))(many, temperature.detach())
    assert_close(mapped[1], attention(2 * w, temperature))
    loss = func.grad(lambda x: (attention(x, temperature) * slope).sum())
    assert_close(loss(w.detach()), expected[1])
    with pytest.raises(RuntimeError, match="has no forward-mode derivative; use reverse mode"):
        func.jvp(lambda x: attention(x, temperature), (w.detach(),), (slope,))
    (first,) = torch.autograd.grad(attention(w, temperature).sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        first.sum().backward()


@pytest.mark.parametrize(
    ("w", "temperature", "said"),
    [
        (torch.ones(2, 3, 4), torch.ones(3), r"\[B, N, h, p\].*\[2, 3, 4\]"),
        (torch.ones(2, 3, 4, 0), torch.ones(4), r"\[2, 3, 4, 0\]"),
        (torch.ones(2, 3, 4, 5, dtype=torch.long), torch.ones(4), "torch.int64"),
        (torch.ones(2, 3, 4, 5), torch.ones(3), r"temperature must be floating-point \[4\].*\[3\]"),
    ],
)
def test_wrong_arguments(w, temperature, said):
    with pytest.raises(ValueError, match=said):
        token_statistics_attention(w, temperature)


@triton
@pytest.mark.parametrize("causal", [False, True])
def test_several_gradients_at_once(causal, device):
    """vmap hands the backward pass one batch several times."""
    torch.manual_seed(0)
    w, temperature = torch.randn(1, 20, 2, 16, device=device), torch.ones(2, device=device)
    y, pullback = torch.func.vjp(lambda w: token_statistics_attention(w, temperature, causal=causal), w)
    directions = torch.randn(3, *y.shape, device=device)
    together = torch.func.vmap(lambda v: pullback(v)[0])(directions)
    for one, v in zip(together, directions, strict=True):
        torch.testing.assert_close(one, pullback(v)[0])
