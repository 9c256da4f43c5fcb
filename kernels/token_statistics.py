"""Token-statistics attention (ToST): every token is weighed by second moments of all tokens, in time linear in them.

For tokens w of heads k in channels c, with m_kc = Σ_n w_nkc²,

    Π_nk = softmax over k of τ_k Σ_c w_nkc² / m_kc
    S_kc = Σ_n Π_nk w_nkc² / Σ_n Π_nk
    y_nkc = -w_nkc Π_nk / (1 + S_kc)

Nothing of size N x N is made. Forward, the tokens are read three times and written once (moments, weights, output);
backward needs the tokens, Π, and a few numbers for each channel, so that it keeps about as much as its input.

Source: Token Statistics Transformer (arXiv 2412.17810), its TSSA; the order of the operations is that of its code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .causal_statistics import causal_statistics_attention
from .internal.backend import cdiv, jit, launch, tl, uses_triton
from .internal.checks import check_tensors
from .internal.tokens import FLOOR, SMALLEST, attention_of, blocks, channel_offsets, tile_offsets

__all__ = ["token_statistics_attention", "token_statistics_reference"]

MOST_SPLITS = 16


def token_statistics_reference(w: Tensor, temperature: Tensor, *, causal: bool = False) -> Tensor:
    """The plain formula, by autograd, for tests and benchmarks; it keeps several tensors of the size of `w`.

    With `causal`, each token sees the moments of itself and of those before it.
    """
    squares = w.square()
    total = (lambda x: x.cumsum(1)) if causal else (lambda x: x.sum(1, keepdim=True))
    scores = (squares / total(squares).clamp(min=SMALLEST)).sum(-1) * temperature
    weights = scores.softmax(-1)[..., None]  # [B, N, h, 1]
    second = total(weights * squares) / (total(weights) + FLOOR)
    return -w * weights / (1 + second)


@jit
def _moments_kernel(
    w,  # pointer to tokens [B, N, H, P], contiguous
    sums,  # pointer to [B, splits, H, P]: squares, summed over a part of the tokens
    N,
    H,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    w += i_b * N * H * P
    b_sum = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    for start in range(i_split * BLOCK_N, N, splits * BLOCK_N):
        _, _, o, m = tile_offsets(start, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
        b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
        b_sum += (b_w * b_w).sum(axis=0)
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    tl.store(sums + (i_b * splits + i_split) * H * P + o_c, b_sum, mask=m_c)


@jit
def _weights_kernel(
    w,  # pointer to tokens [B, N, H, P]
    moments,  # pointer to float32 [B, H, P]
    temperature,  # pointer to float32 [H]
    weights,  # pointer to float32 [B, N, H]
    totals,  # pointer to float32 [B, splits, H]: weights, summed over a part of the tokens
    seconds,  # pointer to float32 [B, splits, H, P]: weighted squares, likewise
    N,
    H,
    P,
    SMALLEST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    w += i_b * N * H * P
    weights += i_b * N * H
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    o_h = tl.arange(0, BLOCK_H)
    b_moment = tl.maximum(tl.load(moments + i_b * H * P + o_c, mask=m_c, other=1.0), SMALLEST)
    b_temperature = tl.load(temperature + o_h, mask=o_h < H, other=0.0)
    b_total = tl.zeros([BLOCK_H], dtype=tl.float32)
    b_second = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    for start in range(i_split * BLOCK_N, N, splits * BLOCK_N):
        o_row, m_row, o, m = tile_offsets(start, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
        b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
        b_square = b_w * b_w
        b_score = (b_square / b_moment[None]).sum(axis=2) * b_temperature[None, :]
        b_score = tl.where((o_h < H)[None, :], b_score, float("-inf"))
        b_weight = tl.exp(b_score - b_score.max(axis=1)[:, None])
        b_weight = b_weight / b_weight.sum(axis=1)[:, None]
        b_weight = tl.where(m_row, b_weight, 0.0)
        tl.store(weights + o_row, b_weight, mask=m_row)
        b_total += b_weight.sum(axis=0)
        b_second += (b_weight[:, :, None] * b_square).sum(axis=0)
    o_part = i_b * splits + i_split
    tl.store(totals + o_part * H + o_h, b_total, mask=o_h < H)
    tl.store(seconds + o_part * H * P + o_c, b_second, mask=m_c)


@jit
def _output_kernel(
    w,  # pointer to tokens [B, N, H, P]
    weights,  # pointer to float32 [B, N, H]
    gains,  # pointer to float32 [B, H, P]: 1 / (1 + S)
    y,  # pointer to [B, N, H, P]
    N,
    H,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    i_b, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_N
    w += i_b * N * H * P
    y += i_b * N * H * P
    weights += i_b * N * H
    o_row, m_row, o, m = tile_offsets(start, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    b_gain = tl.load(gains + i_b * H * P + o_c, mask=m_c, other=0.0)
    b_weight = tl.load(weights + o_row, mask=m_row, other=0.0)
    b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
    tl.store(y + o, -b_w * b_weight[:, :, None] * b_gain[None], mask=m)


@jit
def _products_kernel(
    grad,  # pointer to the gradient w.r.t. the output [B, N, H, P], contiguous
    w,  # pointer to tokens [B, N, H, P]
    weights,  # pointer to float32 [B, N, H]
    sums,  # pointer to float32 [B, splits, H, P]: gradient x token x weight, summed over a part of the tokens
    N,
    H,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    grad += i_b * N * H * P
    w += i_b * N * H * P
    weights += i_b * N * H
    b_sum = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    for start in range(i_split * BLOCK_N, N, splits * BLOCK_N):
        o_row, m_row, o, m = tile_offsets(start, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
        b_weight = tl.load(weights + o_row, mask=m_row, other=0.0)
        b_grad = tl.load(grad + o, mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
        b_sum += (b_grad * b_w * b_weight[:, :, None]).sum(axis=0)
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    tl.store(sums + (i_b * splits + i_split) * H * P + o_c, b_sum, mask=m_c)


@jit
def _scores_gradient_kernel(
    grad,  # pointer to the gradient w.r.t. the output [B, N, H, P]
    w,  # pointer to tokens [B, N, H, P]
    weights,  # pointer to float32 [B, N, H]
    moments,  # pointer to float32 [B, H, P]
    gains,  # pointer to float32 [B, H, P]
    of_second,  # pointer to float32 [B, H, P]: gradient w.r.t. the weighted squares
    of_total,  # pointer to float32 [B, H]: gradient w.r.t. the sum of the weights
    of_score,  # pointer to float32 [B, N, H]: gradient w.r.t. the scores
    squares,  # pointer to float32 [B, splits, H, P]: gradient of a score x square, summed over a part of the tokens
    N,
    H,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_b, i_split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    grad += i_b * N * H * P
    w += i_b * N * H * P
    weights += i_b * N * H
    of_score += i_b * N * H
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    o_h = tl.arange(0, BLOCK_H)
    b_gain = tl.load(gains + i_b * H * P + o_c, mask=m_c, other=0.0)
    b_of_second = tl.load(of_second + i_b * H * P + o_c, mask=m_c, other=0.0)
    b_of_total = tl.load(of_total + i_b * H + o_h, mask=o_h < H, other=0.0)
    b_squares = tl.zeros([BLOCK_H, BLOCK_P], dtype=tl.float32)
    for start in range(i_split * BLOCK_N, N, splits * BLOCK_N):
        o_row, m_row, o, m = tile_offsets(start, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
        b_weight = tl.load(weights + o_row, mask=m_row, other=0.0)
        b_grad = tl.load(grad + o, mask=m, other=0.0).to(tl.float32)
        b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
        b_inner = b_w * (b_w * b_of_second[None] - b_grad * b_gain[None])
        b_of_weight = b_inner.sum(axis=2) + b_of_total[None, :]
        b_mean = (b_weight * b_of_weight).sum(axis=1)
        b_of_score = b_weight * (b_of_weight - b_mean[:, None])
        tl.store(of_score + o_row, b_of_score, mask=m_row)
        b_squares += (b_of_score[:, :, None] * b_w * b_w).sum(axis=0)
    tl.store(squares + (i_b * splits + i_split) * H * P + o_c, b_squares, mask=m_c)


@jit
def _tokens_gradient_kernel(
    grad,  # pointer to the gradient w.r.t. the output [B, N, H, P]
    w,  # pointer to tokens [B, N, H, P]
    weights,  # pointer to float32 [B, N, H]
    of_score,  # pointer to float32 [B, N, H]
    gains,  # pointer to float32 [B, H, P]
    of_second,  # pointer to float32 [B, H, P]
    rates,  # pointer to float32 [B, H, P]: temperature / moment
    of_moment,  # pointer to float32 [B, H, P]
    out,  # pointer to [B, N, H, P]
    N,
    H,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    tiles = tl.cdiv(N, BLOCK_N)
    i_b, start = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK_N
    grad += i_b * N * H * P
    w += i_b * N * H * P
    out += i_b * N * H * P
    weights += i_b * N * H
    of_score += i_b * N * H
    o_row, m_row, o, m = tile_offsets(start, N, H, P, BLOCK_N, BLOCK_H, BLOCK_P)
    o_c, m_c = channel_offsets(H, P, BLOCK_H, BLOCK_P)
    o_c += i_b * H * P
    b_gain = tl.load(gains + o_c, mask=m_c, other=0.0)[None]
    b_of_second = tl.load(of_second + o_c, mask=m_c, other=0.0)[None]
    b_rate = tl.load(rates + o_c, mask=m_c, other=0.0)[None]
    b_of_moment = tl.load(of_moment + o_c, mask=m_c, other=0.0)[None]
    b_weight = tl.load(weights + o_row, mask=m_row, other=0.0)[:, :, None]
    b_of_score = tl.load(of_score + o_row, mask=m_row, other=0.0)[:, :, None]
    b_grad = tl.load(grad + o, mask=m, other=0.0).to(tl.float32)
    b_w = tl.load(w + o, mask=m, other=0.0).to(tl.float32)
    b_slope = b_weight * b_of_second + b_of_score * b_rate + b_of_moment
    tl.store(out + o, 2.0 * b_w * b_slope - b_grad * b_weight * b_gain, mask=m)


def _plan(w: Tensor) -> tuple[dict[str, int], tuple[int, int], tuple[int]]:
    """Blocks, the grid of kernels that sum over tokens, and the grid of those that do not."""
    sizes = blocks(*w.shape[2:])
    tiles = cdiv(w.shape[1], sizes["BLOCK_N"])
    return sizes, (len(w), min(tiles, MOST_SPLITS)), (len(w) * tiles,)  # the second axis takes 65,535 at most


@torch.library.custom_op(add_op_namespace_prefix("token_statistics"), mutates_args=())
def _forward(w: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [B, N, h, p], and for the gradient: Π [B, N, h], m [B, h, p], S [B, h, p] and the sums of Π [B, h].

    The temperature [h] is float32, or float64 if w is.
    """
    w = w.contiguous()
    if not uses_triton(w):
        x = w.to(temperature.dtype)
        squares = x.square()
        moments = squares.sum(1)
        rates = temperature[:, None] / moments.clamp(min=SMALLEST)
        weights = (squares * rates[:, None]).sum(-1).softmax(-1)
        totals = weights.sum(1) + FLOOR
        seconds = squares.mul_(weights[..., None]).sum(1) / totals[..., None]
        y = (x * weights[..., None]).mul_((-1 / (1 + seconds))[:, None])
        return y.to(w.dtype), weights, moments, seconds, totals
    sizes, parts, tiles = _plan(w)
    shape = w.shape[1:]
    channels = w.new_empty((*parts, *shape[1:]), dtype=torch.float32)
    launch(_moments_kernel, parts, w, channels, *shape, **sizes)
    moments = channels.sum(1)
    weights = w.new_empty(w.shape[:3], dtype=torch.float32)
    totals = w.new_empty((*parts, shape[1]), dtype=torch.float32)
    launch(
        _weights_kernel, parts, w, moments, temperature, weights, totals, channels, *shape,
        SMALLEST=SMALLEST, **sizes,
    )  # fmt: skip
    totals = totals.sum(1) + FLOOR
    seconds = channels.sum(1) / totals[..., None]
    y = torch.empty_like(w)
    launch(_output_kernel, tiles, w, weights, 1 / (1 + seconds), y, *shape, **sizes)
    return y, weights, moments, seconds, totals


@_forward.register_fake
def _(w, temperature):
    batch, rows, heads, width = w.shape
    y = torch.empty(w.shape, dtype=w.dtype, device=w.device)
    shapes = ((batch, rows, heads), (batch, heads, width), (batch, heads, width), (batch, heads))
    return y, *(w.new_empty(shape, dtype=temperature.dtype) for shape in shapes)


@torch.library.custom_op(add_op_namespace_prefix("token_statistics_backward"), mutates_args=())
def _backward(
    grad: Tensor,
    w: Tensor,
    temperature: Tensor,
    weights: Tensor,
    moments: Tensor,
    seconds: Tensor,
    totals: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients w.r.t. w, and w.r.t. the temperature for each batch, [B, h]."""
    w, grad, gains = w.contiguous(), grad.contiguous(), 1 / (1 + seconds)
    if not uses_triton(w):
        x, slope = w.to(temperature.dtype), grad.to(temperature.dtype)
        squares, products = x.square(), slope * x
        of_second, of_total = _of_sums((products * weights[..., None]).sum(1), gains, seconds, totals)
        of_weight = (squares * of_second[:, None]).addcmul_(products, gains[:, None], value=-1).sum(-1)
        of_weight += of_total[:, None]
        of_score = weights * (of_weight - (weights * of_weight).sum(-1, keepdim=True))
        of_squares = squares.mul_(of_score[..., None]).sum(1)
        rates, of_moment, of_temperature = _of_moments(of_squares, moments, temperature)
        torch.mul(weights[..., None], of_second[:, None], out=products)
        out = products.addcmul_(of_score[..., None], rates[:, None]).add_(of_moment[:, None]).mul_(x).mul_(2)
        out.addcmul_(torch.mul(slope, weights[..., None], out=squares), gains[:, None], value=-1)
        return out.to(w.dtype), of_temperature
    sizes, parts, tiles = _plan(w)
    shape = w.shape[1:]
    channels = w.new_empty((*parts, *shape[1:]), dtype=torch.float32)
    launch(_products_kernel, parts, grad, w, weights, channels, *shape, **sizes)
    of_second, of_total = _of_sums(channels.sum(1), gains, seconds, totals)
    of_score = torch.empty_like(weights)
    launch(
        _scores_gradient_kernel, parts, grad, w, weights, moments, gains, of_second, of_total, of_score, channels,
        *shape, **sizes,
    )  # fmt: skip
    rates, of_moment, of_temperature = _of_moments(channels.sum(1), moments, temperature)
    out = torch.empty_like(w)
    launch(
        _tokens_gradient_kernel, tiles, grad, w, weights, of_score, gains, of_second, rates, of_moment, out,
        *shape, **sizes,
    )  # fmt: skip
    return out, of_temperature


def _of_sums(products: Tensor, gains: Tensor, seconds: Tensor, totals: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients w.r.t. the weighted squares [B, h, p] and the sums of the weights [B, h]."""
    of_second = gains.square() * products / totals[..., None]
    return of_second, -(of_second * seconds).sum(-1)


def _of_moments(of_squares: Tensor, moments: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Temperature / moment, the gradient w.r.t. the moments, both [B, h, p], and w.r.t. the temperature [B, h]."""
    safe = moments.clamp(min=SMALLEST)
    rates = temperature[:, None] / safe
    of_moment = torch.where(moments > SMALLEST, -of_squares * rates / safe, 0.0)
    return rates, of_moment, (of_squares / safe).sum(-1)


_attention = attention_of(_forward, _backward)


def token_statistics_attention(w: Tensor, temperature: Tensor, *, causal: bool = False) -> Tensor:
    """Token-statistics attention of projected tokens; differentiable once.

    The sign of a token changes no other token's output. Permuting tokens permutes the output, unless `causal`.

    Args:
        w: tokens in the subspaces of the heads, [B, N, h, p], bfloat16, float16, float32 or float64, any strides.
            Computed in float32 (float64 for float64).
        temperature: [h], floating-point, on the device of `w`.
        causal: whether a token sees the statistics of itself and of the tokens before it alone, as in a stream of
            tokens; the default is those of all tokens.

    Returns:
        [B, N, h, p], in the dtype of `w`; a linear layer is to follow.

    Raises:
        ValueError: a shape, dtype or device is not allowed.

    Source: arXiv 2412.17810, its TSSA.
    """
    check_tensors(w=w, temperature=temperature)
    if w.ndim != 4 or 0 in w.shape[1:] or not w.is_floating_point():
        raise ValueError(f"w must be floating-point [B, N, h, p], N, h, p > 0, got {w.dtype} {list(w.shape)}")
    if temperature.shape != w.shape[2:3] or not temperature.is_floating_point() or temperature.device != w.device:
        raise ValueError(
            f"temperature must be floating-point [{w.shape[2]}] on {w.device} like w, got {temperature.dtype} "
            f"{list(temperature.shape)} on {temperature.device}"
        )
    exact = torch.float64 if w.dtype == torch.float64 else torch.float32
    if causal:
        return causal_statistics_attention(w, temperature.to(exact))
    return _attention(w, temperature.to(exact))[0]
