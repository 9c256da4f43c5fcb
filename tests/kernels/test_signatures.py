"""What changes one import line: the arguments of every drop-in, in the originals' order and with their defaults."""

import inspect

import lightly.loss.emp_ssl_loss
import lightly.loss.lejepa_loss
import pytest

from seqjepa.kernels.drop_in import eb_jepa, emp_ssl, lejepa, mcr2, seq_jepa, simdino, simdinov2
from seqjepa.kernels.drop_in import lightly as ours

# as their repositories have them at the commits that the modules' docstrings speak of
ORIGINALS = {
    simdino.MCRLoss: "ncrops, reduce_cov=0, expa_type=0, eps=0.5, coeff=1.0",
    simdino.MCRLoss.forward: "self, student_feat, teacher_feat",
    simdinov2.MCRLoss: "out_dim, expa_type=0, reduce_cov=0, eps=0.05, coeff=1, center=False, *args, **kwargs",
    simdinov2.MCRLoss.forward: "self, student_feat_list, teacher_feat_list, no_diag=True, normalized=True",
    mcr2.MaximalCodingRateReduction: "gam1=1.0, gam2=1.0, eps=0.01",
    mcr2.MaximalCodingRateReduction.forward: "self, X, Y, num_classes=None",
    emp_ssl.TotalCodingRate: "eps=0.01",
    emp_ssl.TotalCodingRate.forward: "self, X",
    emp_ssl.MaximalCodingRateReduction: "eps=0.01, gamma=1",
    emp_ssl.MaximalCodingRateReduction.forward: "self, X, Y, num_classes=None",
    seq_jepa.coding_rate_loss: "Z, alpha=1.0, eps=1e-4",
    seq_jepa.coding_rate_loss_stable: "Z, alpha=1.0, eps=1e-4",
    seq_jepa.CodingRateLoss: "alpha=1.0, eps=1e-4, target='agg_out', lambda_rate=0.01, use_stable=False",
    lejepa.EppsPulley: "t_max=3, n_points=17, integration='trapezoid'",
    lejepa.EppsPulley.forward: "self, x",
    lejepa.SlicingUnivariateTest: (
        "univariate_test, num_slices, reduction='mean', sampler='gaussian', clip_value=None"
    ),
    lejepa.SlicingUnivariateTest.forward: "self, x",
    eb_jepa.BCS: "num_slices=256, lmbd=10.0",
    eb_jepa.BCS.forward: "self, z1, z2",
}
INSTALLED = [
    (ours.EMPSSLLoss, lightly.loss.emp_ssl_loss.EMPSSLLoss),
    (ours.SIGReg, lightly.loss.lejepa_loss.SIGReg),
    (ours.LeJEPALoss, lightly.loss.lejepa_loss.LeJEPALoss),
]


def arguments(function) -> list[tuple]:
    """Name, kind and default of each."""
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


def written(text: str):
    space = {}
    exec(f"def original({text}): ...", space)
    return space["original"]


@pytest.mark.parametrize(("function", "text"), ORIGINALS.items(), ids=lambda value: getattr(value, "__qualname__", ""))
def test_arguments_are_the_originals(function, text):
    mine = [argument for argument in arguments(function) if argument[0] != "local_gram"]  # by name alone, and ours
    assert mine == arguments(written(text))


@pytest.mark.parametrize(("mine", "theirs"), INSTALLED, ids=lambda value: value.__name__)
def test_arguments_are_lightlys(mine, theirs):
    assert arguments(mine) == arguments(theirs)
    assert arguments(mine.forward) == arguments(theirs.forward)
