"""Matrix products in full float32 accuracy: `a @ b` with scaled rows, and `I + c * y @ yᵀ`.

They ignore autocast and TF32 settings: a Gram matrix rounded to bfloat16 may no longer be positive definite, and TF32
loses three digits of a coding rate's gradient. Inputs of 16 bits are multiplied by the tensor cores as they are, which
is exact; a float32 factor beside a bfloat16 one is split into three bfloat16 parts, which is exact too.

Letters: M, N rows and columns of the result, K the inner dimension, S matrices in the batch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .backend import INTERPRETED, cdiv, full_precision, jit, launch, tl, uses_triton

__all__ = ["gram", "gram_shape", "matmul", "product_shapes", "side_to_factor"]

Shape = dict[str, Any]  # a program's tile of the result, its step along the inner dimension, its warps and its products

# Three TF32 products, or six of bfloat16, are as exact as one in IEEE float32. They are faster where tensor cores run
# TF32 at several times the rate of float32, which is the case on A100, H100 and B200 but not on GeForce cards
IEEE: Shape = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "PRECISION": "ieee"}
TF32: Shape = {**IEEE, "PRECISION": "tf32x3"}
GROUPED: Shape = {**TF32, "BLOCK_K": 32}  # for tensor cores that take whole warp groups
# On Hopper, the fastest of those that were timed on an H100: the largest of which there is one for each multiprocessor
WIDE: Shape = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "PRECISION": "bf16x6"}
SQUARE: Shape = {**GROUPED, "PRECISION": "bf16x6"}
NARROW: Shape = {**GROUPED, "BLOCK_M": 32}
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)

UNCUT = 768  # an inner dimension shorter than this is not cut into parts: adding them up would take a launch
LEAST_PART, PROGRAMS = 128, 4  # length of a part, and the most programs for a multiprocessor
ADDED_UP = 4096  # products that torch is to add up in one sum: on a CPU it does so one by one, and rounding errors grow


def product_shapes(capability: tuple[int, int]) -> tuple[Shape, ...]:
    """Shapes of a product's programs on a GPU of this capability, the largest first."""
    if capability == HOPPER:
        return WIDE, SQUARE, NARROW
    return ({AMPERE: TF32, BLACKWELL: GROUPED}.get(capability, IEEE),)


def gram_shape(capability: tuple[int, int]) -> Shape:
    """The same for a Gram matrix, whose tiles are square; as many as occupy the GPU share the inner dimension."""
    if capability == HOPPER:
        return SQUARE
    return {AMPERE: TF32, BLACKWELL: GROUPED}.get(capability, {**IEEE, "num_warps": 8})


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    """(0, 0) for all but NVIDIA's GPUs; AMD numbers its own in another way."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" and not torch.version.hip else (0, 0)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@jit
def _split(b_x):
    """Three bfloat16 tiles whose sum is the float32 tile, if it is finite: its 24 digits are three times 8."""
    b_upper = b_x.to(tl.bfloat16)
    b_rest = b_x - b_upper.to(tl.float32)
    b_middle = b_rest.to(tl.bfloat16)
    return b_upper, b_middle, (b_rest - b_middle.to(tl.float32)).to(tl.bfloat16)


@jit
def _dot(b_a, b_b, b_out, PRECISION: tl.constexpr, HALVES: tl.constexpr):
    """b_out + b_a @ b_b, as exact as in float32; without HALVES, no product takes tiles of 16 bits."""
    if HALVES and b_a.dtype == b_b.dtype and b_a.dtype != tl.float32:
        return tl.dot(b_a, b_b, b_out)
    if HALVES and b_a.dtype == tl.bfloat16:
        b_upper, b_middle, b_lower = _split(b_b.to(tl.float32))
        return tl.dot(b_a, b_upper, tl.dot(b_a, b_middle, tl.dot(b_a, b_lower, b_out)))
    if HALVES and b_b.dtype == tl.bfloat16:
        b_upper, b_middle, b_lower = _split(b_a.to(tl.float32))
        return tl.dot(b_upper, b_b, tl.dot(b_middle, b_b, tl.dot(b_lower, b_b, b_out)))
    return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_out, input_precision=PRECISION)


@jit
def _matmul_kernel(
    a,  # pointer to A [S, M, K]
    b,  # pointer to B [S, K, N]
    scale,  # pointer to [S, M]; rows of the result are multiplied by it
    out,  # pointer to [S, M, N], contiguous, of any floating dtype
    M,
    N,
    K,
    stride_as,
    stride_am,
    stride_ak,
    stride_bs,
    stride_bk,
    stride_bn,
    stride_ss,
    stride_sm,
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
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
        b_a = tl.load(p_a, mask=m_m[:, None] & m_k[None, :], other=0.0)
        b_b = tl.load(p_b, mask=m_k[:, None] & m_n[None, :], other=0.0)
        b_out = _dot(b_a, b_b, b_out, PRECISION, HALVES)
    if SCALED:
        b_out *= tl.load(scale + i_s * stride_ss + o_m * stride_sm, mask=m_m, other=0.0)[:, None]
    p_out = out + i_s * M * N + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@jit
def _store_gram(out, c, info, times, b_out, o_i, o_j, N, IDENTITY: tl.constexpr, CHECKED: tl.constexpr):
    """Store a tile of the lower triangle, times c and a number, and its mirror image; both tiles are square."""
    b_out *= tl.load(c) * times
    if CHECKED:
        b_out = tl.where(tl.load(info) > 0, float("nan"), b_out)
    if IDENTITY:
        b_out += (o_i[:, None] == o_j[None, :]).to(tl.float32)
    # on the diagonal an element and its mirror image may be rounded differently: the lower one counts
    b_out = tl.where(o_i[:, None] >= o_j[None, :], b_out, tl.trans(b_out))
    m_i, m_j = o_i < N, o_j < N
    tl.store(out + o_i[:, None] * N + o_j[None, :], b_out, mask=m_i[:, None] & m_j[None, :])
    tl.store(out + o_j[:, None] * N + o_i[None, :], tl.trans(b_out), mask=m_j[:, None] & m_i[None, :])


@jit
def _gram_kernel(
    y,  # pointer to Y [S, N, K]
    c,  # pointer to [S]
    info,  # pointer to int32 [S]: where it is positive, the result is NaN
    out,  # pointer to [S, N, N], contiguous; or to the lower triangles of [parts, S, N, N], which _total_kernel adds up
    times,
    N,
    K,
    part,  # of the inner dimension, for each program
    stride_ys,
    stride_yn,
    stride_yk,
    IDENTITY: tl.constexpr,
    CHECKED: tl.constexpr,  # whether info counts
    WHOLE: tl.constexpr,  # one part is all
    PRECISION: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # one tile of the lower triangle
    num_columns = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(N, BLOCK_M) * num_columns
    i_s = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_row = tl.program_id(0) // num_columns % tl.cdiv(N, BLOCK_M)
    i_column = tl.program_id(0) % num_columns
    if i_column * BLOCK_N >= (i_row + 1) * BLOCK_M:
        return
    o_i = i_row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    o_j = i_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    m_i, m_j = o_i < N, o_j < N
    b_out = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, K)
    for start in range(begin, end, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < end
        p_i = y + i_s * stride_ys + o_i[:, None] * stride_yn + o_k[None, :] * stride_yk
        p_j = y + i_s * stride_ys + o_k[:, None] * stride_yk + o_j[None, :] * stride_yn
        b_i = tl.load(p_i, mask=m_i[:, None] & m_k[None, :], other=0.0)
        b_j = tl.load(p_j, mask=m_k[:, None] & m_j[None, :], other=0.0)
        b_out = _dot(b_i, b_j, b_out, PRECISION, HALVES)
    if WHOLE:
        _store_gram(out + i_s * N * N, c + i_s, info + i_s, times, b_out, o_i, o_j, N, IDENTITY, CHECKED)
    else:
        i_part = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // num_tiles) + i_s
        p_out = out + i_part * N * N + o_i[:, None] * N + o_j[None, :]
        tl.store(p_out, b_out, mask=m_i[:, None] & m_j[None, :])


@jit
def _total_kernel(
    parts,  # pointer to [P, S, N, N], of which tiles of the lower triangles are read
    c,  # pointer to [S]
    info,  # pointer to int32 [S]
    out,  # pointer to [S, N, N], contiguous
    times,
    N,
    P,
    IDENTITY: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    num_blocks = tl.cdiv(N, BLOCK_N)
    num_tiles = num_blocks * num_blocks
    i_s = (tl.program_id(0) // num_tiles).to(tl.int64)
    i_row, i_column = tl.program_id(0) // num_blocks % num_blocks, tl.program_id(0) % num_blocks
    if i_column > i_row:
        return
    o_i = i_row * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    o_j = i_column * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    m = (o_i < N)[:, None] & (o_j < N)[None, :]
    p_part = parts + i_s * N * N + o_i[:, None] * N + o_j[None, :]
    b_out = tl.zeros([BLOCK_N, BLOCK_N], dtype=tl.float32)
    for _ in range(P):
        b_out += tl.load(p_part, mask=m, other=0.0)
        p_part += (tl.num_programs(0) // num_tiles).to(tl.int64) * N * N
    _store_gram(out + i_s * N * N, c + i_s, info + i_s, times, b_out, o_i, o_j, N, IDENTITY, CHECKED)


def matmul(a: Tensor, b: Tensor, scale: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """`scale[..., None] * (a @ b)` in float32, rounded to `dtype` at the end.

    Args:
        a: [S, M, K], float32, bfloat16 or float16, any strides; float64 is multiplied in float64.
        b: [S, K, N], of the same dtypes, any strides.
        scale: [S, M], float32, any strides; None scales nothing.
        dtype: of the result; None leaves it in float32 (float64).

    Returns:
        [S, M, N].
    """
    if not uses_triton(a):
        with full_precision(a.device):
            exact = torch.float64 if a.dtype == torch.float64 else torch.float32
            out = a.to(exact) @ b.to(exact)
            out = out if scale is None else out.mul_(scale[..., None])
            return out.to(dtype or exact)
    batch, rows, inner = a.shape
    columns = b.shape[-1]
    out = torch.empty((batch, rows, columns), dtype=dtype or torch.float32, device=a.device)
    for shape in product_shapes(_capability(a.device)):
        programs = batch * cdiv(rows, shape["BLOCK_M"]) * cdiv(columns, shape["BLOCK_N"])
        if programs >= _multiprocessors(a.device):
            break
    launch(
        _matmul_kernel, (programs,), a, b, out if scale is None else scale, out,
        rows, columns, inner, *a.stride(), *b.stride(), *((0, 0) if scale is None else scale.stride()),
        SCALED=scale is not None, HALVES=not INTERPRETED, **shape,
    )  # fmt: skip
    return out


def gram(
    y: Tensor,
    c: Tensor,
    *,
    times: float = 1.0,
    identity: bool = False,
    info: Tensor | None = None,
    side: int | None = None,
) -> Tensor:
    """`times * c * y @ yᵀ` in float32, optionally plus the identity.

    Args:
        y: [S, N, K], float32, bfloat16 or float16, any strides; float64 is multiplied in float64.
        c: [S], float32.
        times: a number; another one compiles no other kernel.
        identity: whether to add the identity.
        info: int32 [S]; a matrix is NaN where it is positive. None checks nothing.
        side: for a matrix that is factored next, `side_to_factor(N, y)`: torch continues it by the identity up to this
            side, and leaves blocks below the diagonal undefined. The identity must be added.

    Returns:
        [S, N, N], exactly symmetric.
    """
    if not uses_triton(y):
        return _torch_gram(y, c, times, identity, info, side or y.shape[1], mirrored=side is None)
    batch, size, inner = y.shape
    shape = gram_shape(_capability(y.device))
    blocks = cdiv(size, shape["BLOCK_M"])
    parts = _parts_of(batch * blocks * (blocks + 1) // 2, inner, y.device)
    part = cdiv(cdiv(inner, parts), shape["BLOCK_K"]) * shape["BLOCK_K"]
    out = torch.empty((batch, size, size), dtype=torch.float32, device=y.device)
    found = out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=y.device)
    c, checked = c.contiguous(), info is not None
    of_result = c if info is None else info
    launch(
        _gram_kernel, (batch * blocks**2, parts), y, c, of_result, found, times,
        size, inner, part, *y.stride(),
        IDENTITY=identity, CHECKED=checked, WHOLE=parts == 1, HALVES=not INTERPRETED, **shape,
    )  # fmt: skip
    if parts > 1:
        launch(
            _total_kernel, (batch * cdiv(size, 32) ** 2,), found, c, of_result, out, times, size, parts,
            IDENTITY=identity, CHECKED=checked, BLOCK_N=32,
        )  # fmt: skip
    return out


def _parts_of(programs: int, inner: int, device: torch.device) -> int:
    """Into how many parts to cut the inner dimension, so that a few tiles occupy the whole GPU."""
    most = 1 if inner < UNCUT else inner // LEAST_PART
    return max(1, min(PROGRAMS * _multiprocessors(device) // max(programs, 1), most))


def side_to_factor(size: int, like: Tensor) -> int:
    """Side of the matrix in place of one of side `size` on the device of `like`, so that it is factored fast.

    A CPU needs up to twice the time for long columns that lie a multiple of 1,024 bytes apart, as they share lines of
    its cache.
    """
    return size + 8 if size > 128 and size % 128 == 0 and like.device.type == "cpu" and not uses_triton(like) else size


def _torch_gram(
    y: Tensor, c: Tensor, times: float, identity: bool, info: Tensor | None, side: int, mirrored: bool
) -> Tensor:
    """The same in torch."""
    y = y.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
    with full_precision(y.device):
        out = _blocks_of_gram(y[..., :ADDED_UP], c, times, side, mirrored)
        for start in range(ADDED_UP, y.shape[2], ADDED_UP):
            out += _blocks_of_gram(y[..., start : start + ADDED_UP], c, times, side, mirrored)
    if identity:
        out.diagonal(dim1=-2, dim2=-1).add_(1)
    return out if info is None else out.masked_fill_((info > 0)[:, None, None], float("nan"))


def _blocks_of_gram(y: Tensor, c: Tensor, times: float, side: int, mirrored: bool) -> Tensor:
    """Torch has no symmetric product, so blocks below the diagonal are mirror images, or undefined."""
    batch, size, _ = y.shape
    out = y.new_empty((batch, side, side))
    if side > size:
        out[:, :, size:].zero_()
    threads = torch.get_num_threads()
    # threads that take turns at a batch are slow to write into parts of its matrices
    alike = batch == 1 or (batch > 1 and threads == 1 and c.stride() == (0,))
    number = c[0].item() * times if alike and y.device.type == "cpu" else None
    # fewer rows would leave a CPU's units idle, more would compute too much twice; threads share those of one matrix
    rows = min(max(size // 8, 64 * threads if batch == 1 else 64), 128)
    for start in range(0, size, rows):
        stop = min(start + rows, size)
        block = out[:, :stop, start:stop]
        if number is None:
            torch.mul(y[:, :stop] @ y[:, start:stop].mT, (c * times)[:, None, None], out=block)
        else:
            torch.baddbmm(block, y[:, :stop], y[:, start:stop].mT, beta=0, alpha=number, out=block)
        if mirrored and start:
            out[:, start:stop, :start] = block[:, :start].mT
    return out
