"""torch.compile(fullgraph=True) while numbers change at every call, as schedules of Python and NumPy write them."""

import numpy as np
import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from seqjepa.kernels import CodingRate, coding_rate, sigreg
from seqjepa.kernels.drop_in import eb_jepa, emp_ssl, lightly, mcr2, seq_jepa, simdino, simdinov2

# a Python float is a constant of the first graph and an input of the second; NumPy's are inputs at once, or like them
KINDS = {"float": float, "numpy": np.float64, "numpy, 32 bits": np.float32, "tensor": torch.tensor}
ANEW = pytest.mark.skipif(torch.__version__.startswith("2.11."), reason="torch 2.11 makes a graph for each value here")
VALUES = [0.1 + 0.05 * number for number in range(12)]  # more than the eight graphs that Dynamo allows


ROWS, OTHERS = torch.randn(2, 12, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 3


FUNCTIONS = {
    "alpha": lambda value: coding_rate(ROWS, alpha=value),
    "eps": lambda value: coding_rate(ROWS, eps=value),
    "eps, with weights": lambda value: coding_rate(ROWS, eps=value, weights=OTHERS.mT.abs()),
    "seq_jepa": lambda value: seq_jepa.coding_rate_loss(ROWS, alpha=value, eps=value),
}


class Scheduled(nn.Module):
    """A loss whose settings are written before each call."""

    def __init__(self, loss, names, call):
        super().__init__()
        self.loss, self.names, self.call = loss, names, call

    def forward(self):
        return self.call(self.loss)

    def write(self, value):
        for name in self.names:
            setattr(self.loss, name, value)


MODULES = {
    "simdino": lambda: Scheduled(simdino.MCRLoss(2), ("eps", "coeff"), lambda f: f(ROWS, OTHERS)[0]),
    "simdinov2": lambda: Scheduled(
        simdinov2.MCRLoss(7), ("eps", "coeff"), lambda f: f([ROWS, OTHERS], [OTHERS, ROWS])[0]
    ),
    "mcr2": lambda: Scheduled(
        mcr2.MaximalCodingRateReduction(), ("eps", "gam1", "gam2"), lambda f: f(ROWS, LABELS, 3)[0]
    ),
    "emp_ssl": lambda: Scheduled(emp_ssl.TotalCodingRate(), ("eps",), lambda f: f(ROWS)),
    "emp_ssl, classes": lambda: Scheduled(
        emp_ssl.MaximalCodingRateReduction(), ("eps", "gamma"), lambda f: f(ROWS, LABELS, 3)[0]
    ),
    "lightly": lambda: Scheduled(lightly.EMPSSLLoss(), ("tcr_eps", "inv_coef"), lambda f: f([ROWS, OTHERS])),
    "seq_jepa": lambda: Scheduled(seq_jepa.CodingRateLoss(), ("alpha", "eps", "lambda_rate"), lambda f: f(ROWS)),
    "eb_jepa": lambda: Scheduled(eb_jepa.BCS(8), ("lmbd",), lambda f: f(ROWS, OTHERS)["loss"]),
}


def compiled(function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_compiles_to_two_graphs(name, kind):
    function, counter = compiled(FUNCTIONS[name])
    for value in VALUES:
        torch.testing.assert_close(function(kind(value)), FUNCTIONS[name](value), check_dtype=False)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", [pytest.param(float, marks=ANEW), np.float64])
@pytest.mark.parametrize("name", MODULES)
def test_a_loss_compiles_to_two_graphs(name, kind):
    module, plain = MODULES[name](), MODULES[name]()
    function, counter = compiled(module)
    for value in VALUES:
        module.write(kind(value))
        plain.write(value)
        torch.testing.assert_close(function(), plain(), check_dtype=False)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor])
def test_sigreg_compiles_with_new_seeds(kind):
    function, counter = compiled(lambda seed: sigreg(ROWS, num_slices=4, seed=seed))
    for seed in (0, -1, 3, 2**40, 2**53 + 1, *range(10, 18)):
        torch.testing.assert_close(function(kind(seed)), sigreg(ROWS, num_slices=4, seed=seed))
    assert counter.frame_count <= 4  # the first is a constant; beyond 2**53 there is another graph


@pytest.mark.parametrize("kind", [pytest.param(float, marks=ANEW), np.float64])
def test_sigreg_compiles_with_seeds_from_floats(kind):
    function, counter = compiled(lambda value: sigreg(ROWS, num_slices=4, seed=int(value * 1000)))
    for value in VALUES:
        torch.testing.assert_close(function(kind(value)), sigreg(ROWS, num_slices=4, seed=int(value * 1000)))
    assert counter.frame_count <= 2


def test_a_module_compiles_once():
    module = CodingRate(eps=0.5)
    function, counter = compiled(lambda: module(ROWS))
    for value in VALUES:
        module.eps.fill_(value)
        torch.testing.assert_close(function(), coding_rate(ROWS, eps=value))
    assert counter.frame_count == 1
