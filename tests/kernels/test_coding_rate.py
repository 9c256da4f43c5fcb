"""Coding rate and its gradient against closed forms in float64, on the spectra on which others break."""

import pytest
import torch
from torch import Tensor

from seqjepa.kernels import coding_rate, coding_rate_stats

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
@pytest.mark.parametrize("stack", [(), (3,)])
def test_settings_of_the_surroundings_do_not_matter(stack, device):
    """Neither autocast nor a lower precision of products; and the setting is as before afterwards."""
    z = batch(128, 64, "almost constant", device)
    if stack:  # matrices that a CPU factors by halves
        z = torch.randn(*stack, 100, 96, generator=torch.Generator().manual_seed(0)).to(device)
    outcome = []
    for autocast, precision in ((False, "highest"), (True, "highest"), (False, "medium"), (True, "medium")):
        torch.set_float32_matmul_precision(precision)
        try:
            x = z.clone().requires_grad_()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                rate = coding_rate(x, eps=0.05, center=False)
                rate.sum().backward()
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
@pytest.mark.parametrize("shape", [(140, 160), (160, 140)])
def test_a_jacobian_of_sides_between_the_limits(shape, device):
    """vmap makes several matrices of one in the backward pass alone, which must read the factor as it was written."""
    z = batch(*shape, "power law", device)
    jacobian = torch.func.jacrev(lambda z: coding_rate(z, eps=0.5) * torch.tensor([1.0, 2.0], device=device))(z)
    _, gradient, _ = closed_form(z, shape[1] / (0.5 * shape[0]), center=True)
    for row, factor in zip(jacobian, (1, 2), strict=True):
        assert (row - factor * gradient).norm() < 1e-4 * factor * gradient.norm()


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
