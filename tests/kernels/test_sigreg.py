"""SIGReg and its gradient against the statistic as the paper writes it, in float64 and without recurrences."""

import copy
import math
import sys
import warnings

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from seqjepa.kernels import SIGReg, sigreg
from seqjepa.kernels._ops import ops
from seqjepa.kernels.characteristic import knots
from seqjepa.kernels.internal.backend import uses_triton
from seqjepa.kernels.philox import philox
from seqjepa.kernels.sigreg import degenerate_value, directions

triton = pytest.mark.triton
GRIDS = [(3.0, 17, "half"), (3.0, 10, "full"), (3.0, 9, "full"), (5.0, 2, "half"), (0.5, 17, "half"), (3.0, 3, "full")]


def seed_on(device: torch.device, value: int = 1234567890123) -> Tensor:
    return torch.tensor(value, device=device)


def definition(z: Tensor, unit: Tensor, t_max: float, num_points: int, span: str) -> Tensor:
    """N ∫ |mean exp(itx) - φ|² φ dt by torch.trapezoid over [-t_max, t_max], mean over slices; complex, float64."""
    if span == "half":
        positive = torch.linspace(0, t_max, num_points, dtype=torch.float64, device=z.device)
        t = torch.cat([-positive[1:].flip(0), positive])
    else:
        t = torch.linspace(-t_max, t_max, num_points, dtype=torch.float64, device=z.device)
    phi = torch.exp(-(t**2) / 2)
    x = z.double() @ unit.double()
    empirical = torch.exp(1j * x[..., None] * t).mean(-3)
    error = (empirical - phi).abs() ** 2 * phi
    return z.shape[-2] * torch.trapezoid(error, t).mean(-1)


@triton
@pytest.mark.parametrize(("t_max", "num_points", "span"), GRIDS)
@pytest.mark.parametrize(
    ("shape", "scale"),
    [((40, 50), 1.5), ((3, 33, 20), 1.5), ((130, 7), 1.5), ((1, 5), 1.5), ((2, 1), 30), ((1, 1), 30), ((2, 1), 1)],
)
def test_statistic_and_gradient(shape, scale, t_max, num_points, span, device):
    """The bounds of kernels/README."""
    torch.manual_seed(0)
    z = (scale * torch.randn(*shape, device=device)).requires_grad_()
    seed, settings = seed_on(device), {"t_max": t_max, "num_points": num_points, "span": span}
    got = sigreg(z, num_slices=70, seed=seed, **settings)
    got.sum().backward()
    exact = z.detach().double().requires_grad_()
    expected = definition(exact, directions(seed, shape[-1], 70), **settings)
    expected.sum().backward()
    assert got.shape == shape[:-2]
    # 16 rotations of float32, each of which adds about one rounding; and an angle is rounded by its own size
    angle = t_max * (exact.detach() @ directions(seed, shape[-1], 70).double()).abs().max().item()
    # where T is small, at knots near zero or just a few, means of cosines are near φ: a rounding of them counts
    floor = 2**-21 * (shape[-2] * expected).sqrt() + 2**-44 * shape[-2]
    assert ((got - expected).abs() <= (2e-6 + 2**-24 * angle) * expected + floor).all()
    # terms of both signs cancel: 0.6 of the floor was measured
    assert (z.grad - exact.grad).norm() <= 2e-6 * exact.grad.norm() + 2**-24 * (16 + angle) * shape[-2] ** 0.5


@triton
@pytest.mark.parametrize("shape", [(40, 12), (2, 33, 20)])
def test_projections_that_are_not_kept_give_the_same_gradient(shape, device, monkeypatch):
    """To the bit, twice from one graph; what is kept does not grow with the number of samples."""
    z, upstream = torch.randn(shape, device=device).requires_grad_(), torch.randn(shape[:-2], device=device)
    kept, gradients = {}, {}
    for many in (2**20, 0):
        monkeypatch.setattr(sys.modules[sigreg.__module__], "MANY", many)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            value = sigreg(z, num_slices=64, seed=seed_on(device))
        kept[many] = sum(sizes) - z.numel()
        gradients[many] = [torch.autograd.grad(value, z, upstream, retain_graph=True)[0] for _ in range(2)]
    assert all(torch.equal(one, gradients[0][0]) for each in gradients.values() for one in each)
    if uses_triton(z):
        assert kept[2**20] - kept[0] == z.numel() // shape[-1] * 64


@triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_exact_of_what_came_in(dtype, device):
    z = torch.randn(64, 24, device=device).to(dtype).requires_grad_()
    with torch.autocast(device.type, dtype=torch.bfloat16):
        got = sigreg(z, num_slices=40, seed=7)
    got.backward()
    exact = z.detach().double().requires_grad_()
    expected = definition(exact, directions(seed_on(device, 7), 24, 40), 3.0, 17, "half")
    expected.backward()
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(expected.item(), rel=2e-6)
    step = 2**-8 if dtype == torch.bfloat16 else 2**-10  # rounding of the gradient to the input's dtype
    assert (z.grad - exact.grad).norm() <= step * exact.grad.norm()


@triton
@pytest.mark.parametrize("scale", [1e-3, 30.0, 3000.0])
def test_far_from_unit_scale(scale, device):
    """Angles up to 3 * 3000 * 3: the reduction to an octant holds."""
    z = scale * torch.randn(50, 8, device=device)
    got = sigreg(z, num_slices=32, seed=seed_on(device))
    expected = definition(z, directions(seed_on(device), 8, 32), 3.0, 17, "half")
    # an angle of 1e4 is known to 1e-3 in float32, and with it each cosine; the mean of 50 to less
    assert got.item() == pytest.approx(expected.item(), rel=2e-6 if scale < 100 else 2e-3)


@triton
@pytest.mark.parametrize("scale", [1e6, 1e8, 1e12])
def test_exploding_features_have_finite_gradients(scale, device):
    """A cosine of 1e8 means nothing in float32; but it is at most 1, and training goes on."""
    z = (scale * torch.randn(64, 8, device=device)).requires_grad_()
    got = sigreg(z, num_slices=32, seed=seed_on(device))
    got.backward()
    assert 0 < got < 64 * sum(4 * w for w in knots(3.0, 17, "half")[1])  # |mean - φ|² is at most 4
    assert z.grad.isfinite().all()


@triton
def test_known_values(device):
    """Standard normal samples give about 1, collapsed ones N times the degenerate value, as do unit vectors."""
    torch.manual_seed(0)
    normal = sigreg(torch.randn(8, 128, 64, device=device), num_slices=64, seed=1).mean().item()
    # E[N |mean exp(itx) - φ|²] = 1 - φ², integrated with weight φ over [-3, 3]
    t = torch.linspace(-3, 3, 33, dtype=torch.float64)
    phi = torch.exp(-(t**2) / 2)
    assert normal == pytest.approx(torch.trapezoid((1 - phi**2) * phi, t).item(), rel=0.15)  # 8 batches
    collapsed = sigreg(torch.zeros(128, 64, device=device), num_slices=16, seed=1).item() / 128
    assert collapsed == pytest.approx(degenerate_value(), rel=1e-5)
    # closed form of the integral over all t: √2π (1 - √2 + 1/√3), less what lies beyond 3
    whole = math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
    assert collapsed == pytest.approx(whole, rel=0.02)


@triton
def test_directions_are_unit_uniform_and_reproducible(device):
    one = directions(seed_on(device, 5), 40, 2000)
    same, other, high_words = (directions(seed_on(device, seed), 40, 64) for seed in (5, 6, 5 + 2**40))
    assert torch.equal(one[:, :64], same)
    assert not torch.equal(same, other)
    assert not torch.equal(same, high_words)
    torch.testing.assert_close(one.norm(dim=0), torch.ones(2000, device=device))
    second = one @ one.mT / 2000 * 40  # E[a aᵀ] = I / D; 2000 draws scatter by 1/√2000 a component
    assert (second - torch.eye(40, device=device)).abs().max() < 6 / 2000**0.5
    assert one.mean(1).abs().max() < 6 / (40 * 2000) ** 0.5
    fourth = (one**4).mean() * 40 * 42  # E[a⁴] = 3 / (D (D + 2)) on the sphere
    assert fourth.item() == pytest.approx(3, rel=0.05)


@triton
@pytest.mark.parametrize("dim", [1, 2])
def test_the_largest_word_has_a_direction(dim, device):
    """Its logarithm is the one closest to zero, and with at most two dimensions no other draw adds to its length."""
    seed = 46
    word, *_ = philox((seed, 0), (torch.zeros((), dtype=torch.int64), torch.arange(1024), 0, 0))
    assert (word >> 8).max() == 2**24 - 1
    lengths = directions(seed_on(device, seed), dim, 1024).norm(dim=0)
    torch.testing.assert_close(lengths, torch.ones(1024, device=device))


def test_directions_do_not_depend_on_the_default_dtype(device):
    expected = directions(seed_on(device), 10, 6)
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(directions(seed_on(device), 10, 6), expected)
    finally:
        torch.set_default_dtype(before)


def test_directions_do_not_depend_on_how_many(device):
    """A slice is a function of the seed and its number: more slices extend the set."""
    few, many = (directions(seed_on(device), 30, slices) for slices in (10, 100))
    torch.testing.assert_close(few, many[:, :10])


@triton
def test_no_batches_are_no_statistics(device):
    z = torch.zeros(0, 5, 3, device=device, requires_grad=True)
    statistics = sigreg(z, num_slices=4, seed=0)
    statistics.sum().backward()
    assert statistics.shape == (0,)
    assert z.grad.shape == z.shape


@triton
def test_a_nan_stays_in_its_batch(device):
    z = torch.randn(2, 12, 5, device=device)
    z[1, 3] = float("nan")
    assert sigreg(z, num_slices=8, seed=0).isnan().tolist() == [False, True]


@triton
def test_strides_do_not_matter(device):
    plain = torch.randn(3, 20, 6, device=device)
    view = torch.empty(20, 12, 3, device=device).permute(2, 0, 1)[..., ::2]
    view.copy_(plain)
    torch.testing.assert_close(sigreg(view, num_slices=9, seed=0), sigreg(plain, num_slices=9, seed=0))


@pytest.mark.parametrize(("t_max", "num_points", "span"), GRIDS)
def test_gradcheck(t_max, num_points, span):
    z = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    settings = {"t_max": t_max, "num_points": num_points, "span": span}
    assert torch.autograd.gradcheck(lambda z: sigreg(z, num_slices=7, seed=3, **settings), (z,))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck looks at it
def test_opcheck(device):
    z = torch.randn(2, 8, 5, device=device, requires_grad=True)
    torch.library.opcheck(ops.sigreg.default, (z, seed_on(device), 6, 3.0, 17, "half", "", 1))


def test_compiles_whole_and_does_not_recompile(device):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    module = SIGReg(16, num_points=5, seed=3).to(device)

    @torch.compile(fullgraph=True, backend=counter)
    def loss(z):
        return module(torch.tanh(z))

    for call in range(3):
        z = torch.randn(12, 6, device=device, requires_grad=True)
        loss(z).backward()
        compiled, z.grad = z.grad, None
        sigreg(torch.tanh(z), num_slices=16, num_points=5, seed=3 + call).backward()
        torch.testing.assert_close(compiled, z.grad, rtol=1e-4, atol=1e-6)
    assert counter.frame_count == 1
    assert module.step == 6


@triton
def test_a_jacobian(device):
    """vmap hands the backward pass one batch several times, without copying it."""
    torch.manual_seed(0)
    z = torch.randn(40, 9, device=device)
    unit = directions(seed_on(device), 9, 70).double()
    jacobian = torch.func.jacrev(
        lambda z: sigreg(z, num_slices=70, seed=seed_on(device)) * torch.tensor([1.0, 2.0], device=device)
    )(z)
    wide = z.double().requires_grad_()
    (gradient,) = torch.autograd.grad(definition(wide, unit, 3.0, 17, "half"), wide)
    for row, factor in zip(jacobian, (1, 2), strict=True):
        assert (row - factor * gradient).norm() < 1e-5 * factor * gradient.norm()


@pytest.mark.parametrize(("span", "num_points"), [("half", 7), ("full", 10)])
def test_compiled_passes_keep_the_projections_alone(span, num_points):
    """torch.compile fuses the loops over knots; it must not keep cosines and sines of each for the backward pass."""
    torch._dynamo.reset()
    rows, slices = 256, 64
    z = torch.randn(rows, 8, dtype=torch.bfloat16, requires_grad=True)
    options = {"num_slices": slices, "seed": torch.tensor(3), "span": span, "num_points": num_points}
    kept = []

    def remember(x):
        kept.append(x.untyped_storage().nbytes())
        return x

    whole = torch.compile(lambda z: sigreg(z, **options), fullgraph=True, dynamic=False)
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        value = whole(z)
    small = 4 * slices * (8 + 2 * num_points) + 4096  # directions and what each knot and slice has
    assert 4 * rows * slices <= sum(kept) <= 4 * rows * slices + 2 * small
    (gradient,) = torch.autograd.grad(value, z)
    wide = z.detach().double().requires_grad_()
    expected = definition(wide, directions(options["seed"], 8, slices).double(), 3.0, num_points, span)
    torch.testing.assert_close(value.double(), expected, rtol=3e-6, atol=0)
    (exact,) = torch.autograd.grad(expected, wide)
    assert (gradient - exact).norm() < 2**-8 * exact.norm()  # it is rounded to bfloat16


def test_differentiates_once_and_says_so():
    z = torch.randn(6, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(sigreg(z, num_slices=5, seed=0), z, create_graph=True)
    with pytest.raises(RuntimeError, match="sigreg_backward has no derivative: sigreg can be differentiated once"):
        (z.sum() + gradient.square().sum()).backward()


def test_a_module_leaves_the_meta_device_with_its_seed():
    with torch.device("meta"):
        module = SIGReg(8, seed=7)
    assert module(torch.zeros(10, 4, device="meta")).is_meta
    module.to_empty(device="cpu")
    assert (module.step, module.stuck) == (7, 0)
    z = torch.randn(10, 4)
    assert module(z) == sigreg(z, num_slices=8, seed=7)


def test_directions_change_in_training_alone():
    module, z = SIGReg(8), torch.randn(10, 4)
    first, second = module(z), module(z)
    assert first != second
    module.eval()
    assert module(z) == module(z)
    assert copy.deepcopy(module)(z) == module(z)


def test_warns_when_stuck_and_only_then():
    torch.manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(128, 512), dim=-1)
    module = SIGReg(16)
    for call in range(99):
        assert module(torch.randn(32, 4) if call == 50 else unit).isfinite()
    assert module.stuck == 48  # a healthy call starts the count again
    with pytest.warns(UserWarning, match=r"degenerate value, 0.402 per sample, for 1\d\d calls: are its inputs norm"):
        [module(unit) for _ in range(200)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module(unit)  # it says so once
        healthy = SIGReg(16)
        for _ in range(200):
            healthy(torch.randn(32, 4))
    assert module.check()
    assert not healthy.check()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_slices": 0}, "num_slices must be a whole number >= 1, got 0"),
        ({"num_slices": 2.5}, "num_slices must be a whole number >= 1, got 2.5"),
        ({"num_points": 1}, "num_points must be a whole number >= 2, got 1"),
        ({"t_max": float("nan")}, "t_max must be positive, got nan"),
        ({"seed": 1.5}, "seed must be a whole number, or an int64 tensor, got 1.5"),
        ({"t_max": 0.0}, "t_max must be positive, got 0.0"),
        ({"num_slices": True}, "num_slices must be a whole number >= 1, got True"),
        ({"seed": True}, "seed must be a whole number, or an int64 tensor, got True"),
        ({"span": "whole"}, "span must be 'half' or 'full', got 'whole'"),
        ({"seed": torch.tensor(1.0)}, "seed must be int64, 0-dim, on cpu like z, got torch.float32"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        sigreg(torch.randn(8, 4), **{"num_slices": 4, "seed": 0, **arguments})
    if not isinstance(arguments.get("seed"), torch.Tensor):
        with pytest.raises(ValueError, match=message):
            SIGReg(**arguments)


@pytest.mark.parametrize("z", [torch.zeros(8), torch.zeros(0, 4), torch.zeros(4, 3, dtype=torch.cfloat)])
def test_refuses_what_are_no_samples(z):
    with pytest.raises(ValueError, match=r"z must be floating-point \[..., N, D\]"):
        sigreg(z, num_slices=4, seed=0)
