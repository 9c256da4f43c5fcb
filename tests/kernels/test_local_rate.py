"""The local coding rate against its definition in float64, and against the global one where they must agree."""

import pytest
import torch
from torch.testing import assert_close

from seqjepa.kernels import coding_rate, local_coding_rate
from seqjepa.kernels.local_rate import nearest


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def definition(z, count, eps):
    """One neighbourhood at a time, by sorting its distances."""
    rates = []
    for row in z:
        members = z[(z - row).norm(dim=1).argsort(stable=True)[:count]]
        members = members - members.mean(0)
        scale = z.shape[1] / (count * eps)
        rates.append(torch.logdet(torch.eye(z.shape[1]).to(z) + scale * members.T @ members))
    return torch.stack(rates)


@pytest.mark.triton
@pytest.mark.parametrize(("shape", "count"), [((20, 6), 4), ((2, 7, 5), 7), ((2, 9, 40), 3), ((5, 3), 1)])
def test_value_and_gradient(shape, count, device):
    z = drawn(*shape).to(device).requires_grad_()
    got = local_coding_rate(z, count, eps=0.5)
    weights = drawn(*shape[:-1], seed=1).to(device)
    (gradient,) = torch.autograd.grad((got * weights).sum(), z)
    exact = z.detach().double().requires_grad_()
    batches = exact.flatten(0, -3) if exact.ndim > 2 else exact[None]
    expected = torch.stack([definition(batch, count, 0.5) for batch in batches]).view(shape[:-1])
    (true,) = torch.autograd.grad((expected * weights).sum(), exact)
    assert got.dtype == torch.float32
    # the bounds of `coding_rate` for the rows of one neighbourhood: a trace of at most n + c |z|²
    assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    assert (gradient - true).norm() <= 1e-4 * true.norm() + 1e-6


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_neighbours_far_from_the_origin(offset):
    """64 rows: distances by products of matrices would be off by the square of the offset's rounding."""
    z = offset + 0.1 * drawn(64, 12)
    distance = (z[:, None].double() - z.double()).norm(dim=-1)
    expected = distance.argsort(dim=1, stable=True)[:, :5]
    assert_close(nearest(z, 5).sort().values, expected.sort().values)
    fine = 1 + 1e-6 * drawn(64, 12).double()
    expected = (fine[:, None] - fine).norm(dim=-1).argsort(dim=1, stable=True)[:, :5]
    assert_close(nearest(fine, 5).sort().values, expected.sort().values)


def test_all_rows_are_the_global_rate():
    z = drawn(2, 12, 5).double().requires_grad_()
    local = local_coding_rate(z, 12, alpha=2.0)
    whole = coding_rate(z, alpha=2.0)
    assert_close(local, whole[:, None].expand(-1, 12))
    local, whole = (torch.autograd.grad(x.sum() / n, z)[0] for x, n in ((local, 12), (whole, 1)))
    assert_close(local, whole)


def test_it_sees_collapse_in_pieces():
    """Four points that lie apart, each ten times: a global rate, but nothing differs within a neighbourhood."""
    z = (10 * torch.eye(4, 6)).repeat_interleave(10, 0)
    assert coding_rate(z, eps=0.5).item() > 5
    assert_close(local_coding_rate(z, 10, eps=0.5), torch.zeros(40))
    spread = z + 0.1 * drawn(40, 6)
    assert local_coding_rate(spread, 10, eps=0.5).min() > 0.01


def test_rows_may_be_moved_turned_and_reordered():
    z, turn = drawn(15, 4).double(), torch.linalg.qr(drawn(4, 4, seed=1))[0].double()
    order = torch.randperm(15)
    before = local_coding_rate(z, 5, eps=0.5)
    assert_close(local_coding_rate((z @ turn + 3)[order], 5, eps=0.5), before[order])
    twice = torch.cat([z, z])  # equal rows: each is still its own first neighbour
    assert torch.equal(nearest(twice, 3)[:, 0], torch.arange(30))


def test_it_compiles():
    z = drawn(3, 16, 5)
    compiled = torch.compile(lambda z: local_coding_rate(z, 4, eps=0.5), fullgraph=True, backend="aot_eager")
    assert_close(compiled(z), local_coding_rate(z, 4, eps=0.5))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, where forward mode starts
def test_forward_mode_agrees_with_reverse_mode():
    z, direction = drawn(2, 9, 4).double(), drawn(2, 9, 4, seed=1).double()
    rates, tangent = torch.func.jvp(lambda z: local_coding_rate(z, 4, eps=0.5), (z,), (direction,))
    rows = torch.func.jacrev(lambda z: local_coding_rate(z, 4, eps=0.5))(z)
    assert_close(tangent, (rows * direction).sum((-3, -2, -1)))
    assert_close(rates, local_coding_rate(z, 4, eps=0.5))


def test_no_batch_has_no_rate():
    assert local_coding_rate(torch.ones(0, 3, 4), 2, eps=0.5).shape == (0, 3)


@pytest.mark.parametrize(
    ("z", "count", "said"),
    [
        ([1.0], 2, "z must be a tensor, got list"),
        (torch.ones(3, 0), 2, r"with rows and columns.*\[3, 0\]"),
        (torch.ones(5), 2, r"\[\.\.\., B, d\].*\[5\]"),
        (torch.ones(5, 3), 6, "at most the 5 rows, got 6"),
        (torch.ones(5, 3), 0, "count"),
    ],
)
def test_wrong_arguments(z, count, said):
    with pytest.raises(ValueError, match=said):
        local_coding_rate(z, count, eps=0.5)
