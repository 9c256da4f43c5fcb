"""Random unit directions that are the same on every process, without communication.

Philox words, a function of (seed, row, slice), become standard normals by the Box-Muller transform, and each direction
is scaled to unit length. Triton's and torch's results agree up to the rounding of logarithms and cosines.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .internal.backend import cdiv, jit, launch, tl, uses_triton
from .internal.checks import readable
from .philox import MASK, philox

__all__ = ["directions"]

BLOCKS = {"BLOCK_D": 32, "BLOCK_K": 32}
CACHED = 2**15  # counters that torch processes at a time, so that they stay in a CPU's cache


@jit
def sincos(b_x):
    """Sine and cosine to float32 accuracy for |x| < 1e5: Cody-Waite reduction to an octant, then polynomials.

    libdevice's functions work for any argument, but spill registers here. Coefficients: Cephes, sinf.
    """
    b_quarter = tl.floor(b_x * 0.6366197723675814 + 0.5)
    b_r = b_x - b_quarter * 1.5703125 - b_quarter * 4.837512969970703e-4 - b_quarter * 7.549789954891882e-8
    b_r = tl.where(b_r == b_r, tl.minimum(tl.maximum(b_r, -0.7854), 0.7854), b_r)  # beyond 1e5: wrong, but finite
    b_z = b_r * b_r
    b_sin = b_r + b_r * b_z * ((-1.9515295891e-4 * b_z + 8.3321608736e-3) * b_z - 1.6666654611e-1)
    b_cos = (2.443315711809948e-5 * b_z - 1.388731625493765e-3) * b_z + 4.166664568298827e-2
    b_cos = 1.0 - 0.5 * b_z + b_z * b_z * b_cos
    b_turns = b_quarter.to(tl.int32)
    b_odd = (b_turns & 1) == 1
    b_sine = tl.where(b_odd, b_cos, b_sin)
    b_cosine = tl.where(b_odd, b_sin, b_cos)
    b_sine = tl.where((b_turns & 2) == 2, -b_sine, b_sine)
    return b_sine, tl.where(((b_turns + 1) & 2) == 2, -b_cosine, b_cosine)


@jit
def _normals(word_0, word_1):
    """Two standard normals from two words, by the Box-Muller transform."""
    u = ((word_0 >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2**-23: exact, and neither 0 nor 1
    angle = (word_1 >> 8).to(tl.float32) * 3.7450703e-07  # 2π 2**-24
    radius = tl.sqrt(-2.0 * tl.log(u))
    b_sin, b_cos = sincos(angle)
    return radius * b_cos, radius * b_sin


@jit
def _directions_kernel(
    seed,  # pointer to an int64
    out,  # pointer to [D, K], contiguous
    D,
    K,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # rows 4i..4i+3 of slice k are drawn from counter (i, k)
    key = tl.load(seed)
    o_k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    b_norm = tl.zeros([BLOCK_K], dtype=tl.float32)
    for start in range(0, D, BLOCK_D * 4):
        o_i = start // 4 + tl.arange(0, BLOCK_D)[:, None]
        zero = tl.zeros([BLOCK_D, BLOCK_K], dtype=tl.int32)
        w_0, w_1, w_2, w_3 = tl.philox(key, o_i + zero, o_k[None, :] + zero, zero, zero)
        n_0, n_1 = _normals(w_0, w_1)
        n_2, n_3 = _normals(w_2, w_3)
        for r in tl.static_range(4):  # pyright: ignore[reportGeneralTypeIssues]
            n = n_0 if r == 0 else n_1 if r == 1 else n_2 if r == 2 else n_3
            m = (4 * o_i + r < D) & (o_k < K)[None, :]
            b_norm += tl.where(m, n * n, 0.0).sum(axis=0)
            tl.store(out + (4 * o_i + r).to(tl.int64) * K + o_k[None, :], n, mask=m)
    tl.debug_barrier()  # other threads of the program read what was stored
    b_scale = 1.0 / tl.sqrt(tl.where(o_k < K, b_norm, 1.0))
    for start in range(0, D, BLOCK_D):
        o_d = (start + tl.arange(0, BLOCK_D)[:, None]).to(tl.int64)
        m = (o_d < D) & (o_k < K)[None, :]
        p = out + o_d * K + o_k[None, :]
        tl.store(p, tl.load(p, mask=m, other=0.0) * b_scale[None, :], mask=m)


def directions(seed: Tensor, dim: int, num_slices: int) -> Tensor:
    """Random unit directions, a pure function of the seed: every process draws the same ones, without waiting.

    Args:
        seed: int64, 0-dim, on any device.
        dim: D.
        num_slices: K.

    Returns:
        float32 [D, K]; columns are uniform on the unit sphere.
    """
    if not uses_triton(seed):
        index = torch.arange((dim + 3) // 4, device=seed.device)[:, None]
        slices = torch.arange(num_slices, device=seed.device)[None, :]
        key = int(seed) if readable(seed) else seed
        drawn = torch.empty((len(index), 2, 2, num_slices), dtype=torch.float32, device=seed.device)
        rows = max(CACHED // num_slices, 1)
        for part, out in zip(index.split(rows), drawn.split(rows), strict=True):
            words = philox((key & MASK, key >> 32 & MASK), (part, slices, 0, 0))
            radius = (torch.stack(words[::2], 1) >> 9).float().add_(0.5).mul_(2**-23).log_().mul_(-2).sqrt_()
            angle = (torch.stack(words[1::2], 1) >> 8).float().mul_(2 * math.pi * 2**-24)
            torch.mul(radius, angle.cos(), out=out[:, :, 0])
            torch.mul(radius, angle.sin(), out=out[:, :, 1])
        drawn = drawn.flatten(0, 2)[:dim]
        return drawn.div_(drawn.square().sum(0).sqrt_())
    out = torch.empty((dim, num_slices), dtype=torch.float32, device=seed.device)
    grid = (cdiv(num_slices, BLOCKS["BLOCK_K"]),)
    launch(_directions_kernel, grid, seed, out, dim, num_slices, **BLOCKS)
    return out
