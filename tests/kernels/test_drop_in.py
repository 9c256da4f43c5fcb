"""Losses under other codebases' names against their formulas, written out here in double precision."""

import copy
import datetime
import io
import os
import subprocess
import sys
import warnings
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from seqjepa.kernels import CodingRate, SIGReg
from seqjepa.kernels.drop_in import eb_jepa, emp_ssl, lejepa, lightly, mcr2, seq_jepa, simdino, simdinov2
from seqjepa.kernels.sigreg import directions, sigreg

SHAPES = [(5, 12), (24, 8)]  # fewer rows than columns, and more
ROUNDING = 1e-9  # double precision, condition numbers up to 1e4
ONE_E8 = 1e-6  # the originals add 1e-8 to the mass of each class; rates are of order 10 and their difference of order 1


def features(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64, requires_grad=True)


def unit_rows(*shape, seed=0):
    return F.normalize(features(*shape, seed=seed).detach(), dim=-1).requires_grad_()


def check(got, expected, inputs, rtol=ROUNDING):
    """Values and gradients agree, gradients relative to their largest element."""
    torch.testing.assert_close(got, expected, rtol=rtol, atol=0)
    ours, theirs = (torch.autograd.grad(value, inputs, retain_graph=True) for value in (got, expected))
    for mine, other in zip(ours, theirs, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=rtol * other.abs().max().item())


def rate(Z, c, weight=1):
    """log det(I + c Zᵀ diag(weight) Z), weight [m, 1]."""
    return torch.logdet(torch.eye(Z.shape[1], dtype=Z.dtype) + c * Z.T @ (weight * Z))


# SimDINO


def simdino_formula(student, teacher, eps, expa_type, cosine, no_diag=True, processes=1):
    """comp, comp of global views and expa of student [S, m, p] and teacher [T, m, p]."""
    T, S, (m, p) = len(teacher), len(student), student.shape[1:]
    similarity = {
        (t, s): cosine(teacher[t], student[s]).mean() for t, s in product(range(T), range(S)) if t != s or not no_diag
    }
    comp = sum(similarity.values()) / (T * S - min(T, S))
    comp_global = sum(value for (_, s), value in similarity.items() if s < T) / T
    views = [student[t] if expa_type == 0 else (student[t] + teacher[t]) / 2 for t in range(T)]
    n = m * processes
    half = sum(rate(Z, p / (n * eps)) / 2 for Z in views) / T
    return comp, comp_global, (p + n) / (p * n) * half


def cosine(x, y):
    return (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))


def inner(x, y):
    return (x * y).sum(-1)


@pytest.mark.parametrize(("m", "p"), SHAPES)
@pytest.mark.parametrize("expa_type", [0, 1])
@pytest.mark.parametrize("ncrops", [2, 6])
def test_simdino(m, p, expa_type, ncrops):
    student, teacher = features(ncrops * m, p), features(2 * m, p, seed=1)
    loss, comp, expa = simdino.MCRLoss(ncrops, expa_type=expa_type, eps=0.3, coeff=1.7)(student, teacher)
    expected_comp, _, expected_expa = simdino_formula(
        student.view(ncrops, m, p), teacher.view(2, m, p), 0.3, expa_type, cosine
    )
    check(loss, -1.7 * expected_comp - expected_expa, (student, teacher))
    torch.testing.assert_close((comp, expa), (expected_comp, expected_expa), rtol=ROUNDING, atol=0)
    assert not comp.requires_grad
    assert not expa.requires_grad


@pytest.mark.parametrize(("m", "p"), SHAPES)
@pytest.mark.parametrize("no_diag", [True, False])
@pytest.mark.parametrize("expa_type", [0, 1])
def test_simdinov2(m, p, no_diag, expa_type):
    student, teacher = unit_rows(5, m, p), unit_rows(2, m, p, seed=1)
    ours = simdinov2.MCRLoss(p, expa_type, coeff=0.6, eps_end=-1, coeff_end=-1)  # its configs hold further keys
    loss, parts = ours(student.unbind(), teacher.unbind(), no_diag=no_diag)
    comp, comp_global, expa = simdino_formula(student, teacher, 0.05, expa_type, inner, no_diag)
    check(loss, -0.6 * comp - expa, (student, teacher))
    expected = {"loss": -0.6 * comp - expa, "comp_loss": comp, "global_comp_loss": comp_global, "expa_loss": expa}
    torch.testing.assert_close(parts, expected, rtol=ROUNDING, atol=0)
    assert not any(part.requires_grad for part in parts.values())


def test_simdinov2_normalises_if_asked():
    student, teacher = features(3, 6, 4), features(2, 6, 4, seed=1)
    loss, _ = simdinov2.MCRLoss(4)(list(student), list(teacher), normalized=False)
    comp, _, expa = simdino_formula(F.normalize(student, dim=-1), F.normalize(teacher, dim=-1), 0.05, 0, inner)
    check(loss, -comp - expa, (student, teacher))


def test_simdino_follows_schedules():
    student, teacher = unit_rows(2, 6, 4), unit_rows(2, 6, 4, seed=1)
    loss = simdinov2.MCRLoss(4)
    for eps, coeff in zip(np.linspace(0.05, 0.5, 3), np.linspace(1, 0.2, 3), strict=True):
        comp, _, expa = simdino_formula(student, teacher, eps, 0, inner)
        for kind in (lambda value: value, float, torch.tensor):  # what a schedule of NumPy writes; others
            loss.eps, loss.coeff = kind(eps), kind(coeff)
            check(loss(student, teacher)[0], -coeff * comp - expa, (student, teacher))


def test_simdino_counts_a_zero_row_as_torch_does():
    student, teacher = (
        features(*shape, seed=seed).detach().clone() for seed, shape in enumerate([(2, 6, 4), (2, 6, 4)])
    )
    student[1, 2] = 0
    student.requires_grad_()
    loss, *_ = simdino.MCRLoss(2)(student.flatten(0, 1), teacher.flatten(0, 1))
    comp, _, expa = simdino_formula(student, teacher, 0.5, 0, lambda x, y: F.cosine_similarity(x, y, dim=-1))
    check(loss, -comp - expa, (student,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_simdino_in_half_precision_under_autocast(dtype):
    student, teacher = (features(2 * 16, 8, seed=seed).detach().to(dtype) for seed in (0, 1))
    with torch.autocast("cpu", dtype=dtype):
        loss, *_ = simdino.MCRLoss(2, expa_type=1)(student, teacher)
    comp, _, expa = simdino_formula(student.double().view(2, 16, 8), teacher.double().view(2, 16, 8), 0.5, 1, cosine)
    assert loss.dtype == torch.float32
    # sums of 256 products in float32; half precision would be off by 1e-3
    torch.testing.assert_close(loss.double(), -comp - expa, rtol=1e-5, atol=0)


# MCR² and EMP-SSL


def class_formula(X, members, eps):
    """Σ_j trPi_j / 2m log det(I + p / (trPi_j eps) W Pi_j Wᵀ), trPi_j = 1e-8 + Σ members."""
    m, p = X.shape
    mass = members.sum(1) + 1e-8
    rates = [rate(X, p / (mass[j] * eps), members[j, :, None]) for j in range(len(members))]
    return sum(mass[j] / (2 * m) * rates[j] for j in range(len(members)))


@pytest.mark.parametrize(("m", "p"), SHAPES)
@pytest.mark.parametrize("num_classes", [None, 4, 6])  # labels up to 3; two classes without members
@pytest.mark.parametrize(("gam1", "gam2"), [(1.0, 1.0), (2.5, 0.7)])
def test_mcr2(m, p, num_classes, gam1, gam2):
    X, Y = features(m, p), torch.arange(m) % 4
    loss, empirical, theoretical = mcr2.MaximalCodingRateReduction(gam1, gam2, eps=0.5)(X, Y, num_classes)
    members = (torch.arange(num_classes or 4)[:, None] == Y).double()
    batch = rate(X, gam1 * p / (m * 0.5)) / 2
    classes = class_formula(X, members, 0.5)
    check(loss, classes - gam2 * batch, (X,), ONE_E8)
    plain = rate(X, p / (m * 0.5)) / 2
    for got, expected in ((empirical, [batch, classes]), (theoretical, [plain, classes])):
        torch.testing.assert_close(got, expected, rtol=ONE_E8, atol=0)
        assert not any(value.requires_grad for value in got)


@pytest.mark.parametrize(("m", "p"), SHAPES)
def test_total_coding_rate(m, p):
    X = features(3, m, p)
    loss = emp_ssl.TotalCodingRate(eps=0.2)
    expected = [-rate(patch, p / (m * 0.2)) / 2 for patch in X]
    check(loss(X[0]), expected[0], (X,))
    check(loss(X), sum(expected) / 3, (X,))


@pytest.mark.parametrize(("m", "p"), SHAPES)
def test_emp_ssl_with_labels(m, p):
    X, Y = features(m, p), torch.arange(m) % 3
    loss, parts = emp_ssl.MaximalCodingRateReduction(eps=0.2, gamma=0.4)(X, Y, num_classes=5)
    batch = rate(X, p / (m * 0.2)) / 2
    classes = class_formula(X, (torch.arange(5)[:, None] == Y).double(), 0.2)
    check(loss, 0.4 * classes - batch, (X,), ONE_E8)
    torch.testing.assert_close(parts, [batch, classes], rtol=ONE_E8, atol=0)
    assert not any(value.requires_grad for value in parts)
    torch.testing.assert_close(emp_ssl.MaximalCodingRateReduction(0.2, 0.4)(X, Y)[0], loss)


@pytest.mark.parametrize(("m", "p"), SHAPES)
def test_emp_ssl_with_probabilities(m, p):
    X, logits = features(m, p), features(m, 3, seed=1)
    Y = logits.softmax(-1)
    loss, _ = emp_ssl.MaximalCodingRateReduction(eps=0.2)(X, Y)
    check(loss, class_formula(X, Y.T, 0.2) - rate(X, p / (m * 0.2)) / 2, (X, logits), ONE_E8)


def test_class_without_members_is_nothing():
    X, Y = features(6, 4), torch.zeros(6, 3, dtype=torch.float64)
    Y[:, 0] = 1
    loss, (batch, classes) = emp_ssl.MaximalCodingRateReduction(eps=0.2)(X, Y)
    torch.testing.assert_close(classes, batch, rtol=ROUNDING, atol=0)  # one class is the batch
    (gradient,) = torch.autograd.grad(loss, X)
    # each rate's gradient is of order 1
    torch.testing.assert_close(gradient, torch.zeros_like(X), rtol=0, atol=1e-12)


# the seq-JEPA fork


def seq_jepa_formula(Z, alpha, eps):
    Z = Z - Z.mean(0)
    eye = torch.eye(Z.shape[1], dtype=Z.dtype)
    return -torch.logdet(eye + alpha * Z.T @ Z / len(Z) + eps * eye)


def stable_formula(Z, alpha, eps):
    """By singular values: those of C are their squares over B, and zero beyond the smaller side."""
    values = torch.linalg.svdvals(Z - Z.mean(0)) ** 2 / len(Z)
    values = torch.cat([values, values.new_zeros(Z.shape[1] - len(values))])
    return -torch.log(1 + alpha * values.clamp(min=eps)).sum()


@pytest.mark.parametrize(("m", "p"), SHAPES)
@pytest.mark.parametrize(("alpha", "eps"), [(1.0, 1e-4), (30.0, 0.5)])
def test_seq_jepa(m, p, alpha, eps):
    agg, z = features(m, p), features(m, p + 3, seed=1)
    agg_loss, z_loss = seq_jepa_formula(agg, alpha, eps), seq_jepa_formula(z, alpha, eps)
    check(seq_jepa.coding_rate_loss(agg, alpha, eps), agg_loss, (agg,))
    expected = {"agg_out": agg_loss, "z_t": z_loss, "both": agg_loss + z_loss}
    for target, value in expected.items():
        loss = seq_jepa.CodingRateLoss(alpha, eps, target, lambda_rate=0.03)(agg_out=agg, z_t=z)
        torch.testing.assert_close(loss, 0.03 * value, rtol=ROUNDING, atol=0)
    stable = stable_formula(agg, alpha, eps)
    check(seq_jepa.CodingRateLoss(alpha, eps, lambda_rate=0.03, use_stable=True)(agg), 0.03 * stable, (agg,))
    both = seq_jepa.CodingRateLoss(alpha, eps, "both", lambda_rate=0.03)
    check(both(agg, z), 0.03 * (agg_loss + z_loss), (agg, z))
    torch.testing.assert_close(both(z_t=z), 0.03 * z_loss, rtol=ROUNDING, atol=0)
    assert seq_jepa.CodingRateLoss(target="z_t")(agg_out=agg) == 0


# SIGReg

WINDOW = 1e-6  # the originals hold knots and windows in float32, 6e-8 each


def epps_pulley_formula(x, t, factor):
    """∫ φ |mean exp(itx) - φ|² dt of x [N, K] by the trapezoidal rule on knots t, times a factor: [K]."""
    phi = torch.exp(-(t**2) / 2)
    function = torch.exp(1j * x[..., None] * t).mean(0)
    return factor * torch.trapezoid(phi * (function - phi).abs() ** 2, t)


def step(number):
    return torch.tensor(number, dtype=torch.int64)


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_lejepa(n, d):
    x = features(2, n, d)
    test = lejepa.SlicingUnivariateTest(lejepa.EppsPulley(t_max=4, n_points=9), num_slices=7)
    t = torch.linspace(-4, 4, 17, dtype=torch.float64)  # nine on the half-line
    for number in range(2):
        unit = directions(step(number), d, 7).double()
        expected = torch.stack([epps_pulley_formula(part @ unit, t, n) for part in x])
        value = test(x)
        assert value.shape == ()
        check(value, expected.mean(), (x,))
        torch.testing.assert_close(test.univariate_test(x @ unit), expected, rtol=WINDOW, atol=0)
        check(test.univariate_test(x @ unit).mean(), expected.mean(), (x,), WINDOW)
    assert test.global_step == 2


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_eb_jepa(n, d):
    z1, z2 = features(n, d), features(n, d, seed=1)
    loss = eb_jepa.BCS(num_slices=7, lmbd=3.0)
    t = torch.linspace(-3, 3, 10, dtype=torch.float64)
    for number in range(2):
        unit = directions(step(number), d, 7).double()
        bcs = (epps_pulley_formula(z1 @ unit, t, 1).mean() + epps_pulley_formula(z2 @ unit, t, 1).mean()) / 2
        invariance = ((z1 - z2) ** 2).mean()
        out = loss(z1, z2)
        assert list(out) == ["loss", "bcs_loss", "invariance_loss"]
        check(out["loss"], invariance + 3 * bcs, (z1, z2))
        check(out["bcs_loss"], bcs, (z1, z2))
        check(out["invariance_loss"], invariance, (z1, z2))
    assert loss.step == 2


# lightly's own code


@pytest.mark.parametrize(("m", "p"), SHAPES)
def test_lightly_emp_ssl(m, p):
    from lightly.loss.emp_ssl_loss import EMPSSLLoss

    z = features(4, m, p)
    check(lightly.EMPSSLLoss()(z.unbind()), EMPSSLLoss()(z.unbind()), (z,))
    settings = {"tcr_eps": 0.03, "inv_coef": 2.0}
    check(lightly.EMPSSLLoss(**settings)(z.unbind()), EMPSSLLoss(**settings)(z.unbind()), (z,))


@pytest.fixture
def our_directions(monkeypatch):
    """Let lightly draw its directions as ours are drawn, from the same state of torch's generator."""
    from lightly.loss.lejepa_loss import SIGReg

    def draw(self, device, dtype, num_features):
        return directions(torch.randint(2**62, ()), num_features, self.num_vectors).to(dtype)

    monkeypatch.setattr(SIGReg, "_generate_unit_vectors", draw)

    def run(loss, *args, **kwargs):
        torch.manual_seed(3)
        return loss(*args, **kwargs)

    return run


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_lightly_sigreg(n, d, our_directions):
    from lightly.loss.lejepa_loss import SIGReg

    z = features(2, n, d)
    for settings in ({}, {"knots": 8, "t_max": 4.2, "num_vectors": 5}):
        ours, theirs = lightly.SIGReg(**settings), SIGReg(**settings)
        check(our_directions(ours, z), our_directions(theirs, z), (z,), WINDOW)
        ours.load_state_dict(theirs.state_dict())


@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_lightly_lejepa(n, d, our_directions):
    from lightly.loss.lejepa_loss import LeJEPALoss

    views = {"local_proj": features(3, n, d), "global_proj": features(2, n, d, seed=1)}
    for settings in ({}, {"lambda_param": 0.3, "sigreg_knots": 9, "sigreg_t_max": 2.0, "sigreg_num_vectors": 5}):
        ours, theirs = lightly.LeJEPALoss(**settings), LeJEPALoss(**settings)
        check(our_directions(ours, **views), our_directions(theirs, **views), tuple(views.values()), WINDOW)
        ours.load_state_dict(theirs.state_dict())


def test_sigreg_draws_new_directions_at_each_call():
    z = features(8, 4)
    for loss in (lightly.SIGReg(num_vectors=3), lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 3)):
        assert loss(z) != loss(z)


# all of them


def test_signs():
    """Rows of an identity matrix: ZᵀZ = I, R = d log(1 + c)."""
    d, eps = 4, 0.5
    Z = torch.eye(d, dtype=torch.float64)
    half = d / 2 * np.log(1 + 1 / eps)
    opposite = -Z  # cosine of -1 with the views of the teacher
    loss, comp, expa = simdino.MCRLoss(2)(torch.cat([Z, Z]), torch.cat([opposite, opposite]))
    values = {
        "total coding rate": (emp_ssl.TotalCodingRate(eps)(Z), -half),
        "lightly": (lightly.EMPSSLLoss(eps, inv_coef=1.0)([Z, Z]), half - 1),
        # one class a row: R(class) = log(1 + d / eps), weight 1/d
        "mcr2": (mcr2.MaximalCodingRateReduction(eps=eps)(Z, torch.arange(d))[0], np.log(1 + d / eps) / 2 - half),
        "simdino comp": (comp, -1),
        "simdino expa": (expa, 2 / d * half),
        "simdino": (loss, 1 - 2 / d * half),
        # centring takes one of the four dimensions
        "seq_jepa": (seq_jepa.coding_rate_loss(Z, 2.0, 1e-4), -3 * np.log(1.5001) - np.log(1.0001)),
    }
    for name, (got, expected) in values.items():
        assert got.item() == pytest.approx(expected, rel=ROUNDING), name


@pytest.mark.parametrize(
    "build",
    [
        lambda: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8),
        lightly.SIGReg,
        eb_jepa.BCS,
        lambda: SIGReg(8, seed=7),
        lambda: CodingRate(eps=0.3),
    ],
)
def test_buffers_have_their_first_values_after_the_meta_device(build):
    """to_empty leaves what lies in memory; directions would differ from process to process."""
    expected = dict(build().named_buffers())
    with torch.device("meta"):
        module = build()
    assigned, file = copy.deepcopy(module), io.BytesIO()
    assigned.load_state_dict(build().state_dict(), assign=True)
    torch.save(build(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    assert all(buffer.is_meta for buffer in (*module.buffers(), *loaded.buffers()))
    emptied = [meta.to_empty(device="cpu") for meta in (module, loaded, build().to("meta"))]
    for got in (*emptied, assigned, build().half()):
        torch.testing.assert_close(dict(got.named_buffers()), expected, rtol=0, atol=0)


def test_state_dicts_are_the_originals():
    slicing = lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8)
    names = {"global_step", "univariate_test.t", "univariate_test.phi", "univariate_test.weights"}
    assert slicing.state_dict().keys() == names
    for loss in (simdino.MCRLoss(2), simdinov2.MCRLoss(8), eb_jepa.BCS(), emp_ssl.TotalCodingRate()):
        assert not loss.state_dict()


def whole_graphs():
    """A loss, and its inputs by shape."""
    labels = torch.arange(6) % 3
    slicing = lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8)
    bcs, pair = eb_jepa.BCS(8), lightly.LeJEPALoss()
    return {
        "simdino": (lambda s, t: simdino.MCRLoss(2)(s, t)[0], (12, 4), (12, 4)),
        "simdinov2": (lambda s, t: simdinov2.MCRLoss(4)([s, t], [t, s])[0], (6, 4), (6, 4)),
        "mcr2": (lambda x: mcr2.MaximalCodingRateReduction()(x, labels, 3)[0], (6, 4)),
        "emp_ssl": (lambda x: emp_ssl.MaximalCodingRateReduction()(x, labels, 3)[0], (6, 4)),
        "seq_jepa": (seq_jepa.CodingRateLoss(), (6, 4)),
        "lejepa": (slicing, (6, 4)),
        "eb_jepa": (lambda a, b: bcs(a, b)["loss"], (6, 4), (6, 4)),
        "lightly": (lambda a, b: pair(local_proj=a, global_proj=b), (2, 6, 4), (2, 6, 4)),
    }


@pytest.mark.parametrize("name", whole_graphs())
def test_compiles_to_one_graph(name):
    loss, *shapes = whole_graphs()[name]
    inputs = [features(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    torch.manual_seed(0)
    expected = loss(*inputs)
    loss, *_ = whole_graphs()[name]  # counters at zero again
    torch.manual_seed(0)
    got = torch.compile(loss, backend="aot_eager", fullgraph=True)(*inputs)
    check(got, expected, inputs)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: simdinov2.MCRLoss(8, center=True), "center=True keeps a centre that SimDINO's loss never reads"),
        (lambda: simdino.MCRLoss(2, expa_type=2), "expa_type must be 0 .* got 2"),
        (lambda: simdino.MCRLoss(2, reduce_cov=2), "reduce_cov must be 0 or 1 .* got 2"),
        (lambda: simdino.MCRLoss(0), "ncrops must be a whole number >= 1, got 0"),
        (lambda: simdino.MCRLoss(2, eps=0), "eps must be positive, got 0"),
        (lambda: simdinov2.MCRLoss(8, eps=float("nan")), "eps must be positive, got nan"),
        (lambda: mcr2.MaximalCodingRateReduction(gam1=0.0), "gam1 must be positive, got 0.0"),
        (lambda: mcr2.MaximalCodingRateReduction(eps=-1), "eps must be positive, got -1"),
        (lambda: emp_ssl.TotalCodingRate(eps=torch.tensor(-1.0)), "eps must be positive, got -1.0"),
        (lambda: emp_ssl.MaximalCodingRateReduction("small"), "eps must be positive, got small"),
        (lambda: lightly.EMPSSLLoss(tcr_eps=float("inf")), "tcr_eps must lie between 1e-30 and 1e30, got inf"),
        (lambda: seq_jepa.CodingRateLoss(alpha=0.0), "alpha must be positive, got 0.0"),
        (lambda: eb_jepa.BCS(0), "num_slices must be a whole number >= 1, got 0"),
        (lambda: lejepa.EppsPulley(t_max=0), "t_max must be positive, got 0"),
        (lambda: lejepa.EppsPulley(n_points=1), "n_points must be a whole number >= 3, got 1"),
        (lambda: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 0), "num_slices must be a whole number.* got 0"),
        (lambda: lightly.SIGReg(t_max=float("nan")), "t_max must be positive, got nan"),
        (lambda: seq_jepa.CodingRateLoss(target="agg"), "target must be 'agg_out', 'z_t' or 'both', got 'agg'"),
        (lambda: seq_jepa.CodingRateLoss(eps=-1.0), r"1 \+ eps must be positive, got 0.0"),
        (lambda: seq_jepa.coding_rate_loss(torch.ones(3, 2), eps=-1), r"1 \+ eps must be positive, got 0"),
        (lambda: lejepa.EppsPulley(n_points=16), "n_points must be odd .* got n_points=16"),
        (lambda: lejepa.EppsPulley(integration="simpson"), "got n_points=17, integration='simpson'"),
        (lambda: lejepa.SlicingUnivariateTest(torch.nn.Identity(), 8), "this module's EppsPulley, got Identity"),
        (lambda: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8, "sum"), "only reduction='mean'.* got 'sum'"),
        (lambda: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8, None), "only reduction='mean'.* got None"),
        (lambda: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8, clip_value=0.1), "clip_value=None .* and 0.1"),
        (lambda: lightly.SIGReg(knots=1), "knots must be a whole number >= 2, got 1"),
        (lambda: lightly.LeJEPALoss(1.5), r"lambda_param must be in \[0, 1\], got 1.5"),
        (
            lambda: lightly.LeJEPALoss()(local_proj=torch.ones(2, 5, 4), global_proj=torch.ones(2, 6, 4)),
            r"got \[2, 5, 4\] and \[2, 6, 4\]",
        ),
    ],
)
def test_refuses(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# settings

NUMBERS = {  # a factor, which may be any finite number
    "simdino": lambda value: simdino.MCRLoss(2, coeff=value),
    "simdinov2": lambda value: simdinov2.MCRLoss(8, coeff=value),
    "mcr2": lambda value: mcr2.MaximalCodingRateReduction(gam2=value),
    "emp_ssl": lambda value: emp_ssl.MaximalCodingRateReduction(gamma=value),
    "lightly": lambda value: lightly.EMPSSLLoss(inv_coef=value),
    "lightly, lejepa": lambda value: lightly.LeJEPALoss(value, sigreg_num_vectors=8),
    "seq_jepa": lambda value: seq_jepa.CodingRateLoss(lambda_rate=value),
    "seq_jepa, eps": lambda value: seq_jepa.CodingRateLoss(eps=value),
    "eb_jepa": lambda value: eb_jepa.BCS(8, lmbd=value),
}
POSITIVE = {
    "simdino": lambda value: simdino.MCRLoss(2, eps=value),
    "simdinov2": lambda value: simdinov2.MCRLoss(8, eps=value),
    "mcr2": lambda value: mcr2.MaximalCodingRateReduction(eps=value),
    "mcr2, gam1": lambda value: mcr2.MaximalCodingRateReduction(gam1=value),
    "emp_ssl": emp_ssl.TotalCodingRate,
    "emp_ssl, classes": lambda value: emp_ssl.MaximalCodingRateReduction(eps=value),
    "lightly": lightly.EMPSSLLoss,
    "seq_jepa": seq_jepa.CodingRateLoss,
    "lejepa": lambda value: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(value), 8),
    "lightly, sigreg": lambda value: lightly.SIGReg(t_max=value, num_vectors=8),
}
NO_NUMBERS = [float("nan"), float("inf"), "1.0", None, True, 1j, [1.0], torch.ones(1), np.ones(1), np.array("a")]


@pytest.mark.parametrize("build", NUMBERS.values(), ids=NUMBERS)
def test_factors_are_finite_numbers(build):
    for value in NO_NUMBERS:
        with pytest.raises(ValueError, match=r"^\w+ must be a finite number, got"):
            build(value)


@pytest.mark.parametrize("build", POSITIVE.values(), ids=POSITIVE)
def test_distortions_and_knots_are_positive_numbers(build):
    for value in (*NO_NUMBERS, 0, -1.0, 1e-50, 1e50):  # the last two are none in float32
        with pytest.raises(ValueError, match=r"^\w+ must (be positive|lie between 1e-30 and 1e30), got"):
            build(value)


CALLS = {  # of a loss, with features of four views
    "simdino": lambda loss, x: loss(x[:2].flatten(0, 1), x[2:].flatten(0, 1))[0],
    "simdinov2": lambda loss, x: loss(list(x[:2]), list(x[2:]))[0],
    "mcr2": lambda loss, x: loss(x[0], torch.arange(len(x[0])) % 3, 3)[0],
    "emp_ssl": lambda loss, x: loss(x[0]) if isinstance(loss, emp_ssl.TotalCodingRate) else loss(x[0], x[1].softmax(1)),
    "lightly": lambda loss, x: loss(list(x)) if isinstance(loss, lightly.EMPSSLLoss) else loss(x),
    "lightly, lejepa": lambda loss, x: loss(local_proj=x, global_proj=x[:2]),
    "seq_jepa": lambda loss, x: loss(x[0]),
    "eb_jepa": lambda loss, x: loss(x[0], x[1])["loss"],
    "lejepa": lambda loss, x: loss(x),
}


def value_of(name, loss, x):
    torch.manual_seed(0)  # lightly's directions
    value = CALLS.get(name, CALLS[name.split(",")[0]])(loss, x)
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize("name", NUMBERS | POSITIVE)
def test_arrays_of_one_number_are_numbers(name):
    x = features(4, 6, 8)
    for table in (NUMBERS, POSITIVE):
        if build := table.get(name):
            first, *others = (
                value_of(name, build(value), x) for value in (0.5, np.array(0.5), np.float32(0.5), torch.tensor(0.5))
            )
            for other in others:
                torch.testing.assert_close(other, first)


@pytest.mark.parametrize("name", NUMBERS | POSITIVE)
def test_autocast_changes_nothing(name):
    """Not even of matrices that a CPU factors by halves."""
    x = torch.randn(4, 100, 96, generator=torch.Generator().manual_seed(0))
    for build in (table[name] for table in (NUMBERS, POSITIVE) if name in table):
        expected = value_of(name, build(0.5), x)
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype=dtype):
                assert torch.equal(value_of(name, build(0.5), x), expected)


# two processes


def compare_processes(rank, store):
    """In each of two processes: the mean of the losses and the averaged gradients are those of the joint batch."""
    z = features(6, 10, 3).detach()  # six views of ten rows
    mine, uneven = slice(5 * rank, 5 * rank + 5), (slice(7), slice(7, 10))[rank]
    torch.manual_seed(rank)
    seeds = [torch.randint(2**62, (), generator=torch.Generator().manual_seed(number)) for number in range(2)]

    def lightly_joint(x):
        return sigreg(x, num_slices=8, seed=max(seeds)).mean()

    slicing = {"joint": lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8)}
    slicing["local"] = lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8)
    joined = {  # the same on both, however many rows each has
        "simdino, expa": lambda x: expansion(x, simdino.MCRLoss(2, reduce_cov=1, expa_type=1)),
        "simdinov2, expa": lambda x: expansion(x, simdinov2.MCRLoss(3, reduce_cov=1)),
        "eb_jepa, bcs": lambda x: eb_jepa.BCS(8)(x[0], x[1])["bcs_loss"],
        "EppsPulley alone": lambda x: lejepa.EppsPulley()(x).mean(),
        "lejepa alone": lambda x: lejepa.SlicingUnivariateTest(lejepa.EppsPulley(), 8)(x),
    }

    def expansion(x, loss):
        return loss.expansion(x[:4], x[4:])

    shared = {
        "simdino": lambda x: simdino.MCRLoss(4, reduce_cov=1)(x[:4].flatten(0, 1), x[4:].flatten(0, 1))[0],
        "simdinov2": lambda x: simdinov2.MCRLoss(3, reduce_cov=1, expa_type=1)(x[:4].unbind(), x[4:].unbind())[0],
        "eb_jepa": lambda x: eb_jepa.BCS(8)(x[0], x[1])["loss"],
        "EppsPulley": lambda x: lejepa.EppsPulley()(x).mean(),
    }
    joint = shared | {"lejepa": slicing["joint"], "lightly": lightly_joint}
    local = shared | {"lejepa": slicing["local"], "lightly": lightly.SIGReg(num_vectors=8, gather_distributed=True)}

    def value_and_gradient(loss, x):
        x = x.clone().requires_grad_()
        value = loss(x)
        return value.detach(), *torch.autograd.grad(value, x)

    expected = {name: value_and_gradient(loss, z) for name, loss in (joint | joined).items()}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=300)
    )
    for name, loss in local.items():
        value, gradient = value_and_gradient(loss, z[:, mine])
        torch.distributed.all_reduce(value)
        for got, wanted in zip((value / 2, gradient / 2), (expected[name][0], expected[name][1][:, mine]), strict=True):
            scale = wanted.abs().max().item()
            torch.testing.assert_close(
                got, wanted, rtol=0, atol=ROUNDING * scale, msg=lambda m, name=name: f"{name}: {m}"
            )
    everything = (slice(10), slice(10, 10))[rank]  # and the other process has no rows
    for (name, loss), rows in product(joined.items(), (uneven, everything)):
        value, gradient = value_and_gradient(loss, z[:, rows])
        torch.testing.assert_close(value, expected[name][0], rtol=ROUNDING, atol=0, msg=lambda m, name=name: name + m)
        wanted = 2 * expected[name][1]  # which averaging over processes halves
        torch.testing.assert_close(gradient, wanted[:, rows], rtol=0, atol=ROUNDING * wanted.abs().max().item())
    # of losses with terms of one process's own rows, the other one's are zero
    some, views = z[:, everything], lightly.LeJEPALoss(0.2, gather_distributed=True, sigreg_num_vectors=8)
    v1, v2 = simdino.MCRLoss(4, local_gram=True), simdinov2.MCRLoss(3, eps=0.5, local_gram=True)
    comp, _, expa = simdino_formula(z[:4], z[4:], 0.5, 0, cosine, processes=2)
    inner_comp, *_ = simdino_formula(z[:4], z[4:], 0.5, 0, inner)
    for name, value, wanted in (
        ("simdino", shared["simdino"](some), -comp),
        ("simdinov2", shared["simdinov2"](some), -inner_comp),
        ("eb_jepa", shared["eb_jepa"](some), (z[0] - z[1]).square().mean()),
        ("lightly", views(local_proj=some[2:], global_proj=some[:2]), 0.8 * (z - z[:2].mean(0)).square().mean()),
        ("local Gram", v1(some[:4].flatten(0, 1), some[4:].flatten(0, 1))[0], -comp - expa),
        ("local Gram, v2", v2(some[:4].unbind(), some[4:].unbind())[0], -inner_comp - expa),
    ):
        difference = value if rank == 0 else -value
        torch.distributed.all_reduce(difference)
        torch.testing.assert_close(difference, wanted, rtol=ROUNDING, atol=0, msg=lambda m, name=name: name + m)
    # the original's default: rows of one process, over the number of all
    student, teacher = unit_rows(4, 5, 3, seed=rank), unit_rows(2, 5, 3, seed=2 + rank)
    flat = student.flatten(0, 1), teacher.flatten(0, 1)
    comp, _, expa = simdino_formula(student, teacher, 0.5, 0, cosine, processes=2)
    inner_comp, *_ = simdino_formula(student, teacher, 0.5, 0, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, *_ = simdino.MCRLoss(4, local_gram=True)(*flat)
    check(loss, -comp - expa, (student, teacher))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            check(simdino.MCRLoss(4)(*flat)[0], -comp - expa, (student, teacher))
            check(
                simdinov2.MCRLoss(3, eps=0.5)(list(student), list(teacher))[0], -inner_comp - expa, (student, teacher)
            )
    (message,) = {str(warning.message) for warning in caught}
    assert len(caught) == 1
    assert "reduce_cov=0 on 2 processes divides local Gram matrices by the number of all rows" in message
    print("as one process")


def test_two_processes_are_as_one(tmp_path):
    command = [sys.executable, __file__, str(tmp_path / "store")]
    started = [
        subprocess.Popen([*command, rank], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in ("0", "1")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert outputs == ["as one process\n"] * 2, "\n".join(outputs)


if __name__ == "__main__":
    torch.set_num_threads(1)
    compare_processes(int(sys.argv[2]), sys.argv[1])
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort an interpreter that is torn down: not what is tested here
