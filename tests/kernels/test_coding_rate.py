"""Coding rate and its gradient against closed forms in float64, on the spectra on which others break."""

import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from seqjepa.kernels import CodingRate, coding_rate, coding_rate_stats
from seqjepa.kernels._ops import ops
from seqjepa.kernels.internal.backend import INTERPRETED

triton = pytest.mark.triton


def batch(rows: int, width: int, spectrum: str, device: torch.device) -> Tensor:
    """Features [rows, width] in float32 with a given fall of singular values."""
    generator = torch.Generator().manual_seed(rows * 7919 + width)
    z = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    if spectrum == "power law":
        z = z / torch.arange(1, width + 1)
    elif spectrum == "rank 4":
        low = torch.randn(rows, 4, generator=generator, dtype=torch.float64) @ torch.randn(
            4, width, generator=generator, dtype=torch.float64
        )
        z = low + 1e-2 * z
    elif spectrum == "almost constant":
        z = torch.randn(width, generator=generator, dtype=torch.float64) + 1e-2 * z
    return torch.nn.functional.normalize(z, dim=-1).float().to(device)


def closed_form(z: Tensor, c: float, center: bool) -> tuple[Tensor, Tensor, float]:
    """Rate, gradient and condition number from singular values in float64: Σ log(1 + cσ²), U 2cσ / (1 + cσ²) Vᵀ."""
    z = z.double()
    if center:
        z = z - z.mean(0)
    u, s, vt = torch.linalg.svd(z, full_matrices=False)
    condition = (1 + c * s.max() ** 2).item()
    return torch.log1p(c * s**2).sum(), u @ torch.diag(2 * c * s / (1 + c * s**2)) @ vt, condition


SHAPES = [(1, 1), (1, 16), (15, 17), (16, 16), (17, 15), (100, 128), (128, 100), (33, 130)]
LARGE = [(640, 1000), (1000, 640), (512, 640)]
SPECTRA = ["isotropic", "power law", "rank 4", "almost constant"]


def check(z, alpha, center, roundings=16):
    """The bounds of kernels/README; `roundings` of the gradient for each unit of the condition number."""
    rows, width = z.shape
    n, c = min(rows, width), alpha / rows
    rate, gradient, condition = closed_form(z, c, center)
    z.requires_grad_()
    got, info = coding_rate(z, alpha=alpha, center=center, return_info=True)
    assert info == 0
    got.backward()
    # An entry of M is rounded by its own size, and d log det M = tr(M⁻¹ dM) with M⁻¹ ≤ I: errors go with tr M, however
    # small the rate. 5.5 roundings of it were the most that was measured.
    x = z.detach().double()
    trace = n + c * (x - x.mean(0) if center else x).square().sum().item()
    assert abs(got.item() - rate.item()) <= 2**-21 * trace
    error = (z.grad - gradient).norm()
    roundings = 16 if z.is_cuda else roundings
    assert error <= (roundings * 2**-24 * condition + 2e-6) * gradient.norm() + 1e-6


@triton
@pytest.mark.parametrize(("rows", "width"), SHAPES)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_rate_and_gradient(rows, width, spectrum, device):
    for center, eps in ((True, 0.5), (False, 0.05)):
        check(batch(rows, width, spectrum, device), width / eps, center, roundings=3)


@triton
def test_more_rows_than_are_centred_at_once(device):
    check(batch(4200, 5, "almost constant", device), 10.0, True, roundings=3)


def test_more_rows_than_are_added_up_in_one_sum(device):
    """A CPU's products add one number after the other: in one sum the rounding errors would pass the bound."""
    check(batch(65_536, 8, "isotropic", device), 16.0, False, roundings=3)


@triton
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_condition_ten_thousand(spectrum, device):
    """eps 0.01, width 128: the condition number of an almost constant batch is past 1e4."""
    check(batch(256, 128, spectrum, device), 128 / 0.01, False, roundings=3)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("noise", [0, 1e-4, 1e-3])
@pytest.mark.parametrize(
    ("rows", "width", "alpha"),
    [(513, 257, 1.0), (257, 513, 100.0), pytest.param(150, 32, 3200.0, marks=triton)],
)
def test_unit_rows_that_hardly_differ(rows, width, alpha, noise, center, device):
    """A rate near zero, where there is nothing but rounding, and one large singular value."""
    generator = torch.Generator().manual_seed(rows)
    z = torch.randn(width, generator=generator) / width**0.5
    z = z + noise * torch.randn(rows, width, generator=generator) / width**0.5
    check(torch.nn.functional.normalize(z, dim=-1).to(device), alpha, center)


@pytest.mark.parametrize(("rows", "width"), LARGE)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_large(rows, width, spectrum, device):
    check(batch(rows, width, spectrum, device), width / 0.05, True, roundings=3)


@triton
def test_an_isotropic_batch_has_its_closed_form(device):
    """If ZᵀZ = s I the rate is d log(1 + c s); its fraction of the maximum is 1 and its effective rank d."""
    z = 3 * torch.eye(24, device=device).repeat(2, 1)  # ZᵀZ = 18 I
    expected = 24 * torch.log1p(torch.tensor(5.0 / 48 * 18))
    assert coding_rate(z, alpha=5.0, center=False).item() == pytest.approx(expected.item(), rel=1e-6)
    stats = coding_rate_stats(z, alpha=5.0, center=False)
    assert stats.rate.item() == pytest.approx(expected.item(), rel=1e-5)
    assert stats.rate_fraction.item() == pytest.approx(1, rel=1e-5)
    assert stats.effective_rank.item() == pytest.approx(24, rel=1e-5)
    torch.testing.assert_close(stats.spectrum, torch.full((24,), 18 / 48, device=device))


@triton
@pytest.mark.parametrize("shape", [(3, 20, 12), (2, 3, 12, 20)])
def test_batches_are_rates_one_by_one(shape, device):
    torch.manual_seed(0)
    z = torch.randn(*shape, device=device)
    together = coding_rate(z, alpha=2.0)
    assert together.shape == shape[:-2]
    alone = torch.stack([coding_rate(part, alpha=2.0) for part in z.flatten(0, -3)])
    torch.testing.assert_close(together.flatten(), alone, rtol=1e-6, atol=1e-6)


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_exact_of_what_came_in(dtype, device):
    z = batch(60, 40, "rank 4", device).to(dtype).requires_grad_()
    rate, gradient, _ = closed_form(z.detach(), 40 / (60 * 0.05), True)
    got = coding_rate(z, eps=0.05)
    got.backward()
    assert got.dtype == torch.float32
    assert z.grad.dtype == dtype
    assert got.item() == pytest.approx(rate.item(), rel=1e-5)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-10  # rounding of the gradient to the input's dtype
    assert (z.grad - gradient).norm() <= step * gradient.norm()


@triton
def test_strides_do_not_matter(device):
    torch.manual_seed(0)
    plain = torch.randn(4, 30, 18, device=device)
    expected = coding_rate(plain, alpha=1.0)
    strided = torch.randn(30, 36, 4, device=device)
    view = strided.permute(2, 0, 1)[..., ::2]
    view.copy_(plain)
    torch.testing.assert_close(coding_rate(view, alpha=1.0), expected, rtol=1e-6, atol=0)


@triton
def test_class_rates_by_membership(device):
    """Hard classes are the rates of their rows; soft ones have the closed form with diag(w)."""
    torch.manual_seed(0)
    z = torch.randn(30, 10, device=device)
    hard = torch.zeros(3, 30, device=device)
    hard[0, :8] = 1
    hard[1, 8:] = 1  # the third class is empty
    for center in (False, True):
        rates = coding_rate(z, eps=0.5, weights=hard, center=center)
        torch.testing.assert_close(rates[0], coding_rate(z[:8], eps=0.5, center=center), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(rates[1], coding_rate(z[8:], eps=0.5, center=center), rtol=1e-5, atol=1e-5)
        assert rates[2] == 0

    w = torch.rand(30, device=device)
    x, weight = z.double(), w.double()
    x = x - (weight @ x) / weight.sum()
    covariance = x.mT @ torch.diag(weight) @ x / weight.sum()
    expected = torch.linalg.slogdet(torch.eye(10, device=device) + 10 / 0.5 * covariance).logabsdet
    assert coding_rate(z, eps=0.5, weights=w).item() == pytest.approx(expected.item(), rel=1e-5)


@triton
def test_class_gradients(device):
    torch.manual_seed(0)
    z = torch.randn(20, 6, device=device)
    weights = torch.rand(3, 20, device=device)
    weights[0, :10] = 0
    outcome = []
    for dtype in (torch.float32, torch.float64):
        x, w = (value.detach().to(dtype, copy=True).requires_grad_() for value in (z, weights))
        if dtype == torch.float32:
            rates = coding_rate(x, eps=0.5, weights=w)
        else:  # from the definition, by autograd
            mass = w.sum(-1)[:, None, None]
            centred = x - (w[..., None] * x).sum(-2, keepdim=True) / mass
            covariance = centred.mT @ (w[..., None] * centred) / mass
            rates = torch.logdet(torch.eye(6, dtype=dtype, device=device) + 12 * covariance)
        (rates * torch.tensor([1.0, -2.0, 0.5], device=device)).sum().backward()
        outcome.append((x.grad.double(), w.grad.double()))
    for got, expected in zip(*outcome, strict=True):
        assert (got - expected).norm() / expected.norm() < 1e-5


def by_rows(z, weights, c):
    """log det(I + c √W Z Zᵀ √W) in float64, of weights that are not zero: as good where B is far below d."""
    y = weights.double().sqrt()[..., None] * z.double()
    return torch.linalg.slogdet(torch.eye(z.shape[-2], device=z.device) + c[..., None, None] * y @ y.mT).logabsdet


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode loads scripts
@pytest.mark.parametrize(("rows", "width"), [(16, 1024), pytest.param(5, 40, marks=triton)])
def test_few_rows_with_weights(rows, width, device):
    """Whatever is differentiated and however, the factor is of the rows' side: that of 1024 columns would fail."""
    torch.manual_seed(0)
    z = torch.randn(rows, width, device=device)
    weights = torch.rand(3, rows, device=device) + 0.1
    x, w = (value.double().requires_grad_() for value in (z, weights))
    expected = by_rows(x, w, width / 0.01 / w.sum(-1))
    dx, dw = torch.autograd.grad(expected.sum(), (x, w))

    def rate(z, weights=weights):
        return coding_rate(z, eps=0.01, center=False, weights=weights)

    def total(*inputs):
        return rate(*inputs).sum()

    def compare(got, expected):
        assert (got - expected).norm() <= 1e-5 * expected.norm()

    compare(rate(z), expected)
    compare(torch.func.grad(total)(z), dx)
    compare(torch.func.vmap(lambda w: rate(z, w))(weights), expected)
    compare(torch.func.jvp(rate, (z,), (z,))[1].sum(), (dx * z).sum())
    for got in (
        torch.func.grad(total, argnums=(0, 1))(z, weights),
        torch.autograd.grad(total(*(inputs := (z.requires_grad_(), weights.requires_grad_()))), inputs),
    ):
        compare(got[0], dx)
        compare(got[1], dw)


@triton
@pytest.mark.parametrize(("rows", "width"), [(6, 9), (9, 6)])
@pytest.mark.parametrize("center", [True, False])
def test_gradient_of_weights_that_are_zero(rows, width, center, device):
    """A hard class as a parameter: what a row outside would add, c (zᵢ M⁻¹ zᵢᵀ - tr(I - M⁻¹) / (c Σ w))."""
    torch.manual_seed(0)
    z, weights = torch.randn(rows, width, device=device), torch.ones(rows, device=device)
    weights[1::2] = 0
    coding_rate(z, eps=0.5, center=center, weights=weights.requires_grad_()).backward()
    x, members, c = z.double(), weights.detach().double(), width / 0.5 / weights.sum().item()
    if center:
        x = x - (members @ x) / members.sum()
    inverse = torch.linalg.inv(torch.eye(width, device=device) + c * x.mT @ (members[:, None] * x))
    expected = c * ((x @ inverse) * x).sum(-1) - (width - inverse.trace()) / members.sum()
    torch.testing.assert_close(weights.grad.double(), expected, rtol=1e-5, atol=1e-5)


@triton
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e5])
@pytest.mark.parametrize("others", [3, 63])
def test_a_class_of_one_member_has_no_rate(others, scale, device):
    """Far from the mean of the rows as it may be, it is its own mean."""
    torch.manual_seed(0)
    z = scale * torch.randn(1 + others, 16, device=device)
    weights = torch.zeros(1 + others, device=device)
    weights[0] = 1
    assert coding_rate(z, eps=1e-4, weights=weights).abs() <= 2**-21 * 16


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's forward mode loads scripts
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("rows", "width"), [pytest.param(30, 20, marks=triton), pytest.param(20, 30, marks=triton), (300, 280)]
)
def test_a_factor_that_fails_has_no_gradient_either(rows, width, weighted, device):
    """Rows of 1e6 that hardly differ: beside them the identity is lost. The other batch is as it is alone."""
    z = torch.randn(2, rows, width, device=device)
    z[1, :] = 1e6 * z[1, :1] + 1e-2 * z[1]
    z.requires_grad_()
    weights = torch.ones(rows, device=device, requires_grad=True) if weighted else None
    rate, info = coding_rate(z, eps=0.1, center=False, weights=weights, return_info=True)
    assert (info > 0).tolist() == [False, True]
    assert rate.isnan().tolist() == [False, True]
    rate.sum().backward()
    assert z.grad[1].isnan().all()
    assert z.grad[0].isfinite().all()
    if weighted:
        assert weights.grad.isnan().all()
    tangent = torch.func.jvp(lambda z: coding_rate(z, eps=0.1, center=False), (z.detach(),), (z.detach(),))[1]
    assert tangent.isnan().tolist() == [False, True]


@triton
def test_an_empty_class_has_no_gradient(device):
    z = torch.randn(8, 4, device=device, requires_grad=True)
    coding_rate(z, eps=0.5, weights=torch.zeros(8, device=device)).backward()
    assert torch.equal(z.grad, torch.zeros_like(z))


@triton
def test_edges(device):
    one = torch.randn(1, 9, device=device, requires_grad=True)
    rate = coding_rate(one, alpha=3.0)
    rate.backward()
    assert rate == 0  # a single row is its own mean
    assert torch.equal(one.grad, torch.zeros_like(one))
    zero = torch.zeros(5, 9, device=device, requires_grad=True)
    rate = coding_rate(zero, alpha=3.0)
    rate.backward()
    assert rate == 0
    assert torch.equal(zero.grad, torch.zeros_like(zero))


@triton
def test_a_class_of_hardly_any_weight_is_empty(device):
    """Saturated soft memberships: a mass in the denormals would make c infinite."""
    z = torch.randn(8, 4, device=device, requires_grad=True)
    weights = torch.stack([torch.ones(8, device=device), torch.full((8,), 1e-39, device=device)]).requires_grad_()
    rates = coding_rate(z, eps=0.5, weights=weights)
    rates.sum().backward()
    torch.testing.assert_close(rates[0], coding_rate(z, eps=0.5))
    assert rates[1] == 0
    assert z.grad.isfinite().all()
    assert weights.grad.isfinite().all()


@triton
def test_no_batches_are_no_rates(device):
    z = torch.zeros(0, 5, 3, device=device, requires_grad=True)
    rates = coding_rate(z, alpha=1.0)
    rates.sum().backward()
    assert rates.shape == (0,)
    assert z.grad.shape == z.shape


@triton
def test_a_nan_stays_in_its_batch(device):
    z = torch.randn(3, 12, 7, device=device)
    z[1, 4] = float("nan")
    z.requires_grad_()
    rate, info = coding_rate(z, alpha=1.0, return_info=True)
    rate.sum().backward()
    assert rate.isnan().tolist() == [False, True, False]
    assert (info != 0).tolist() == [False, True, False]
    assert z.grad.isfinite().all(dim=(1, 2)).tolist() == [True, False, True]


@triton
def test_settings_of_the_surroundings_do_not_matter(device):
    """Neither autocast nor a lower precision of products; and the setting is as before afterwards."""
    z = batch(128, 64, "almost constant", device)
    outcome = []
    for autocast, precision in ((False, "highest"), (True, "highest"), (False, "medium"), (True, "medium")):
        torch.set_float32_matmul_precision(precision)
        try:
            x = z.clone().requires_grad_()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                rate = coding_rate(x, eps=0.05, center=False)
                rate.backward()
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision("highest")
        outcome.append((rate.detach(), x.grad))
    for rate, gradient in outcome[1:]:
        assert torch.equal(rate, outcome[0][0])
        assert torch.equal(gradient, outcome[0][1])


def test_a_thousand_batches_that_break_a_half_precision_gram(device):
    """Collapsing unit features under bfloat16 autocast (SimDINO's issues 19, 20 and 43)."""
    torch.manual_seed(0)
    z = torch.randn(1000, 1, 64, device=device) + 0.03 * torch.randn(1000, 32, 64, device=device)
    z = torch.nn.functional.normalize(z, dim=-1).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        gram = torch.eye(64, device=device) + 64 / (32 * 0.05) * (z.mT @ z)  # autocast rounds it
        broken = torch.linalg.cholesky_ex(gram.detach().float()).info > 0
        rate, info = coding_rate(z, eps=0.05, center=False, return_info=True)
        rate.sum().backward()
    assert broken.float().mean() > 0.1  # what the test is about does happen here
    assert rate.isfinite().all()
    assert z.grad.isfinite().all()
    assert (info == 0).all()


@triton
def test_device_scalars_and_module(device):
    z = torch.randn(20, 8, device=device)
    assert coding_rate(z, alpha=torch.tensor(2.5, device=device)) == coding_rate(z, alpha=2.5)
    module = CodingRate(eps=0.5).to(device)
    before = module(z)
    module.eps.fill_(0.05)  # a schedule
    assert before == coding_rate(z, eps=0.5)
    assert module(z) == coding_rate(z, eps=0.05)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(9, 5), (5, 9)])
def test_gradcheck(rows, width, center):
    torch.manual_seed(0)
    z = torch.randn(2, rows, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: coding_rate(z, alpha=3.0, center=center), (z,))
    weights = torch.rand(2, rows, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, w: coding_rate(z, eps=0.4, center=center, weights=w), (z, weights))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it
def test_opcheck(device):
    nothing, scale = torch.zeros(2, 0, device=device), torch.tensor([2.0, 3.0], device=device)
    for rows, width, samples in ((8, 5, False), (5, 8, True)):
        z = torch.randn(2, rows, width, device=device, requires_grad=True)
        torch.library.opcheck(ops.coding_rate.default, (z, nothing, scale, True, samples, False, "", 1))
        torch.library.opcheck(ops.coding_rate_gram.default, (z.detach(), True, samples, "", 1))
    laid_out_otherwise = torch.randn(2, 5, 8, device=device).mT.requires_grad_()
    for given, center in ((laid_out_otherwise, True), (z.detach().bfloat16().requires_grad_(), False)):
        arguments = (given, nothing, scale, center, False, False, "", 1)
        torch.library.opcheck(ops.coding_rate.default, arguments, test_utils=("test_schema", "test_faketensor"))
    z, weights = torch.randn(2, 8, 5, device=device), torch.rand(2, 8, device=device, requires_grad=True)
    for samples in (False, True):
        torch.library.opcheck(ops.coding_rate.default, (z, weights, scale, True, samples, False, "", 1))


@pytest.mark.parametrize(("shape", "samples"), [((2, 150, 128), False), ((2, 256, 260), True)])
def test_a_factor_that_is_larger_than_its_matrix(shape, samples):
    z, scale = torch.randn(shape, requires_grad=True), torch.tensor([2.0, 3.0])
    arguments = (z, torch.zeros(2, 0), scale, True, samples, False, "", 1)
    torch.library.opcheck(ops.coding_rate.default, arguments, test_utils=("test_schema", "test_faketensor"))


@triton
@pytest.mark.parametrize("shape", [(140, 160), (160, 140)])
def test_a_jacobian_of_sides_between_the_limits(shape, device):
    """vmap makes several matrices of one in the backward pass alone, which must read the factor as it was written."""
    z = batch(*shape, "power law", device)
    jacobian = torch.func.jacrev(lambda z: coding_rate(z, eps=0.5) * torch.tensor([1.0, 2.0], device=device))(z)
    _, gradient, _ = closed_form(z, shape[1] / (0.5 * shape[0]), center=True)
    for row, factor in zip(jacobian, (1, 2), strict=True):
        assert (row - factor * gradient).norm() < 1e-4 * factor * gradient.norm()


@triton
@pytest.mark.skipif(not INTERPRETED, reason="counts kernels")
@pytest.mark.parametrize(
    ("shape", "most"),
    [((4, 96, 160), 8), ((1, 160, 96), 8), ((1024, 96), 9), ((160, 200), 10)],  # the last is factored by a library
)
def test_launches_of_a_forward_and_backward_pass(shape, most, launches):
    z = torch.randn(shape, requires_grad=True)
    before = launches.total()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rate = coding_rate(z, eps=0.5)
        torch.autograd.grad(rate, z, torch.ones_like(rate))
    kernels = launches.total() - before
    assert kernels >= 6
    # what computes on a device; copies and zeros belong to the interpreter
    computing = re.compile(
        "aten::(add|sub|mul|div|where|gt|lt|eq|sum|mean|exp|log|sqrt|clamp|reciprocal|mm|bmm|linalg_cholesky_ex)_?$"
    )
    others = [event.name for event in profile.events() if computing.match(event.name)]
    assert kernels + len(others) + 1 <= most, others  # and eps becomes a tensor


def test_a_schedule_may_write_to_alpha_before_the_backward_pass(device):
    z, alpha = torch.randn(9, 4, device=device, requires_grad=True), torch.tensor(1.0, device=device)
    rate = coding_rate(z, alpha=alpha)
    (expected,) = torch.autograd.grad(coding_rate(z, alpha=1.0), z)
    alpha.fill_(2.0)
    assert torch.equal(torch.autograd.grad(rate, z)[0], expected)


def test_what_is_kept_for_the_backward_pass(device):
    """The rows less their mean; with weights not the rows of each class, of which there may be many."""
    z, classes = torch.randn(64, 8, device=device), torch.rand(50, 64, device=device)

    def kept(**given) -> int:
        sizes: dict[int, int] = {}

        def pack(x):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            coding_rate(z.clone().requires_grad_(), eps=0.5, **given)
        return sum(sizes.values())

    factors = 4 * 8 * 8
    assert 2 * z.nbytes + factors <= kept() < 2 * z.nbytes + 2 * factors
    assert kept(weights=classes) < z.nbytes + classes.nbytes + 50 * (factors + 8 * 8 + 64)


def test_compiles_whole_and_does_not_recompile(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(z, alpha):
        return -coding_rate(torch.tanh(z), alpha=alpha).sum()

    for alpha in (0.5, 1.0, 2.0):
        z = torch.randn(3, 10, 16, device=device, requires_grad=True)
        loss(z, torch.tensor(alpha, device=device)).backward()
        compiled, z.grad = z.grad, None
        (-coding_rate(torch.tanh(z), alpha=alpha).sum()).backward()
        torch.testing.assert_close(compiled, z.grad, rtol=1e-5, atol=1e-6)
    assert counter.frame_count == 1


def test_differentiates_once_and_says_so():
    z = torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(coding_rate(z, alpha=1.0), z, create_graph=True)
    with pytest.raises(RuntimeError, match="coding_rate_backward has no derivative: coding_rate can be different"):
        gradient.sum().backward()


def test_the_settings_it_changes_are_as_before():
    """An inherited precision is inherited again: a later change still reaches the products."""
    before = torch.backends.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "none"  # it inherits, unless another test has set it
    torch.backends.fp32_precision = "tf32"
    try:
        coding_rate(torch.randn(8, 4), alpha=1.0)
        assert torch.backends.mkldnn.matmul.fp32_precision == "tf32"
        torch.backends.fp32_precision = "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.fp32_precision = before


def test_a_module_leaves_the_meta_device_with_its_number():
    with torch.device("meta"):
        built = CodingRate(eps=0.25)
    moved = CodingRate(eps=0.25).to("meta")
    for module in (built, moved):
        assert module.eps.is_meta
        assert module(torch.zeros(3, 5, 4, device="meta")).shape == (3,)
        module.to_empty(device="cpu")
        assert module.eps == 0.25
        module.eps.fill_(0.5)  # a schedule
        assert module.to("meta").to_empty(device="cpu").eps == 0.25


def test_a_module_in_half_precision_keeps_its_number():
    module = CodingRate(eps=1e-8).half()
    assert module.eps.dtype == torch.float32
    assert module.eps == torch.tensor(1e-8)


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
    z = batch(50, 20, "power law", device)
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of alpha and eps"),
        ({"alpha": 1.0, "eps": 1.0}, "exactly one of alpha and eps"),
        ({"alpha": 0.0}, "alpha must be positive, got 0.0"),
        ({"eps": float("nan")}, "eps must be positive, got nan"),
        ({"alpha": torch.ones(2)}, r"alpha must be 0-dim, without gradient, on cpu like z, got \[2\] on cpu"),
        ({"alpha": torch.tensor(1.0, requires_grad=True)}, "with gradient"),
        ({"eps": torch.tensor(-1.0)}, "eps must be positive, got -1.0"),
        ({"eps": float("inf")}, "eps must lie between 1e-30 and 1e30, got inf"),
        ({"eps": "small"}, "eps must be positive, got small"),
        ({"eps": True}, "eps must be positive, got True"),
        ({"eps": np.array([0.5])}, r"eps must be positive, got \[0.5\]"),
        ({"eps": 1e-50}, "eps must lie between 1e-30 and 1e30, got 1e-50"),  # zero in float32
        ({"alpha": 1.0, "weights": torch.tensor([1.0] * 7 + [-0.5])}, "weights must not be negative, got -0.5"),
        ({"alpha": 1.0, "weights": torch.ones(8, dtype=torch.complex64)}, "weights must be floating-point"),
        ({"alpha": 1.0, "weights": torch.ones(3)}, r"weights must be floating-point \[..., 8\], one per row of z"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        coding_rate(torch.randn(8, 4), **arguments)


def test_refuses_weights_that_do_not_broadcast():
    with pytest.raises(ValueError, match=r"weights \[2, 8\] and z \[3, 8, 4\] must have leading dimensions that broad"):
        coding_rate(torch.randn(3, 8, 4), alpha=1.0, weights=torch.ones(2, 8))


@pytest.mark.parametrize(
    "z",
    [
        torch.zeros(4),
        torch.zeros(0, 4),
        torch.zeros(4, 0),
        *(torch.zeros(4, 3, dtype=t) for t in (torch.int64, torch.cfloat)),
    ],
)
@pytest.mark.parametrize("function", [coding_rate, coding_rate_stats])
def test_refuses_what_is_no_batch(z, function):
    with pytest.raises(ValueError, match=r"z must be floating-point \[..., B, d\]"):
        function(z, alpha=1.0)


def test_stats_of_no_batches():
    stats = coding_rate_stats(torch.zeros(0, 5, 3), alpha=1.0)
    assert [tuple(value.shape) for value in stats] == [(0,), (0,), (0,), (0, 3)]


@pytest.mark.parametrize(
    "settings",
    [{"eps": 0}, {"eps": -1.0}, {"alpha": float("nan")}, {"eps": torch.tensor(-1.0)}, {"eps": torch.ones(1)}],
)
def test_a_module_refuses_what_its_calls_would(settings):
    with pytest.raises(ValueError, match="must be positive, got"):
        CodingRate(**settings)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-3, 1e-4])
def test_gradient_of_weights_where_the_rate_is_small(scale):
    """By perturbation theory in double precision: no digit is lost, however small the features."""
    torch.manual_seed(0)
    z, weights = scale * torch.randn(17, 31), torch.rand(17).requires_grad_()
    coding_rate(z, eps=6.8, weights=weights).backward()
    x, w = z.double(), weights.detach().double().requires_grad_()
    y = x - (w @ x) / w.sum()
    covariance = y.mT @ (w[:, None] * y) / w.sum()
    torch.linalg.eigvalsh(covariance).mul(31 / 6.8).log1p().sum().backward()
    # 4e-7 were measured
    torch.testing.assert_close(weights.grad.double(), w.grad, rtol=0, atol=1e-6 * w.grad.norm().item())
