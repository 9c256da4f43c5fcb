"""Rows of features less their mean, weighted or not, without losing what differs between rows that hardly differ."""

from __future__ import annotations

import torch
from torch import Tensor

from .backend import cdiv, jit, launch, tl, uses_triton, widest
from .matmul import matmul

__all__ = ["centered", "exact_dtype", "is_empty", "root_of", "rows_of", "torch_rows", "weighted_moments"]

BLOCKS = {"BLOCK_B": 32, "BLOCK_D": 64}
# The fastest of eleven shapes on an H100: few columns for each program, and many rows at a time, since their loads do
# not wait for each other. The sums of more rows are a launch of their own
COLUMNS = {"BLOCK_B": 256, "BLOCK_D": 8, "num_warps": 8}
ONE_PASS = 4096


def exact_dtype(z: Tensor) -> torch.dtype:
    """Dtype of the computation."""
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def is_empty(mass: Tensor) -> Tensor:
    """Whether a class has (almost) no members: division by a smaller mass would overflow."""
    return mass < torch.finfo(mass.dtype).tiny * 2**40


LEAST_ROOT = 2**-64  # rows of weight 0 have a gradient too, and a weight of 2⁻¹²⁸ does not change I + c ZᵀZ


def root_of(weights: Tensor) -> Tensor:
    """√w, but never zero."""
    return weights.sqrt().clamp(min=LEAST_ROOT)


@jit
def _load(z, i_s, o_b, o_d, B, d, stride_zs, stride_zb, stride_zd):
    p_z = z + i_s * stride_zs + o_b[:, None] * stride_zb + o_d[None, :] * stride_zd
    return tl.load(p_z, mask=(o_b < B)[:, None] & (o_d < d)[None, :], other=0.0)


@jit
def _sums_kernel(
    z,  # pointer to Z [S, B, d]
    sums,  # pointer to float64 [S, parts, d]
    B,
    d,
    stride_zs,
    stride_zb,
    stride_zd,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_part, parts = tl.program_id(1), tl.num_programs(1)
    columns = tl.cdiv(d, BLOCK_D)
    i_s = (tl.program_id(0) // columns).to(tl.int64)
    o_d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    b_sum = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float64)
    for start in range(i_part * BLOCK_B, B, parts * BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b_sum += _load(z, i_s, o_b, o_d, B, d, stride_zs, stride_zb, stride_zd).to(tl.float64)
    tl.store(sums + (i_s * parts + i_part) * d + o_d, b_sum.sum(axis=0), mask=o_d < d)


@jit
def _less(b_z, b_mean):
    """Rows less their float64 mean, in float32, of whose digits none is lost."""
    b_upper = b_mean.to(tl.float32)
    return b_z.to(tl.float32) - b_upper[None, :] - (b_mean - b_upper.to(tl.float64)).to(tl.float32)[None, :]


@jit
def _centered_kernel(
    z,  # pointer to Z [S, B, d]
    y,  # pointer to Z - mean [S, B, d], contiguous
    mean,  # pointer to float64 [S, d], which is written
    B,
    d,
    stride_zs,
    stride_zb,
    stride_zd,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.cdiv(d, BLOCK_D)
    i_s = (tl.program_id(0) // columns).to(tl.int64)
    o_d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    b_sum = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float64)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b_sum += _load(z, i_s, o_b, o_d, B, d, stride_zs, stride_zb, stride_zd).to(tl.float64)
    b_mean = b_sum.sum(axis=0) / B
    tl.store(mean + i_s * d + o_d, b_mean, mask=o_d < d)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B).to(tl.int64)
        b_y = _less(_load(z, i_s, o_b, o_d, B, d, stride_zs, stride_zb, stride_zd), b_mean)
        tl.store(y + (i_s * B + o_b[:, None]) * d + o_d[None, :], b_y, mask=(o_b < B)[:, None] & (o_d < d)[None, :])


@jit
def _rows_kernel(
    z,  # pointer to Z [S, B, d]
    sums,  # pointer to float64 [S, parts, d]; their sum over `count` is the mean
    weights,  # pointer to [S, B], contiguous
    y,  # pointer to diag(√w) (Z - mean) [S, B, d], contiguous
    mean,  # pointer to float64 [S, d], which is written
    B,
    d,
    parts,
    count,
    stride_zs,
    stride_zb,
    stride_zd,
    CENTER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    MEAN: tl.constexpr,  # whether to write the mean
    ROOT: tl.constexpr,  # the least √w
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns, rows = tl.cdiv(d, BLOCK_D), tl.cdiv(B, BLOCK_B)
    i_s = (tl.program_id(0) // (columns * rows)).to(tl.int64)
    i_row = tl.program_id(0) // columns % rows
    o_b = i_row * BLOCK_B + tl.arange(0, BLOCK_B).to(tl.int64)
    o_d = tl.program_id(0) % columns * BLOCK_D + tl.arange(0, BLOCK_D).to(tl.int64)
    b_y = _load(z, i_s, o_b, o_d, B, d, stride_zs, stride_zb, stride_zd).to(tl.float32)
    if CENTER:
        b_mean = tl.zeros([BLOCK_D], dtype=tl.float64)
        for i_part in range(parts):
            b_mean += tl.load(sums + (i_s * parts + i_part) * d + o_d, mask=o_d < d, other=0.0)
        b_mean /= count
        b_y = _less(b_y, b_mean)
        if MEAN:
            tl.store(mean + i_s * d + o_d, b_mean, mask=(o_d < d) & (i_row == 0))
    if WEIGHTED:
        b_weights = tl.load(weights + i_s * B + o_b, mask=o_b < B, other=0.0)
        b_y *= tl.maximum(tl.sqrt(b_weights), ROOT)[:, None]
    tl.store(y + (i_s * B + o_b[:, None]) * d + o_d[None, :], b_y, mask=(o_b < B)[:, None] & (o_d < d)[None, :])


def _launch_rows(z: Tensor, sums: Tensor, weights: Tensor, center: bool, count: int, mean: Tensor | None) -> Tensor:
    batch, rows, width = z.shape
    y = torch.empty(z.shape, dtype=torch.float32, device=z.device)
    programs = batch * cdiv(rows, BLOCKS["BLOCK_B"]) * cdiv(width, BLOCKS["BLOCK_D"])
    launch(
        _rows_kernel, (programs,), z, sums, weights.contiguous(), y, sums if mean is None else mean,
        rows, width, sums.shape[1], count, *z.stride(),
        CENTER=center, WEIGHTED=weights.numel() > 0, MEAN=mean is not None, ROOT=LEAST_ROOT, **BLOCKS,
    )  # fmt: skip
    return y


def rows_of(z: Tensor, weights: Tensor, center: bool, mean: Tensor) -> Tensor:
    """diag(√w) (Z - mean) [S, B, d]; `mean` is float64 [S, d], `weights` are [S, B] or empty.

    If rows hardly differ, rounding the mean to float32 would lose their differences, so the rest is subtracted as well.
    """
    if uses_triton(z):
        if not center and not weights.numel():
            return z  # products take any dtype
        return _launch_rows(z, mean[:, None], weights, center, 1, None)
    return torch_rows(z, weights, center, mean)


def torch_rows(z: Tensor, weights: Tensor, center: bool, mean: Tensor) -> Tensor:
    y = z.to(exact_dtype(z))
    if center:
        upper = mean.to(y.dtype)
        y = y - upper[:, None]
        if y.dtype != mean.dtype:
            y -= (mean - upper).to(y.dtype)[:, None]
    return y * root_of(weights)[..., None] if weights.numel() else y


def centered(z: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Rows less their mean, [S, B, d], and the mean [S, d] in the device's widest dtype; zero without centring."""
    batch, rows, width = z.shape
    if not center or not rows:  # one of several processes may have no rows
        mean = z.new_zeros((batch, width), dtype=widest(z.device))
        return rows_of(z, mean.new_empty(0), False, mean), mean
    if uses_triton(z):
        mean = z.new_empty((batch, width), dtype=torch.float64)
        if rows <= ONE_PASS:
            y = z.new_empty(z.shape, dtype=torch.float32)
            programs = batch * cdiv(width, COLUMNS["BLOCK_D"])
            launch(_centered_kernel, (programs,), z, y, mean, rows, width, *z.stride(), **COLUMNS)
            return y, mean
        parts = min(cdiv(rows, 4 * BLOCKS["BLOCK_B"]), 16)
        sums = z.new_empty((batch, parts, width), dtype=torch.float64)
        programs = batch * cdiv(width, BLOCKS["BLOCK_D"])
        launch(_sums_kernel, (programs, parts), z, sums, rows, width, *z.stride(), **BLOCKS)
        return _launch_rows(z, sums, sums.new_empty(0), True, rows, mean), mean
    y = z.to(exact_dtype(z))
    mean = y.mean(-2)
    y = y - mean[:, None]
    rest = y.mean(-2)  # of which float32 has lost the last digits, but y has not
    return y.sub_(rest[:, None]), mean.to(widest(z.device)) + rest


def weighted_moments(z: Tensor, weights: Tensor, center: bool) -> tuple[Tensor, Tensor]:
    """Weighted mean [S, d], in the device's widest dtype (zero without centring), and the sum of the weights [S]."""
    mass = weights.sum(-1)
    if not center:
        return z.new_zeros((z.shape[0], z.shape[2]), dtype=widest(z.device)), mass
    _, mean = centered(z, True)
    # products are rounded, so rows are shifted towards zero before: to the mean of their class, then to its last digits
    for _ in range(2):
        shift = matmul(weights[:, None], rows_of(z, weights.new_empty(0), True, mean))[:, 0]
        mean = mean + torch.where(is_empty(mass)[:, None], 0.0, shift / mass[:, None])
    return mean, mass
