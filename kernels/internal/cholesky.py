"""Log-determinants and inverses of many small positive definite matrices, without a host sync.

M = L Lᵀ, log det M = 2 Σ log L_ii, M⁻¹ = Wᵀ W with W = L⁻¹. The forward pass needs the first two, the backward pass the
inverse, so they are separate functions. One Triton program factors one matrix by the left-looking algorithm, 16 columns
at a time: the 16 x 16 block on the diagonal is factored and inverted column by column, everything else is a product of
tiles. The columns of W do not depend on each other, so one matrix has several programs there; the steps along its rows
are 16 at first, within blocks on the diagonal, and then as long as these blocks. As in LAPACK's potrf, `info` reports a
pivot that is not positive; it stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import cdiv, full_precision, jit, launch, tl, uses_triton
from .matmul import gram

__all__ = ["factor_logdet", "inverse_of"]

BLOCKS = {"BLOCK": 64, "BLOCK_K": 32}
# of an inverse whose blocks on the diagonal are known
STRIPES = {"ROWS": 64, "BLOCK": 32, "BLOCK_K": 32, "num_warps": 8}
# side of the largest matrix for one program, above which cuSOLVER factors: of several matrices, and of a single one
ONE_PROGRAM, ONE_PROGRAM_ALONE = 256, 128
ONE_STEP = 128  # side of the largest matrix whose inverse takes steps of 16 rows only


@jit
def _leaf(b_a):
    """Inverse Cholesky factor of a [16, 16] matrix, its log-determinant, and its first bad pivot, from 1, or 0."""
    o = tl.arange(0, 16)
    row, column = o[:, None], o[None, :]
    b_v = (row == column).to(tl.float32)  # transposed inverse: so one sum in a step crosses warps, at two barriers
    b_pivots = tl.zeros([16], dtype=tl.float32)
    for j in range(16):
        across = tl.where(row == j, b_a, 0.0).sum(axis=0)
        pivot = tl.where(o == j, across, 0.0).sum(axis=0)
        b_pivots = tl.where(o == j, pivot, b_pivots)
        scale = 1.0 / tl.sqrt(pivot)
        right = tl.where(o > j, across * scale, 0.0)[None, :]  # row j of the factor's transpose
        down = (tl.where(column == j, b_a, 0.0).sum(axis=1) * scale)[:, None]
        v_column = (tl.where(column == j, b_v, 0.0).sum(axis=1) * scale)[:, None]
        b_a -= down * right
        b_v = tl.where(column == j, v_column, b_v - v_column * right)
    first = tl.where((b_pivots > 0) == 0, o + 1, 17).min(axis=0)  # a pivot that is NaN is bad too
    return tl.trans(b_v), tl.log(b_pivots).sum(axis=0), tl.where(first == 17, 0, first)


@jit
def _load(matrix, o_row, o_column, n):
    m = (o_row < n)[:, None] & (o_column < n)[None, :]
    return tl.load(matrix + o_row[:, None] * n + o_column[None, :], mask=m, other=0.0)


@jit
def _store(matrix, o_row, o_column, n, b_x):
    m = (o_row < n)[:, None] & (o_column < n)[None, :]
    tl.store(matrix + o_row[:, None] * n + o_column[None, :], b_x, mask=m)


@jit
def _factor_kernel(
    matrix,  # pointer to [S, n, n], contiguous, symmetric; below the diagonal blocks L replaces it, and in them W does
    logdet,  # pointer to [S]
    info,  # pointer to int32 [S]
    n,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A thread sees what another thread of the program stored only after a barrier.
    i_s = tl.program_id(0).to(tl.int64)
    matrix += i_s * n * n
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
        _store(matrix, o_j, o_j, n, b_w)
        for i in range(j + 16, n, BLOCK):  # the panel below: L_ij = (A_ij - Σ_k L_ik L_jkᵀ) W_jjᵀ
            o_i = i + o_block
            b_l = _load(matrix, o_i, o_j, n)
            for k in range(0, j, BLOCK_K):
                o_k = k + o_inner
                b_j = tl.where((o_k < j)[None, :], _load(matrix, o_j, o_k, n), 0.0)
                b_l -= tl.dot(_load(matrix, o_i, o_k, n), tl.trans(b_j), input_precision="ieee")
            _store(matrix, o_i, o_j, n, tl.dot(b_l, tl.trans(b_w), input_precision="ieee"))
        tl.debug_barrier()
    tl.store(logdet + i_s, tl.where(failed > 0, float("nan"), total))
    tl.store(info + i_s, failed)


@jit
def _leaves_kernel(
    factor,  # pointer to L [S, n, n]
    out,  # pointer to [S, n, n], contiguous: the inverses of the 16 x 16 blocks on L's diagonal, in their places
    n,
    stride_row,
    stride_column,
):
    leaves = tl.cdiv(n, 16)
    i_s = (tl.program_id(0) // leaves).to(tl.int64)
    o = tl.arange(0, 16)
    row, column = o[:, None], o[None, :]
    o_j = (tl.program_id(0) % leaves * 16 + o).to(tl.int64)
    m = (o_j < n)[:, None] & (o_j < n)[None, :]
    p_l = factor + i_s * n * n + o_j[:, None] * stride_row + o_j[None, :] * stride_column
    b_l = tl.load(p_l, mask=m, other=0.0) + ((row == column) & (o_j >= n)[:, None]).to(tl.float32)
    b_v = (row == column).to(tl.float32)
    for j in range(16):
        b_column = tl.where(column == j, b_l, 0.0).sum(axis=1)
        pivot = tl.where(o == j, b_column, 0.0).sum(axis=0)
        b_row = tl.where(row == j, b_v, 0.0).sum(axis=0) / pivot
        b_v = tl.where(row == j, b_row[None, :], b_v - tl.where(o > j, b_column, 0.0)[:, None] * b_row[None, :])
    _store(out + i_s * n * n, o_j, o_j, n, b_v)


@jit
def _inverse_kernel(
    factor,  # pointer to L [S, n, n]
    diagonal,  # pointer to [S, n, n], contiguous: inverses of the blocks of ROWS on L's diagonal, in their places
    out,  # pointer to W [S, n, n], contiguous, zero above its diagonal; or to the blocks of SPAN on W's diagonal
    n,
    stride_row,
    stride_column,
    SPAN: tl.constexpr,  # 0 for the whole W
    KNOWN: tl.constexpr,  # whether `out` has its blocks of ROWS on the diagonal already
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # a block of W's columns, ROWS at a time: W_ji = W_jj (1_ji - Σ_k L_jk W_ki)
    span = n
    if SPAN:
        span = SPAN
    columns = tl.cdiv(span, BLOCK)
    blocks = tl.cdiv(n, span)
    i_s = (tl.program_id(0) // (columns * blocks)).to(tl.int64)
    begin = tl.program_id(0) // columns % blocks * span
    factor += i_s * n * n
    diagonal += i_s * n * n
    out += i_s * n * n
    o_i = (begin + tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    first = begin + tl.program_id(0) % columns * BLOCK // ROWS * ROWS
    for j in range(begin, tl.minimum(begin + span, n), ROWS):
        o_j = j + tl.arange(0, ROWS).to(tl.int64)
        if j < first:
            _store(out, o_j, o_i, n, tl.zeros([ROWS, BLOCK], dtype=tl.float32))
        elif not KNOWN or j > first:
            b_sum = (o_j[:, None] == o_i[None, :]).to(tl.float32)
            for k in range(first, j, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
                m = (o_j < n)[:, None] & (o_k < j)[None, :]
                b_l = tl.load(factor + o_j[:, None] * stride_row + o_k[None, :] * stride_column, mask=m, other=0.0)
                b_w = tl.where((o_k < j)[:, None], _load(out, o_k, o_i, n), 0.0)
                b_sum -= tl.dot(b_l, b_w, input_precision="ieee")
            _store(out, o_j, o_i, n, tl.dot(_load(diagonal, o_j, o_j, n), b_sum, input_precision="ieee"))
        tl.debug_barrier()


@jit
def _logdet_kernel(
    factor,  # pointer to the Cholesky factors [S, n, n], contiguous
    info,  # pointer to int32 [S]
    logdet,  # pointer to [S]
    n,
    BLOCK: tl.constexpr,
):
    i_s = tl.program_id(0).to(tl.int64)
    total = 0.0
    for start in range(0, n, BLOCK):
        o = start + tl.arange(0, BLOCK).to(tl.int64)
        total += 2 * tl.log(tl.load(factor + (i_s * n + o) * n + o, mask=o < n, other=1.0)).sum(axis=0)
    tl.store(logdet + i_s, tl.where(tl.load(info + i_s) > 0, float("nan"), total))


def _in_one_program(matrix: Tensor, alone: bool) -> bool:
    return uses_triton(matrix) and matrix.shape[-1] <= (ONE_PROGRAM_ALONE if alone else ONE_PROGRAM)


def factor_logdet(matrix: Tensor, *, alone: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Log-determinants of positive definite matrices, and factors from which `inverse_of` computes inverses.

    Args:
        matrix: [S, n, n], float32 or float64, contiguous, symmetric; may be overwritten. Libraries do not read what
            is below the diagonal.
        alone: whether to choose the algorithm for a single matrix, as the user sees it: vmap may have made S of it.

    Returns:
        The log-determinants [S], NaN where the factorisation failed; the factors [S, n, n]; and int32 [S]: 0, or the
        number of the first pivot, counted from 1, that was not positive.
    """
    batch, n, _ = matrix.shape
    if uses_triton(matrix):
        logdet = torch.empty(batch, dtype=torch.float32, device=matrix.device)
    if _in_one_program(matrix, alone):
        info = torch.empty(batch, dtype=torch.int32, device=matrix.device)
        launch(_factor_kernel, (batch,), matrix, logdet, info, n, num_stages=1, **BLOCKS)
        return logdet, matrix, info
    with full_precision(matrix.device):
        if matrix.device.type == "cpu" and not uses_triton(matrix):
            factor, info = matrix, _factor_on_cpu(matrix, alone)
        else:
            factor, info = torch.linalg.cholesky_ex(matrix.mT)
            factor = factor.mT.contiguous()  # libraries store by columns, so this copies nothing
    if uses_triton(matrix):
        launch(_logdet_kernel, (batch,), factor, info, logdet, n, BLOCK=256)
    else:
        logdet = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        logdet.masked_fill_(info > 0, float("nan"))
    return logdet, factor, info


def _factor_on_cpu(matrix: Tensor, alone: bool) -> Tensor:
    """Replace [S, n, n] by Lᵀ, and return int32 [S], as LAPACK's potrf does, which works on columns.

    Up to a side of 128 that is no faster than a loop, and threads are of no use. Of several matrices two halves are
    factored, and the rest is products: [A · ; B C] = [L · ; X M] [L · ; X M]ᵀ, A = L Lᵀ, X = B L⁻ᵀ, C - X Xᵀ = M Mᵀ.
    """
    lower, n = matrix.mT, matrix.shape[-1]
    if alone or not 64 < n <= 128:
        return torch.linalg.cholesky_ex(lower, out=(lower, torch.empty(len(matrix), dtype=torch.int32))).info
    half = n // 2
    first, side, last = lower[:, :half, :half], lower[:, half:, :half], lower[:, half:, half:]
    factor, info = torch.linalg.cholesky_ex(first)
    first.copy_(factor)
    x = torch.linalg.solve_triangular(factor, side.mT, upper=False)
    side.copy_(x.mT)
    factor, later = torch.linalg.cholesky_ex(torch.baddbmm(last, x.mT, x, alpha=-1))
    last.copy_(factor)
    lower[:, :half, half:] = 0
    return torch.where((info > 0) | (later == 0), info, later + half)


def inverse_of(factor: Tensor, info: Tensor, scale: Tensor, *, times: float = 1.0, alone: bool) -> Tensor:
    """The inverses of the matrices that `factor_logdet` has factored, multiplied by `scale` and by `times`.

    Args:
        factor: [S, n, n], as returned; not changed.
        info: int32 [S], as returned.
        scale: [S], of the dtype of `factor`.
        times: a number.
        alone: as it was given to `factor_logdet`.

    Returns:
        [S, n, n], symmetric; NaN where the factorisation failed.
    """
    n = factor.shape[-1]
    if factor.device.type == "cpu" and not uses_triton(factor):
        scale = torch.where(info > 0, float("nan"), scale * times)
        if info.any():  # LAPACK would refuse to invert the others too
            factor = torch.where((info > 0)[:, None, None], torch.eye(n, dtype=factor.dtype), factor)
        return torch.cholesky_inverse(factor.mT).mT.contiguous().mul_(scale[:, None, None])
    if uses_triton(factor):
        root = _triangular_inverse(factor, own=_in_one_program(factor, alone))
    else:
        identity = torch.eye(n, dtype=factor.dtype, device=factor.device)
        with full_precision(factor.device):
            root = torch.linalg.solve_triangular(factor.mT, identity, upper=False)
    return gram(root.mT, scale, times=times, info=info)


def _triangular_inverse(factor: Tensor, own: bool) -> Tensor:
    """W [S, n, n], of a factor with the inverses of its smallest blocks in their places, or of a library's, Lᵀ."""
    batch, n, _ = factor.shape
    root = torch.empty_like(factor)
    strides = (n, 1) if own else (1, n)
    leaves = factor if own else root
    if not own:
        launch(_leaves_kernel, (batch * cdiv(n, 16),), factor, root, n, *strides, num_warps=1)
    whole = n <= ONE_STEP
    rest = {"KNOWN": False, "ROWS": 16, "num_stages": 1, **BLOCKS}
    programs = batch * cdiv(n, BLOCKS["BLOCK"])
    launch(_inverse_kernel, (programs,), factor, leaves, root, n, *strides, SPAN=0 if whole else 64, **rest)
    if not whole:
        programs = batch * cdiv(n, STRIPES["BLOCK"])
        rest = {"KNOWN": True, "num_stages": 1, **STRIPES}
        launch(_inverse_kernel, (programs,), factor, root, root, n, *strides, SPAN=0, **rest)
    return root
