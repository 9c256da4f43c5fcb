"""Gradients under torch's transforms, compilation, what is kept, the module, and what is refused."""

import re

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from seqjepa.kernels import CodingRate, coding_rate, coding_rate_stats
from seqjepa.kernels._ops import ops
from seqjepa.kernels.internal.backend import INTERPRETED

triton = pytest.mark.triton


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
@pytest.mark.skipif(not INTERPRETED, reason="counts kernels")
@pytest.mark.parametrize(
    ("shape", "most"),
    [((4, 96, 160), 8), ((1, 160, 96), 8), ((1024, 96), 9), ((160, 200), 10)],  # the last is factored by a library
)
def test_launches_of_a_forward_and_backward_pass(shape, most, launches):
    z = torch.randn(shape, requires_grad=True)
    before = launches.total()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
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


@pytest.mark.parametrize(
    "settings",
    [{"eps": 0}, {"eps": -1.0}, {"alpha": float("nan")}, {"eps": torch.tensor(-1.0)}, {"eps": torch.ones(1)}],
)
def test_a_module_refuses_what_its_calls_would(settings):
    with pytest.raises(ValueError, match="must be positive, got"):
        CodingRate(**settings)
