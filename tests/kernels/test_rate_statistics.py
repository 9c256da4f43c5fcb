"""What `coding_rate_stats` says of batches, healthy and broken."""

import pytest
import torch

from seqjepa.kernels import coding_rate, coding_rate_stats

triton = pytest.mark.triton


def test_stats_of_collapsed_and_broken_batches(device):
    z = torch.randn(3, 10, 6, device=device)
    z[1] = 1.0
    z[2, 0, 0] = float("nan")
    stats = coding_rate_stats(z, alpha=1.0)
    assert stats.rate[1] == 0
    assert stats.rate_fraction[1] == 0
    assert stats.effective_rank[1] == 1
    for value in stats:
        assert value[0].isfinite().all()
        assert value[2].isnan().all()


def test_stats_agree_with_the_rate(device):
    z = torch.randn(50, 20, device=device) / torch.arange(1, 21, device=device)
    for rows in (50, 12):
        part = z[:rows]
        stats = coding_rate_stats(part, eps=0.1)
        assert stats.rate.item() == pytest.approx(coding_rate(part, eps=0.1).item(), rel=1e-4)
        values = torch.linalg.svdvals((part - part.mean(0)).double())
        share = values / values.sum()
        share = share[share > 0]
        assert stats.effective_rank.item() == pytest.approx((-(share * share.log()).sum()).exp().item(), rel=1e-3)
        assert stats.spectrum.shape == (min(rows, 20),)
        assert 0 < stats.rate_fraction < 1


@triton
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode loads scripts
@pytest.mark.parametrize(("rows", "width"), [(12, 5), (5, 12)])
def test_stats_under_transforms(rows, width, device):
    """A loss that logs them is differentiated: constants to reverse mode, and to forward mode their slope."""
    torch.manual_seed(0)
    z, tangent = torch.randn(2, 3, rows, width, device=device)

    def stats(z):
        return torch.stack(coding_rate_stats(z, eps=0.5)[:3])

    for part, one in zip(torch.func.vmap(stats, out_dims=1)(z).unbind(1), z, strict=True):
        torch.testing.assert_close(part, stats(one))
    assert not torch.func.grad(lambda z: stats(z).sum())(z).any()
    slope = (stats(z.double() + 1e-6 * tangent) - stats(z.double() - 1e-6 * tangent)) / 2e-6
    got = torch.func.jvp(stats, (z,), (tangent,))[1]
    torch.testing.assert_close(got.double(), slope, rtol=1e-4, atol=1e-5)


def test_stats_compile_whole(device):
    torch._dynamo.reset()
    z = torch.randn(3, 12, 5, device=device)
    whole = torch.compile(lambda z: coding_rate_stats(z, eps=0.5), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(z), coding_rate_stats(z, eps=0.5))


def test_stats_of_no_batches():
    stats = coding_rate_stats(torch.zeros(0, 5, 3), alpha=1.0)
    assert [tuple(value.shape) for value in stats] == [(0,), (0,), (0,), (0, 3)]
