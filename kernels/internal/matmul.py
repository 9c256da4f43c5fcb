"""Matrix products in full float32 accuracy: `a @ b` with scaled rows, and `I + c * y @ yᵀ`.

They ignore autocast and TF32 settings: a Gram matrix rounded to bfloat16 may no longer be positive definite, and TF32
loses three digits of a coding rate's gradient.

Letters: M, N rows and columns of the result, K the inner dimension, S matrices in the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import dot_precision, full_precision, jit, launch, tl, triton, uses_triton

__all__ = ["gram", "matmul"]

MATMUL_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16}
GRAM_BLOCKS = {"BLOCK_N": 64, "BLOCK_K": 16}
OPTIONS = {"num_warps": 8}  # with fewer warps or deeper blocks, registers spill on some GPUs (tests/kernels/aot.py)


@jit
def _matmul_kernel(
    a,  # pointer to A [S, M, K]
    b,  # pointer to B [S, K, N]
    scale,  # pointer to [S, M], contiguous; rows of the result are multiplied by it
    out,  # pointer to [S, M, N], contiguous
    M,
    N,
    K,
    stride_as,
    stride_am,
    stride_ak,
    stride_bs,
    stride_bk,
    stride_bn,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    num_columns = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(M, BLOCK_M) * num_columns
    i_s = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_tile = tl.program_id(0) % num_tiles
    o_m = (i_tile // num_columns) * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    o_n = (i_tile % num_columns) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    m_m, m_n = o_m < M, o_n < N
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < K
        p_a = a + i_s * stride_as + o_m[:, None] * stride_am + o_k[None, :] * stride_ak
        p_b = b + i_s * stride_bs + o_k[:, None] * stride_bk + o_n[None, :] * stride_bn
        b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        b_out = tl.dot(b_a, b_b, b_out, input_precision=PRECISION)
    if SCALED:
        b_out *= tl.load(scale + i_s * M + o_m, mask=m_m, other=0.0)[:, None]
    p_out = out + i_s * M * N + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out, mask=m_m[:, None] & m_n[None, :])


@jit
def _gram_kernel(
    y,  # pointer to Y [S, N, K]
    c,  # pointer to [S]
    out,  # pointer to [S, N, N], contiguous
    N,
    K,
    stride_ys,
    stride_yn,
    stride_yk,
    IDENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one tile of the lower triangle, and its mirror image
    num_blocks = tl.cdiv(N, BLOCK_N)
    i_s = (tl.program_id(0) // (num_blocks * num_blocks)).to(tl.int64)
    i_row = tl.program_id(0) // num_blocks % num_blocks
    i_column = tl.program_id(0) % num_blocks
    if i_column > i_row:
        return
    o_i = i_row * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    o_j = i_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    m_i, m_j = o_i < N, o_j < N
    b_out = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < K
        p_i = y + i_s * stride_ys + o_i[:, None] * stride_yn + o_k[None, :] * stride_yk
        p_j = y + i_s * stride_ys + o_k[:, None] * stride_yk + o_j[None, :] * stride_yn
        b_i = tl.load(p_i, mask=m_i[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_j = tl.load(p_j, mask=m_k[:, None] & m_j[None, :], other=0.0).to(tl.float32)
        b_out = tl.dot(b_i, b_j, b_out, input_precision=PRECISION)
    b_out *= tl.load(c + i_s)
    if IDENTITY:
        b_out += (o_i[:, None] == o_j[None, :]).to(tl.float32)
    # also within tiles on the diagonal, where an element and its mirror image may be rounded differently
    m_out = m_i[:, None] & m_j[None, :] & (o_i[:, None] >= o_j[None, :])
    tl.store(out + i_s * N * N + o_i[:, None] * N + o_j[None, :], b_out, mask=m_out)
    tl.store(out + i_s * N * N + o_j[None, :] * N + o_i[:, None], b_out, mask=m_out)


def matmul(a: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    """`scale[..., None] * (a @ b)` in float32.

    Args:
        a: [S, M, K], float32, bfloat16 or float16, any strides; float64 is multiplied in float64.
        b: [S, K, N], of the same dtypes, any strides.
        scale: [S, M], float32; None scales nothing.

    Returns:
        [S, M, N].
    """
    if not uses_triton(a):
        with full_precision(a.device):
            exact = torch.float64 if a.dtype == torch.float64 else torch.float32
            out = a.to(exact) @ b.to(exact)
            return out if scale is None else out.mul_(scale[..., None])
    batch, rows, inner = a.shape
    columns = b.shape[-1]
    out = torch.empty((batch, rows, columns), dtype=torch.float32, device=a.device)
    scale = None if scale is None else scale.contiguous()
    tiles = triton.cdiv(rows, MATMUL_BLOCKS["BLOCK_M"]) * triton.cdiv(columns, MATMUL_BLOCKS["BLOCK_N"])
    launch(
        _matmul_kernel, (batch * tiles,), a, b, out if scale is None else scale, out,
        rows, columns, inner, *a.stride(), *b.stride(),
        SCALED=scale is not None, PRECISION=dot_precision(a.device), **MATMUL_BLOCKS, **OPTIONS,
    )  # fmt: skip
    return out


def gram(y: Tensor, c: Tensor, *, identity: bool) -> Tensor:
    """`c * y @ yᵀ` in float32, optionally plus the identity.

    Args:
        y: [S, N, K], float32, bfloat16 or float16, any strides; float64 is multiplied in float64.
        c: [S], float32.
        identity: whether to add the identity.

    Returns:
        [S, N, N], exactly symmetric.
    """
    if not uses_triton(y):
        with full_precision(y.device):
            y = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
            out = (y @ y.mT).mul_(c[:, None, None])
            if identity:
                out.diagonal(dim1=-2, dim2=-1).add_(1)
            return out
    batch, size, inner = y.shape
    out = torch.empty((batch, size, size), dtype=torch.float32, device=y.device)
    tiles = triton.cdiv(size, GRAM_BLOCKS["BLOCK_N"]) ** 2
    launch(
        _gram_kernel, (batch * tiles,), y, c.contiguous(), out, size, inner, *y.stride(),
        IDENTITY=identity, PRECISION=dot_precision(y.device), **GRAM_BLOCKS, **OPTIONS,
    )  # fmt: skip
    return out
