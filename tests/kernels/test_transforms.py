"""torch.func, forward mode and vmap on rates, statistics and all losses: by formulas and differences in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from seqjepa.kernels import CodingRate, SIGReg, coding_rate, sigreg
from seqjepa.kernels.coding_rate import coding_rate_reference
from seqjepa.kernels.drop_in import eb_jepa, emp_ssl, lejepa, lightly, mcr2, seq_jepa, simdino, simdinov2
from seqjepa.kernels.sigreg import directions, sigreg_reference

# torch's own: its forward mode loads scripted decompositions, and linearize makes nodes of constants
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node"),
]

EPS, SLICES, SEED = 0.3, 7, 5
SHAPES = [(3, 6, 5), (3, 5, 8)]  # the factor is of the columns' side, and of the rows'


def rate(z):
    return coding_rate(z, eps=EPS)


def rate_formula(z):
    return coding_rate_reference(z, z.new_tensor(z.shape[-1] / EPS))


def statistic(z):
    return sigreg(z, num_slices=SLICES, seed=SEED)


def statistic_formula(z):
    return sigreg_reference(z, directions(torch.tensor(SEED), z.shape[-1], SLICES).to(z.dtype))


PAIRS = {"rate": (rate, rate_formula), "sigreg": (statistic, statistic_formula)}


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def total(f):
    return lambda z: f(z).sum()


def dual(f, z, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(z, tangent))).tangent


# what a user may write, of a function of [S, B, d] that returns [S]
TRANSFORMS = {
    "grad": lambda f, z, t: func.grad(total(f))(z),
    "vmap": lambda f, z, t: func.vmap(f)(z),
    "vmap over the last": lambda f, z, t: func.vmap(f, in_dims=-1)(z.movedim(0, -1)),
    "nested vmap": lambda f, z, t: func.vmap(func.vmap(f))(z.expand(2, *z.shape)),
    "vmap of grad": lambda f, z, t: func.vmap(func.grad(f))(z),
    "grad of vmap": lambda f, z, t: func.grad(total(func.vmap(f)))(z),
    "jacrev": lambda f, z, t: func.jacrev(f)(z),
    "vjp": lambda f, z, t: func.vjp(f, z)[1](t[:, 0, 0])[0],
    "jvp": lambda f, z, t: func.jvp(f, (z,), (t,))[1],
    "jacfwd": lambda f, z, t: func.jacfwd(f)(z),
    "vmap of jvp": lambda f, z, t: func.vmap(lambda z, t: func.jvp(f, (z,), (t,))[1])(z, t),
    "jvp of vmap": lambda f, z, t: func.jvp(func.vmap(f), (z,), (t,))[1],
    "jacfwd of vmap": lambda f, z, t: func.jacfwd(func.vmap(f))(z),
    "vmap of jvp of vmap": lambda f, z, t: func.vmap(
        lambda z, t: func.jvp(func.vmap(lambda z: f(z[None])[0]), (z,), (t,))[1]
    )(torch.stack([z, t]), torch.stack([t, z])),
    "linearize": lambda f, z, t: func.linearize(f, z)[1](t),
    "dual": dual,
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("name", PAIRS)
def test_transforms_follow_the_formula(name, transform, shape):
    ours, formula = PAIRS[name]
    z, tangent = draw(*shape), draw(*shape, seed=1)
    torch.testing.assert_close(transform(ours, z, tangent), transform(formula, z, tangent), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("transform", ["grad", "vmap of grad", "jvp", "vmap"])
@pytest.mark.parametrize("name", PAIRS)
def test_compiled_transforms(name, transform):
    torch._dynamo.reset()
    ours, formula = PAIRS[name]
    z, tangent = draw(*SHAPES[0]), draw(*SHAPES[0], seed=1)
    compiled = torch.compile(lambda z, t: TRANSFORMS[transform](ours, z, t), fullgraph=True, backend="aot_eager")
    expected = TRANSFORMS[transform](formula, z, tangent)
    torch.testing.assert_close(compiled(z, tangent), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("places", [(0,), (1,), (0, 1)])
def test_weights(shape, places):
    """Gradient and tangent in the features, in the weights, and in both."""
    inputs = draw(*shape[1:]), draw(4, shape[1], seed=1).sigmoid()
    tangents = tuple(draw(*x.shape, seed=2) for x in inputs)

    def of(function):
        def partial(*chosen):
            given = list(inputs)
            for place, x in zip(places, chosen, strict=True):
                given[place] = x
            return function(*given)

        chosen = tuple(inputs[place] for place in places)
        reverse = func.grad(lambda *x: (partial(*x) * torch.arange(4)).sum(), tuple(range(len(places))))(*chosen)
        forward = func.jvp(partial, chosen, tuple(tangents[place] for place in places))
        return reverse, forward

    ours = of(lambda z, w: coding_rate(z, eps=EPS, weights=w))
    formula = of(lambda z, w: coding_rate_reference(z.expand(4, *z.shape), z.new_tensor(shape[-1] / EPS), w))
    torch.testing.assert_close(ours, formula, rtol=1e-8, atol=1e-10)


def test_a_tracer_does_not_look_at_numbers():
    """`make_fx`, by which `linearize` and ahead-of-time compilers trace, refuses that a value is read."""
    z, weights, scale = draw(6, 5), draw(6, seed=1).sigmoid(), draw().exp()

    def rate(z):
        return coding_rate(z, eps=scale, weights=weights)

    torch.testing.assert_close(make_fx(rate)(z)(z + 1), rate(z + 1))


def test_vmap_over_scales_and_seeds():
    z = draw(*SHAPES[0])
    scales, seeds = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64), torch.arange(3)
    got = func.vmap(lambda z, e: coding_rate(z, eps=e))(z, scales)
    torch.testing.assert_close(got, torch.stack([coding_rate(z[i], eps=scales[i]) for i in range(3)]))
    got = func.vmap(func.grad(lambda z, s: sigreg(z, num_slices=SLICES, seed=s)))(z, seeds)
    each = [func.grad(lambda z, i=i: sigreg(z, num_slices=SLICES, seed=i))(z[i]) for i in range(3)]
    torch.testing.assert_close(got, torch.stack(each))


@pytest.mark.parametrize("name", PAIRS)
def test_tangents_of_half_precision(name):
    """Exact of what came in: the gradient that they are a product with is not rounded."""
    ours, formula = PAIRS[name]
    z, tangent = (draw(*SHAPES[0], seed=seed).bfloat16() for seed in (0, 1))
    got = func.jvp(ours, (z,), (tangent,))[1]
    assert got.dtype == torch.float32
    expected = func.jvp(formula, (z.double(),), (tangent.double(),))[1]
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


SECOND = {
    "create_graph": lambda f, z: torch.autograd.grad(func.grad(f)(z.requires_grad_()).square().sum(), z),
    "grad of grad": lambda f, z: func.grad(lambda z: func.grad(f)(z).square().sum())(z),
    "hessian": lambda f, z: func.hessian(f)(z),
    "jacrev of jacfwd": lambda f, z: func.jacrev(func.jacfwd(f))(z),
    "jacfwd of jacfwd": lambda f, z: func.jacfwd(func.jacfwd(f))(z),
    "hvp": lambda f, z: torch.autograd.functional.hvp(f, z, z),
}


@pytest.mark.parametrize("second", SECOND.values(), ids=SECOND)
@pytest.mark.parametrize("name", PAIRS)
def test_second_derivatives_are_refused(name, second):
    with pytest.raises(RuntimeError, match=r"_backward has no derivative: \w+ can be differentiated once"):
        second(PAIRS[name][0], draw(6, 5))


def test_derivatives_in_the_scale_are_refused():
    z, scale = draw(6, 5), torch.tensor(EPS, dtype=torch.float64)

    def of(scale):
        return coding_rate(z, eps=scale)

    with pytest.raises(ValueError, match="eps must be 0-dim, without gradient"):
        func.grad(of)(scale)
    for derivative in (
        lambda: func.jvp(of, (scale,), (scale,)),
        lambda: dual(of, scale, scale),
        lambda: func.grad(lambda scales: func.vmap(of)(scales).sum())(scale.expand(3)),
    ):
        with pytest.raises(RuntimeError, match="coding_rate has no derivative in alpha and eps"):
            derivative()


def losses():
    """Every module and drop-in as a function of x [12, 5]; made anew, so that counters stand at zero."""
    labels = torch.arange(12) % 3
    v1, v2, pair = simdino.MCRLoss(2), simdinov2.MCRLoss(5), lightly.EMPSSLLoss()
    mcr, soft, bcs = mcr2.MaximalCodingRateReduction(), emp_ssl.MaximalCodingRateReduction(), eb_jepa.BCS(SLICES)
    views = lightly.LeJEPALoss(sigreg_num_vectors=SLICES)
    return {
        "CodingRate": CodingRate(eps=EPS),
        "SIGReg": SIGReg(SLICES),
        "simdino": lambda x: v1(x, x.flip(0))[0],
        "simdinov2": lambda x: v2([x, x.flip(0)], [x.flip(1), x])[0],
        "mcr2": lambda x: mcr(x, labels, 3)[0],
        "emp_ssl": emp_ssl.TotalCodingRate(),
        "emp_ssl, memberships": lambda x: soft(x, x[:, :4].softmax(-1))[0],
        "lightly": lambda x: pair([x, x.flip(0)]),
        "lightly, lejepa": lambda x: views(local_proj=x[None], global_proj=x.flip(0)[None]),
        "seq_jepa": seq_jepa.CodingRateLoss(),
        "seq_jepa, stable": seq_jepa.CodingRateLoss(use_stable=True),
        "eb_jepa": lambda x: bcs(x, x.flip(0))["loss"],
        "lejepa": lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), SLICES),
        "lejepa, EppsPulley": lambda x: lejepa.EppsPulley()(x).mean(),
    }


@pytest.mark.parametrize("name", losses())
def test_losses(name):
    x, tangent = draw(12, 5), draw(12, 5, seed=1)

    def fresh(act):
        torch.manual_seed(0)  # lightly's directions
        return act(losses()[name])

    step = 1e-6
    after, before = (fresh(lambda f, sign=sign: f(x + sign * step * tangent)) for sign in (1, -1))
    slope = (after - before) / (2 * step)
    exact = {"rtol": 1e-6, "atol": 1e-8}  # of a difference quotient
    gradient = fresh(lambda f: func.grad(f)(x))
    torch.testing.assert_close((gradient * tangent).sum(), slope, **exact)
    torch.testing.assert_close(fresh(lambda f: func.jvp(f, (x,), (tangent,))[1]), slope, **exact)
    torch.testing.assert_close(fresh(lambda f: dual(f, x, tangent)), slope, **exact)
    each = fresh(lambda f: func.vmap(func.grad(f), randomness="same")(x[None].expand(2, 12, 5)))
    torch.testing.assert_close(each, gradient.expand(2, 12, 5))


@pytest.mark.parametrize("compiled", [False, True])
def test_calls_under_transforms_count(compiled):
    torch._dynamo.reset()
    bcs = eb_jepa.BCS(SLICES)
    modules = [SIGReg(SLICES), lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), SLICES), bcs]
    counters = [modules[0].step, modules[1].global_step, bcs.step]
    for f in (*modules[:2], lambda x: bcs(x, x)["loss"]):
        gradient = func.grad(f)
        if compiled:
            gradient = torch.compile(gradient, fullgraph=True, backend="aot_eager")
        first, second = gradient(draw(12, 5)), gradient(draw(12, 5))
        assert not torch.equal(first, second)  # other directions
    assert [int(counter) for counter in counters] == [2, 2, 2]


@pytest.mark.triton
@pytest.mark.parametrize("name", PAIRS)
def test_batched_gradients_are_those_of_a_loop(name, device):
    """torch's older vmap, by which `is_grads_batched` works, is no transform of torch.func."""
    z = draw(3, 6, 5).float().to(device).requires_grad_()
    value, grads = PAIRS[name][0](z), torch.eye(3, device=device)
    together = torch.autograd.grad(value, z, grads, is_grads_batched=True, retain_graph=True)[0]
    each = [torch.autograd.grad(value, z, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(together, torch.stack(each))
    assert together.abs().sum() > 0


@pytest.mark.triton
@pytest.mark.parametrize("name", PAIRS)
def test_a_mode_sees_an_operator_and_not_what_it_does(name, device):
    """One that rounds products to bfloat16, as some libraries do, changes nothing here."""

    class Rounding(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.matmul, Tensor.matmul, Tensor.__matmul__):
                args = [x.bfloat16() for x in args]
            return function(*args, **kwargs or {})

    z = draw(3, 6, 5).float().to(device)
    with Rounding():
        assert (z @ z.mT).dtype == torch.bfloat16
        value = PAIRS[name][0](z)
    assert torch.equal(value, PAIRS[name][0](z))


@pytest.mark.triton
def test_settings_of_numpy(device):
    z = draw(12, 5).float().to(device)
    numbers = {"num_slices": np.int64(SLICES), "num_points": np.int64(17), "t_max": np.float64(3)}
    assert torch.equal(sigreg(z, seed=SEED, **numbers), statistic(z))
    assert torch.equal(coding_rate(z, eps=EPS, center=np.bool_(True)), rate(z))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace:FutureWarning")
def test_jit_traces_an_operator(tmp_path):
    traced = torch.jit.trace(lambda z: coding_rate(z, eps=EPS), draw(6, 5))
    assert any("coding_rate" in node.kind() for node in traced.graph.nodes())
    z = draw(6, 5, seed=1)
    torch.testing.assert_close(traced(z), rate(z))


def test_a_gradient_of_torchs_symbolic_zeros():
    """torch.func and forward mode make tensors of zeros without memory."""
    z = draw(3, 6, 5).requires_grad_()
    zeros = torch._efficientzerotensor(3, dtype=z.dtype)
    assert torch.autograd.grad(rate(z), z, zeros)[0].abs().sum() == 0
