"""What both forms of token-statistics attention share: tiles of tokens [B, N, h, p], guards of divisions, gradients."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .backend import jit, tl
from .transforms import differentiable, folded

__all__ = ["FLOOR", "SMALLEST", "attention_of", "blocks", "channel_offsets", "tile_offsets"]

SMALLEST = 1e-24  # of a moment: the square of what torch's `normalize` divides by at least
FLOOR = 1e-8  # is added to the sum of the weights
TILE = 4096  # numbers of the tokens that a program holds at a time


@jit
def tile_offsets(start, N, H, P, BLOCK_N: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets and masks of a tile [BLOCK_N, BLOCK_H, BLOCK_P] of a sequence's tokens, and of its weights."""
    o_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)  # of a sequence of more than 2³¹ numbers
    o_h = tl.arange(0, BLOCK_H)
    o_p = tl.arange(0, BLOCK_P)
    o_row = o_n[:, None] * H + o_h[None, :]
    m_row = (o_n < N)[:, None] & (o_h < H)[None, :]
    o = o_row[:, :, None] * P + o_p[None, None, :]
    m = m_row[:, :, None] & (o_p < P)[None, None, :]
    return o_row, m_row, o, m


@jit
def channel_offsets(H, P, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr):
    """Offsets and mask of the channels [BLOCK_H, BLOCK_P] of all heads."""
    o_h = tl.arange(0, BLOCK_H)[:, None]
    o_p = tl.arange(0, BLOCK_P)[None, :]
    return o_h * P + o_p, (o_h < H) & (o_p < P)


def blocks(heads: int, width: int, least: int = 1) -> dict[str, int]:
    """Sizes of a program's tile: all channels of a few tokens, at least `least` of them, which is a power of 2."""
    height, across = (1 << (size - 1).bit_length() for size in (heads, width))
    return {"BLOCK_N": max(least, TILE // (height * across)), "BLOCK_H": height, "BLOCK_P": across}


def attention_of(forward, backward) -> Callable:
    """A custom operator of tokens [B, N, h, p] and temperature [h], with its derivative.

    Args:
        forward: operator that returns the attention's output, and tensors that only `backward` needs.
        backward: operator of the output's gradient, tokens, temperature and those tensors, which returns the gradients
            w.r.t. the tokens, and w.r.t. the temperature for each batch, [B, h].
    """

    @backward.register_fake
    def _(grad, w, temperature, *saved):
        out = torch.empty(w.shape, dtype=w.dtype, device=w.device)
        return out, w.new_empty((w.shape[0], w.shape[2]), dtype=temperature.dtype)

    def setup(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        return *inputs, *output[1:]

    def differentiate(ctx, grad, *_):
        dw, of_temperature = gradient(grad, *ctx.saved_tensors)
        return dw, of_temperature.sum(0)

    gradient = differentiable(backward, vmap=folded(shared=(2,)))
    return differentiable(forward, setup, differentiate, vmap=folded(shared=(1,)))
