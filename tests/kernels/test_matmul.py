"""Products of float32 accuracy, and the blocked Cholesky factor, against float64."""

import pytest
import torch

from seqjepa.kernels.internal import cholesky
from seqjepa.kernels.internal.backend import INTERPRETED
from seqjepa.kernels.internal.cholesky import factor_logdet, inverse_of
from seqjepa.kernels.internal.matmul import gram, matmul, side_to_factor

pytestmark = pytest.mark.triton


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (15, 17, 16), (65, 33, 100), (64, 128, 64)])
def test_matmul(m, k, n, dtype, device):
    torch.manual_seed(0)
    a = torch.randn(2, k, m, device=device, dtype=dtype).mT  # by columns
    b = torch.randn(2, 2 * k, n, device=device)[:, ::2]
    scale = torch.rand(2, m, device=device)
    expected = scale[..., None] * (a.double() @ b.double())
    error = (matmul(a, b, scale) - expected).norm() / expected.norm()
    assert error < 1e-6  # a few roundings of float32
    assert matmul(a, b).dtype == torch.float32


@pytest.mark.parametrize("inner", [40, 900])  # whole, and in parts
def test_a_failed_factorisation_makes_its_gram_matrix_nan(inner, device):
    y, c = torch.randn(2, 20, inner, device=device), torch.tensor([0.5, 3.0], device=device)
    out = gram(y, c, times=0.25, info=torch.tensor([0, 7], dtype=torch.int32, device=device))
    expected = 0.125 * (y[0].double() @ y[0].double().mT)
    assert (out[0] - expected).norm() / expected.norm() < 1e-6
    assert out[1].isnan().all()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 64, 65, 130])
def test_gram(n, device):
    torch.manual_seed(0)
    y = torch.randn(2, 40, n, device=device).mT
    c = torch.tensor([0.5, 3.0], device=device)
    out = gram(y, c, identity=True)
    expected = c[:, None, None].double() * (y.double() @ y.double().mT) + torch.eye(n, device=device)
    assert torch.equal(out, out.mT)
    assert (out - expected).norm() / expected.norm() < 1e-6
    plain = gram(y, c, identity=False)
    torch.testing.assert_close(plain.double() + torch.eye(n, device=device), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [100, 128, 256])
def test_a_matrix_to_factor_is_continued_by_the_identity(n, device):
    """In torch on a CPU, to a side that is no multiple of 128; its other half is not read."""
    y, c = torch.randn(2, n, 40, device=device), torch.tensor([0.5, 3.0], device=device)
    side = side_to_factor(n, y)
    assert side == n or (side % 128 and device.type == "cpu")
    matrix = gram(y, c, identity=True, side=side)
    assert matrix.shape == (2, side, side)
    expected = torch.eye(side, device=device).repeat(2, 1, 1).double()
    expected[:, :n, :n] += c[:, None, None] * (y.double() @ y.double().mT)
    torch.testing.assert_close(matrix.triu().double(), expected.triu(), rtol=1e-5, atol=1e-5)
    logdet, _, info = factor_logdet(matrix, alone=False)
    torch.testing.assert_close(logdet.double(), torch.logdet(expected[:, :n, :n]), rtol=1e-5, atol=1e-5)
    assert info.tolist() == [0, 0]


@pytest.mark.skipif(not INTERPRETED, reason="asks for Triton's choice")
@pytest.mark.parametrize(("alone", "largest"), [(True, 128), (False, 256)])
def test_who_factors_depends_on_number_and_side(alone, largest):
    batch = 1 if alone else 16
    assert cholesky._in_one_program(torch.empty(batch, largest, largest), alone)
    assert not cholesky._in_one_program(torch.empty(batch, largest + 1, largest + 1), alone)


@pytest.mark.parametrize("batch", [1, 2])  # a single matrix above 128 takes the library's way
@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 64, 65, 100, 150, 300])
def test_inverse_and_logdet(n, batch, device):
    torch.manual_seed(n)
    y = torch.randn(batch, n, n + 5, device=device, dtype=torch.float64)
    matrix = y @ y.mT / n + torch.eye(n, device=device)
    logdet, factor, info = factor_logdet(matrix.float(), alone=batch == 1)
    expected = torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(logdet.double(), expected, rtol=1e-5, atol=1e-5)
    scale = torch.arange(1.0, batch + 1, device=device)
    inverse = inverse_of(factor, info, scale, alone=batch == 1)
    true_inverse = scale[:, None, None] * torch.linalg.inv(matrix)
    assert (inverse - true_inverse).norm() / true_inverse.norm() < 2e-6
    torch.testing.assert_close(inverse, inverse.mT)
    assert info.tolist() == [0] * batch


@pytest.mark.parametrize("n", [130, 256])
def test_a_library_does_not_read_below_the_diagonal(n, device):
    """Where torch leaves a Gram matrix undefined, on a CPU and on other devices without Triton."""
    y = torch.randn(1, n, 2 * n, device=device, dtype=torch.float64)
    matrix = y @ y.mT / n + torch.eye(n, device=device)
    undefined = torch.full_like(matrix, float("nan")).tril(-1)
    logdet, _, info = factor_logdet((matrix.triu() + undefined).float(), alone=True)
    torch.testing.assert_close(logdet.double(), torch.logdet(matrix), rtol=1e-5, atol=1e-5)
    assert info.item() == 0


@pytest.mark.parametrize(("n", "at"), [(40, 3), (100, 3), (100, 70)])  # a CPU factors 100 in halves
def test_a_bad_pivot_is_named_and_stays_in_its_matrix(n, at, device):
    matrix = torch.eye(n, device=device).repeat(4, 1, 1)
    for number, (row, pivot) in enumerate(((at + 17, -1.0), (at, float("nan")), (at + 2, 0.0)), 1):
        matrix[number, row, row] = pivot
    logdet, factor, info = factor_logdet(matrix, alone=False)
    assert info.tolist() == [0, at + 18, at + 1, at + 3]
    assert logdet[0] == 0
    assert logdet[1:].isnan().all()
    inverse = inverse_of(factor, info, torch.ones(4, device=device), alone=False)
    assert torch.equal(inverse[0], torch.eye(n, device=device))
    assert inverse[1:].isnan().all()
