"""Log-determinants and inverses of many small positive definite matrices, without a host sync.

M = L Lᵀ, log det M = 2 Σ log L_ii, M⁻¹ = L⁻ᵀ L⁻¹. One Triton program factors one matrix by the left-looking algorithm,
16 columns at a time: the 16 x 16 block on the diagonal is factored and inverted column by column, everything else is a
product of tiles. As in LAPACK's potrf, `info` reports a pivot that is not positive; it stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import full_precision, jit, launch, tl, uses_triton
from .matmul import gram

__all__ = ["inverse_logdet"]

BLOCKS = {"BLOCK": 64, "BLOCK_K": 32}
ONE_PROGRAM = 256  # side of the largest matrix for one program; above it cuSOLVER (bench/kernel_table.py compares)


@jit
def _leaf(b_a):
    """Inverse Cholesky factor of a [16, 16] matrix, its log-determinant, and its first bad pivot, from 1, or 0."""
    o = tl.arange(0, 16)
    row, column = o[:, None], o[None, :]
    b_w = (row == column).to(tl.float32)
    logdet = 0.0
    info = 0
    for j in range(16):
        pivot = tl.where((row == j) & (column == j), b_a, 0.0).sum(axis=1).sum(axis=0)
        info = tl.where((info == 0) & ((pivot > 0) == 0), j + 1, info)  # a pivot that is NaN is bad too
        logdet += tl.log(pivot)
        scale = 1.0 / tl.sqrt(pivot)
        down = tl.where(column == j, b_a, 0.0).sum(axis=1) * scale  # column j of the factor
        across = tl.where(row == j, b_a, 0.0).sum(axis=0) * scale  # the same as a row
        w_row = tl.where(row == j, b_w, 0.0).sum(axis=0) * scale
        below = tl.where(o > j, down, 0.0)[:, None]
        b_a -= below * across[None, :]
        b_w = tl.where(row == j, w_row[None, :], b_w - below * w_row[None, :])
    return b_w, logdet, info


@jit
def _load(matrix, o_row, o_column, n):
    m = (o_row < n)[:, None] & (o_column < n)[None, :]
    return tl.load(matrix + o_row[:, None] * n + o_column[None, :], mask=m, other=0.0)


@jit
def _store(matrix, o_row, o_column, n, b_x):
    m = (o_row < n)[:, None] & (o_column < n)[None, :]
    tl.store(matrix + o_row[:, None] * n + o_column[None, :], b_x, mask=m)


@jit
def _cholesky_kernel(
    matrix,  # pointer to [S, n, n], contiguous, symmetric; overwritten, by the inverse if asked
    factor,  # pointer to [S, n, n], scratch for the inverse W of the factor L
    logdet,  # pointer to [S]
    info,  # pointer to int32 [S]
    n,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A thread sees what another thread of the program stored only after a barrier.
    i_s = tl.program_id(0).to(tl.int64)
    matrix += i_s * n * n
    factor += i_s * n * n
    o_16 = tl.arange(0, 16)
    o_block = tl.arange(0, BLOCK)
    o_inner = tl.arange(0, BLOCK_K)
    total = 0.0
    failed = 0
    for j in range(0, n, 16):
        o_j = j + o_16
        b_a = _load(matrix, o_j, o_j, n)
        b_a += ((o_16[:, None] == o_16[None, :]) & (o_j >= n)[:, None]).to(tl.float32)  # pad with the identity beyond n
        for k in range(0, j, BLOCK_K):
            b_l = tl.where((k + o_inner < j)[None, :], _load(matrix, o_j, k + o_inner, n), 0.0)
            b_a -= tl.dot(b_l, tl.trans(b_l), input_precision="ieee")
        b_w, leaf_logdet, leaf_info = _leaf(b_a)
        total += leaf_logdet
        failed = tl.where((failed == 0) & (leaf_info > 0), j + leaf_info, failed)

        for i in range(j + 16, n, BLOCK):  # the panel below: L_ij = (A_ij - Σ_k L_ik L_jkᵀ) W_jjᵀ
            o_i = i + o_block
            b_l = _load(matrix, o_i, o_j, n)
            for k in range(0, j, BLOCK_K):
                o_k = k + o_inner
                b_j = tl.where((o_k < j)[None, :], _load(matrix, o_j, o_k, n), 0.0)
                b_l -= tl.dot(_load(matrix, o_i, o_k, n), tl.trans(b_j), input_precision="ieee")
            _store(matrix, o_i, o_j, n, tl.dot(b_l, tl.trans(b_w), input_precision="ieee"))

        if INVERSE:
            for i in range(0, j, BLOCK):  # 16 rows of W = L⁻¹: W_ji = -W_jj Σ_k L_jk W_ki
                o_i = i + o_block
                b_sum = tl.zeros([16, BLOCK], dtype=tl.float32)
                for k in range(i, j, BLOCK_K):
                    o_k = k + o_inner
                    b_j = tl.where((o_k < j)[None, :], _load(matrix, o_j, o_k, n), 0.0)
                    b_k = tl.where((o_k < j)[:, None] & (o_k[:, None] >= o_i[None, :]), _load(factor, o_k, o_i, n), 0.0)
                    b_sum = tl.dot(b_j, b_k, b_sum, input_precision="ieee")
                b_sum = tl.where((o_i < j)[None, :], -tl.dot(b_w, b_sum, input_precision="ieee"), 0.0)
                _store(factor, o_j, o_i, n, b_sum)
            tl.debug_barrier()  # the last block of columns covered the diagonal
            _store(factor, o_j, o_j, n, b_w)
        tl.debug_barrier()
    tl.store(logdet + i_s, tl.where(failed > 0, float("nan"), total))
    tl.store(info + i_s, failed)

    if INVERSE:
        for i in range(0, n, BLOCK):  # M⁻¹ = Wᵀ W, a tile and its mirror image
            o_i = i + o_block
            for j in range(0, i + 1, BLOCK):
                o_j = j + o_block
                b_x = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
                for k in range(i, n, 16):
                    o_k = k + o_16
                    b_i = tl.where(o_k[:, None] >= o_i[None, :], _load(factor, o_k, o_i, n), 0.0)
                    b_j = tl.where(o_k[:, None] >= o_j[None, :], _load(factor, o_k, o_j, n), 0.0)
                    b_x = tl.dot(tl.trans(b_i), b_j, b_x, input_precision="ieee")
                _store(matrix, o_i, o_j, n, b_x)
                if j < i:
                    _store(matrix, o_j, o_i, n, tl.trans(b_x))


def inverse_logdet(matrix: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-determinant and inverse of positive definite matrices.

    Args:
        matrix: [S, n, n], float32 or float64, contiguous, symmetric; may be overwritten.
        inverse: whether to compute the inverse.

    Returns:
        The log-determinants [S], NaN where the factorisation failed; the inverses [S, n, n], or [S, 0, 0] without
        `inverse`; and int32 [S]: 0, or the number of the first pivot, counted from 1, that was not positive.
    """
    n = matrix.shape[-1]
    if uses_triton(matrix) and n <= ONE_PROGRAM:
        return _launch(matrix, inverse)
    with full_precision(matrix.device):
        factor, info = torch.linalg.cholesky_ex(matrix)
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        logdet = logdet.masked_fill(info > 0, float("nan"))
        if not inverse:
            return logdet, matrix.new_empty((len(matrix), 0, 0)), info
        if matrix.device.type == "cpu" and not info.any():  # on a GPU this would wait for the device
            return logdet, torch.cholesky_inverse(factor).mT.contiguous(), info  # LAPACK stores by columns
        identity = torch.eye(n, dtype=matrix.dtype, device=matrix.device)
        lower = torch.linalg.solve_triangular(factor, identity, upper=False)
    return logdet, gram(lower.mT, torch.ones_like(logdet), identity=False), info


def _launch(matrix: Tensor, inverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, n, _ = matrix.shape
    factor = torch.empty_like(matrix)
    logdet = torch.empty(batch, dtype=torch.float32, device=matrix.device)
    info = torch.empty(batch, dtype=torch.int32, device=matrix.device)
    launch(
        _cholesky_kernel, (batch,), matrix, factor, logdet, info, n, INVERSE=inverse, num_stages=1, **BLOCKS
    )  # fmt: skip
    return logdet, matrix if inverse else matrix.new_empty((len(matrix), 0, 0)), info
