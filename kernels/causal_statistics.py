"""Token-statistics attention in which a token sees the statistics of itself and of the tokens before it.

The formulas are those of `token_statistics`, with sums over the earlier tokens in place of sums over all. A program
walks through the tokens of a sequence in chunks: forward they are read and written once; backward, from the last chunk
to the first, tokens and gradient are read once. Kept for backward are the tokens and the sums before each chunk.

Source: Token Statistics Transformer (arXiv 2412.17810), the causal form of its TSSA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .internal.backend import jit, launch, tl, uses_triton
from .internal.tokens import FLOOR, SMALLEST, attention_of, blocks, channel_offsets, tile_offsets

__all__ = ["causal_statistics_attention"]

LEAST = 4  # tokens of a chunk, so that what is kept for each chunk stays small beside the tokens


@jit
def _statistics(
    b_w, b_moment, b_total, b_second, b_temperature, m_row, m_h, SMALLEST: tl.constexpr, FLOOR: tl.constexpr
):
    """Statistics of the tokens [BLOCK_N, BLOCK_H, BLOCK_P] of a chunk, given the sums before it.

    Moments, scores before the temperature, weights, sums of the weights, and S.
    """
    b_square = b_w * b_w
    b_moments = tl.maximum(b_moment[None] + tl.cumsum(b_square, axis=0), SMALLEST)
    b_raw = (b_square / b_moments).sum(axis=2)
    b_score = tl.where(m_h[None, :], b_raw * b_temperature[None, :], float("-inf"))
    b_weight = tl.exp(b_score - b_score.max(axis=1)[:, None])
    b_weight = tl.where(m_row, b_weight / b_weight.sum(axis=1)[:, None], 0.0)
    b_totals = b_total[None] + tl.cumsum(b_weight, axis=0) + FLOOR
    b_seconds = b_second[None] + tl.cumsum(b_weight[:, :, None] * b_square, axis=0)
    return b_moments, b_raw, b_weight, b_totals, b_seconds / b_totals[:, :, None]


@jit
def _causal_kernel(
    w,  # pointer to tokens [B, N, H, P], contiguous
    temperature,  # pointer to float32 [H]
    y,  # pointer to [B, N, H, P]
    sums,  # pointer to float32 [B, chunks, 2, H, P]: squares and weighted squares, summed over the tokens before
    totals,  # pointer to float32 [B, chunks, H]: weights, likewise
    N,
    H,
    P,
    SMALLEST: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    w += i_b * N * H * P
    y += i_b * N * H * P
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_temperature = tl.load(temperature + o_h, mask=m_h, other=0.0)
    b_moment = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    b_second = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    b_total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_c in range(chunks):
        o_sum = (i_b * chunks + i_c) * 2 * H * P + o_c
        tl.store(sums + o_sum, b_moment, mask=m_c)
        tl.store(sums + o_sum + H * P, b_second, mask=m_c)
        tl.store(totals + (i_b * chunks + i_c) * H + o_h, b_total, mask=m_h)
        _, m_row, o, m = tile_offsets(i_c * BLOCK_N, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
        b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
        _, _, b_weight, _, b_s = _statistics(
            b_w, b_moment, b_total, b_second, b_temperature, m_row, m_h, SMALLEST, FLOOR
        )
        tl.store(y + o, -b_w * b_weight[:, :, None] / (1.0 + b_s), mask=m)
        b_moment += (b_w * b_w).sum(axis=0)
        b_second += (b_weight[:, :, None] * b_w * b_w).sum(axis=0)
        b_total += b_weight.sum(axis=0)


@jit
def _causal_gradient_kernel(
    grad,  # pointer to the gradient w.r.t. the output [B, N, H, P], contiguous
    w,  # pointer to tokens [B, N, H, P]
    temperature,  # pointer to float32 [H]
    sums,  # pointer to float32 [B, chunks, 2, H, P]
    totals,  # pointer to float32 [B, chunks, H]
    out,  # pointer to the gradient w.r.t. the tokens [B, N, H, P]
    of_temperature,  # pointer to float32 [B, H]
    N,
    H,
    P,
    SMALLEST: tl.constexpr,
    FLOOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, chunks = tl.program_id(0).to(tl.int64), tl.cdiv(N, BLOCK_N)
    grad += i_b * N * H * P
    w += i_b * N * H * P
    out += i_b * N * H * P
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    o_h = tl.arange(0, BLOCK_H)
    m_h = o_h < H
    b_temperature = tl.load(temperature + o_h, mask=m_h, other=0.0)
    # gradients that arrive from later chunks, w.r.t. the moments, the weighted squares and the sums of the weights
    b_of_moment = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    b_of_second = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    b_of_total = tl.zeros([BLOCK_H], dtype=tl.float32)
    b_of_temperature = tl.zeros([BLOCK_H], dtype=tl.float32)
    for i_back in range(chunks):
        i_c = chunks - 1 - i_back
        o_sum = (i_b * chunks + i_c) * 2 * H * P + o_c
        b_moment = tl.load(sums + o_sum, mask=m_c, other=0.0)
        b_second = tl.load(sums + o_sum + H * P, mask=m_c, other=0.0)
        b_total = tl.load(totals + (i_b * chunks + i_c) * H + o_h, mask=m_h, other=0.0)
        _, m_row, o, m = tile_offsets(i_c * BLOCK_N, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
        b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
        b_moments, b_raw, b_weight, b_totals, b_s = _statistics(
            b_w, b_moment, b_total, b_second, b_temperature, m_row, m_h, SMALLEST, FLOOR
        )
        b_square = b_w * b_w
        b_scaled = tl.load(grad + o, mask=m, other=0.0).to(tl.float32) / (1.0 + b_s)
        b_product = b_scaled * b_w
        # S = weighted squares / sum of weights
        b_of_seconds = b_product * b_weight[:, :, None] / ((1.0 + b_s) * b_totals[:, :, None])
        b_of_totals = -(b_of_seconds * b_s).sum(axis=2)
        b_later = b_of_second[None] + tl.cumsum(b_of_seconds, axis=0, reverse=True)
        b_of_weight = (b_later * b_square - b_product).sum(axis=2)
        b_of_weight += b_of_total[None] + tl.cumsum(b_of_totals, axis=0, reverse=True)
        b_of_score = b_weight * (b_of_weight - (b_weight * b_of_weight).sum(axis=1)[:, None])
        b_rate = (b_of_score * b_temperature[None])[:, :, None] / b_moments
        b_of_moments = tl.where(b_moments > SMALLEST, -b_rate * b_square / b_moments, 0.0)
        b_slope = b_later * b_weight[:, :, None] + b_rate
        b_slope += b_of_moment[None] + tl.cumsum(b_of_moments, axis=0, reverse=True)
        tl.store(out + o, 2.0 * b_w * b_slope - b_scaled * b_weight[:, :, None], mask=m)
        b_of_moment += b_of_moments.sum(axis=0)
        b_of_second += b_of_seconds.sum(axis=0)
        b_of_total += b_of_totals.sum(axis=0)
        b_of_temperature += (b_of_score * b_raw).sum(axis=0)
    tl.store(of_temperature + i_b * H + o_h, b_of_temperature, mask=m_h)


def plan(heads: int, width: int) -> tuple[dict[str, int], dict[str, int]]:
    """Blocks and options of both kernels; 8 numbers of each tile for a thread, more of which would spill."""
    sizes = blocks(heads, width, LEAST)
    tile = sizes["BLOCK_N"] * sizes["BLOCK_H"] * sizes["BLOCK_P"]
    return sizes, {"num_warps": min(16, max(1, tile // 256))}


def _chunks(w: Tensor) -> tuple[int, int]:
    """Tokens of a chunk, and the number of chunks."""
    tokens = blocks(w.shape[2], w.shape[3], LEAST)["BLOCK_N"]
    return tokens, -(-w.shape[1] // tokens)


def _totals(w: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """In torch, of all tokens at once: sums of squares, scores, weights, and sums of these and of weighted squares."""
    squares = w.square()
    moments = squares.cumsum(1)
    raw = (squares / moments.clamp(min=SMALLEST)).sum(-1)
    weights = (raw * temperature).softmax(-1)
    totals = weights.cumsum(1)
    seconds = squares.mul_(weights[..., None]).cumsum(1)
    return moments, raw, weights, totals, seconds


@torch.library.custom_op(add_op_namespace_prefix("causal_statistics"), mutates_args=())
def _forward(w: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, N, h, p], and sums over the tokens before each chunk: of squares, weighted and not, and of weights.

    These are [B, chunks, 2, h, p] and [B, chunks, h], of the dtype of the temperature [h]: float32, or float64 if w is.
    """
    w = w.contiguous()
    size, chunks = _chunks(w)
    if not uses_triton(w):
        x = w.to(temperature.dtype)
        moments, _, weights, totals, seconds = _totals(x, temperature)
        y = -x * weights[..., None] / (1 + seconds / (totals + FLOOR)[..., None])
        before = slice(size - 1, -1, size)
        moments, seconds_before, totals_before = (
            F.pad(sums[:, before].movedim(1, -1), (1, 0)).movedim(-1, 1) for sums in (moments, seconds, totals)
        )
        return y.to(w.dtype), torch.stack([moments, seconds_before], 2), totals_before
    y = torch.empty_like(w)
    sums = w.new_empty((len(w), chunks, 2, *w.shape[2:]), dtype=torch.float32)
    totals = w.new_empty((len(w), chunks, w.shape[2]), dtype=torch.float32)
    sizes, options = plan(*w.shape[2:])
    launch(
        _causal_kernel, (len(w),), w, temperature, y, sums, totals, *w.shape[1:],
        SMALLEST=SMALLEST, FLOOR=FLOOR, **sizes, **options,
    )  # fmt: skip
    return y, sums, totals


@_forward.register_fake
def _(w, temperature):
    batch, _, heads, width = w.shape
    chunks = _chunks(w)[1]
    y = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    shapes = ((batch, chunks, 2, heads, width), (batch, chunks, heads))
    return y, *(w.new_empty(shape, dtype=temperature.dtype) for shape in shapes)


@torch.library.custom_op(add_op_namespace_prefix("causal_statistics_backward"), mutates_args=())
def _backward(grad: Tensor, w: Tensor, temperature: Tensor, sums: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients w.r.t. w, and w.r.t. the temperature for each batch, [B, h]."""
    w, grad = w.contiguous(), grad.contiguous()
    if not uses_triton(w):
        x, scaled = w.to(temperature.dtype), grad.to(temperature.dtype)
        moments, raw, weights, totals, seconds = _totals(x, temperature)
        moments.clamp_(min=SMALLEST)
        totals, shares = (totals + FLOOR)[..., None], weights[..., None]
        gains = 1 / (1 + seconds.div_(totals))
        scaled = scaled * gains
        products = scaled * x
        of_seconds = products * shares * gains / totals
        of_totals = _later(-(of_seconds * seconds).sum(-1))
        of_seconds, squares = _later(of_seconds), x.square()
        of_weights = (of_seconds * squares).sub_(products).sum(-1) + of_totals
        of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True))
        rates = (of_scores * temperature)[..., None] / moments
        of_moments = _later(torch.where(moments > SMALLEST, -rates * squares / moments, 0.0))
        slopes = of_seconds.mul_(shares).add_(rates).add_(of_moments)
        out = slopes.mul_(x).mul_(2).sub_(scaled.mul_(shares))
        return out.to(w.dtype), (of_scores * raw).sum(1)
    out = torch.empty_like(w)
    of_temperature = w.new_empty((len(w), w.shape[2]), dtype=torch.float32)
    sizes, options = plan(*w.shape[2:])
    launch(
        _causal_gradient_kernel, (len(w),), grad, w, temperature, sums, totals, out, of_temperature, *w.shape[1:],
        SMALLEST=SMALLEST, FLOOR=FLOOR, **sizes, **options,
    )  # fmt: skip
    return out, of_temperature


def _later(x: Tensor) -> Tensor:
    """Sums over each token and those after it."""
    return x.flip(1).cumsum(1).flip(1)


_attention = attention_of(_forward, _backward)


def causal_statistics_attention(w: Tensor, temperature: Tensor) -> Tensor:
    """`token_statistics_attention` with `causal=True`, which checks the arguments."""
    return _attention(w, temperature)[0]
