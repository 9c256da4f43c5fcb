"""The empirical characteristic function of projections at equally spaced knots: sums over rows, and their gradient.

For projections x [S, N, K] and knots t the sums are Σ_i cos(t x_ik) and Σ_i sin(t x_ik). As the knots are equally
spaced, those at all knots follow from the first ones by angle addition, and no tensor of size N x K x knots is made.
There are three forms: Triton kernels, which also compare the sums with those of a Gaussian; plain operations, which
torch.compile makes one loop of; and products of complex numbers, which are the fastest that a CPU has without it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .directions import sincos
from .internal.backend import cdiv, jit, launch, tl, triton, uses_triton

__all__ = [
    "TracedSums",
    "cached",
    "compared",
    "eager_gradient",
    "knots",
    "launch_gradient",
    "plain_gradient",
    "spacing",
    "sums_of",
    "table",
]

MOMENTS_BLOCKS = {"BLOCK_N": 32, "BLOCK_K": 128}
GRADIENT_BLOCKS = {"BLOCK_N": 32, "BLOCK_K": 64}
STATISTIC_BLOCK = 64  # slices
ANEW = 8  # knots whose angles are added up; in longer sums Inductor cuts its loop, and keeps tensors of x's size
COLUMNS = 64  # of a block of projections whose rows a CPU adds up
CACHED = 2**16  # projections that a thread of a CPU processes at a time, so that they stay in its cache


class Spacing(NamedTuple):
    """Where positive knots lie: the first one is a step from zero, or half a step if zero lies between two knots."""

    step: float
    between: bool
    count: int


def spacing(t_max: float, num_points: int, span: str) -> Spacing:
    """The positive ones of equally spaced knots in [0, t_max] (`span="half"`) or [-t_max, t_max] (`span="full"`)."""
    step = t_max / (num_points - 1) * (1 if span == "half" else 2)
    return Spacing(step, span == "full" and num_points % 2 == 0, num_points - 1 if span == "half" else num_points // 2)


def knots(t_max: float, num_points: int, span: str) -> tuple[list[float], list[float]]:
    """Positive knots, and their trapezoidal weights for the integral over [-t_max, t_max].

    The integrand is even and zero at t = 0.
    """
    spaced = spacing(t_max, num_points, span)
    t = [(i + (0.5 if spaced.between else 1)) * spaced.step for i in range(spaced.count)]
    return t, [2 * spaced.step] * (spaced.count - 1) + [spaced.step]


def table(spaced: Spacing, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots t, φ(t) and weights w φ(t), each [knots, 1]; computed on the device, since copying them would wait."""
    t = _positions(spaced, like)
    phi = torch.exp(-(t**2) / 2)
    weight = 2 * spaced.step * phi
    weight[-1] /= 2
    return t, phi, weight


def _positions(spaced: Spacing, like: Tensor) -> Tensor:
    numbers = torch.arange(spaced.count, dtype=like.dtype, device=like.device)[:, None]
    return (numbers + (0.5 if spaced.between else 1)) * spaced.step


@jit
def _first_knot(b_x, step, BETWEEN: tl.constexpr):
    """Cosine and sine of t x at the first knot, and of the angle from each knot to the next."""
    if BETWEEN:
        b_sin, b_cos = sincos(b_x * (0.5 * step))
        b_turn_cos = b_cos * b_cos - b_sin * b_sin
        b_turn_sin = 2.0 * b_cos * b_sin
    else:
        b_sin, b_cos = sincos(b_x * step)
        b_turn_cos = b_cos
        b_turn_sin = b_sin
    return b_cos, b_sin, b_turn_cos, b_turn_sin


@jit
def _moments_kernel(
    x,  # pointer to projections [S, N, K], contiguous
    sums,  # pointer to [S, splits, 2, P, K]: sums over a part of the rows of cos(t x) and sin(t x)
    N,
    K,
    P,
    step,
    BETWEEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_split, num_splits = tl.program_id(1), tl.num_programs(1)
    num_blocks = tl.cdiv(K, BLOCK_K)
    i_s = (tl.program_id(0) // num_blocks).to(tl.int64)
    o_k = tl.program_id(0) % num_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    o_p = tl.arange(0, BLOCK_P)[:, None]
    b_cosines = tl.zeros([BLOCK_P, BLOCK_K], dtype=tl.float32)
    b_sines = tl.zeros([BLOCK_P, BLOCK_K], dtype=tl.float32)
    m_k = o_k < K
    for start in range(i_split * BLOCK_N, N, num_splits * BLOCK_N):
        o_n = (start + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
        m = (o_n < N) & m_k[None, :]
        b_x = tl.load(x + (i_s * N + o_n) * K + o_k[None, :], mask=m, other=0.0)
        b_cos, b_sin, b_turn_cos, b_turn_sin = _first_knot(b_x, step, BETWEEN)
        b_cos = tl.where(m, b_cos, 0.0)  # rows beyond N stay zero under rotation
        b_sin = tl.where(m, b_sin, 0.0)
        for p in range(P):
            here = o_p == p
            b_cosines += tl.where(here, b_cos.sum(axis=0)[None, :], 0.0)
            b_sines += tl.where(here, b_sin.sum(axis=0)[None, :], 0.0)
            b_next = b_cos * b_turn_cos - b_sin * b_turn_sin
            b_sin = b_sin * b_turn_cos + b_cos * b_turn_sin
            b_cos = b_next
    m = (o_p < P) & m_k[None, :]
    p_sums = sums + ((i_s * num_splits + i_split) * 2 * P + o_p) * K + o_k[None, :]
    tl.store(p_sums, b_cosines, mask=m)
    tl.store(p_sums + P * K, b_sines, mask=m)


@jit
def _knot(o_p, P, step, BETWEEN: tl.constexpr):
    """Knots t of these numbers, φ(t), and the weights w φ(t) of the trapezoidal rule."""
    b_t = (o_p + (0.5 if BETWEEN else 1.0)) * step
    b_phi = tl.exp(-0.5 * b_t * b_t)
    return b_t, b_phi, tl.where(o_p == P - 1, step, 2.0 * step) * b_phi


@jit
def _statistic_kernel(
    sums,  # pointer to [S, splits, 2, P, K], from _moments_kernel
    difference,  # pointer to [S, 2, P, K]: means of the cosines less φ, and of the sines
    statistic,  # pointer to [S, blocks]: parts of the mean over slices
    N,
    K,
    P,
    splits,
    step,
    BETWEEN: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    blocks = tl.cdiv(K, BLOCK_K)
    i_s = (tl.program_id(0) // blocks).to(tl.int64)
    o_k = tl.program_id(0) % blocks * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    o_p = tl.arange(0, BLOCK_P)[:, None]
    m = (o_p < P) & (o_k < K)
    b_cosines = tl.zeros([BLOCK_P, BLOCK_K], dtype=tl.float32)
    b_sines = tl.zeros([BLOCK_P, BLOCK_K], dtype=tl.float32)
    p_sums = sums + (i_s * splits * 2 * P + o_p) * K + o_k
    for _ in range(splits):
        b_cosines += tl.load(p_sums, mask=m, other=0.0)
        b_sines += tl.load(p_sums + P * K, mask=m, other=0.0)
        p_sums += 2 * P * K
    _, b_phi, b_weight = _knot(o_p, P, step, BETWEEN)
    b_cosines = tl.where(m, b_cosines / N - b_phi, 0.0)
    b_sines /= N
    p_difference = difference + (i_s * 2 * P + o_p) * K + o_k
    tl.store(p_difference, b_cosines, mask=m)
    tl.store(p_difference + P * K, b_sines, mask=m)
    total = ((b_cosines * b_cosines + b_sines * b_sines) * b_weight).sum(axis=1).sum(axis=0)
    tl.store(statistic + tl.program_id(0), total * N / K)


@jit
def _projection_gradient_kernel(
    x,  # pointer to projections [S, N, K], contiguous
    difference,  # pointer to [S, 2, P, K], from _statistic_kernel
    grad,  # pointer to [S], contiguous
    out,  # pointer to [S, N, K]
    N,
    K,
    P,
    step,
    BETWEEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns, rows = tl.cdiv(K, BLOCK_K), tl.cdiv(N, BLOCK_N)
    i_s = (tl.program_id(0) // (columns * rows)).to(tl.int64)
    i_row = tl.program_id(0) // columns % rows
    o_n = (i_row * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]).to(tl.int64)
    o_k = tl.program_id(0) % columns * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    m = (o_n < N) & m_k[None, :]
    o_x = (i_s * N + o_n) * K + o_k[None, :]
    b_x = tl.load(x + o_x, mask=m, other=0.0)
    b_cos, b_sin, b_turn_cos, b_turn_sin = _first_knot(b_x, step, BETWEEN)
    b_out = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
    factor = 2.0 * tl.load(grad + i_s) / K
    p_difference = difference + i_s * 2 * P * K + o_k
    for p in range(P):
        t, _, weight = _knot(p, P, step, BETWEEN)
        b_cosine_slope = factor * t * weight * tl.load(p_difference, mask=m_k, other=0.0)[None, :]
        b_sine_slope = factor * t * weight * tl.load(p_difference + P * K, mask=m_k, other=0.0)[None, :]
        b_out += b_sine_slope * b_cos - b_cosine_slope * b_sin
        b_next = b_cos * b_turn_cos - b_sin * b_turn_sin
        b_sin = b_sin * b_turn_cos + b_cos * b_turn_sin
        b_cos = b_next
        p_difference += K
    tl.store(out + o_x, b_out, mask=m)


def sums_of(x: Tensor, spaced: Spacing) -> Tensor:
    """Sums over parts of the rows of the cosines and sines of t x: [S, N, K] to [S, parts, 2, knots, K]."""
    if not uses_triton(x):
        return (_eager_sums if x.device.type == "cpu" else _plain_sums)(x, spaced)[:, None]
    batch, rows, slices = x.shape
    parts = min(cdiv(rows, MOMENTS_BLOCKS["BLOCK_N"]), 16)
    sums = torch.empty((batch, parts, 2, spaced.count, slices), dtype=torch.float32, device=x.device)
    grid = (cdiv(slices, MOMENTS_BLOCKS["BLOCK_K"]) * batch, parts)
    launch(
        _moments_kernel, grid, x, sums, rows, slices, spaced.count, spaced.step,
        BETWEEN=spaced.between, BLOCK_P=triton.next_power_of_2(spaced.count), **MOMENTS_BLOCKS,
    )  # fmt: skip
    return sums


def compared(sums: Tensor, rows: int, spaced: Spacing) -> tuple[Tensor, Tensor]:
    """The statistic [S] and differences from φ [S, 2, knots, K], from the sums over parts of the rows."""
    batch, parts, _, count, slices = sums.shape
    blocks = cdiv(slices, STATISTIC_BLOCK)
    difference = torch.empty((batch, 2, count, slices), dtype=torch.float32, device=sums.device)
    statistic = torch.empty((batch, blocks), dtype=torch.float32, device=sums.device)
    launch(
        _statistic_kernel, (batch * blocks,), sums, difference, statistic, rows, slices, count, parts, spaced.step,
        BETWEEN=spaced.between, BLOCK_K=STATISTIC_BLOCK, BLOCK_P=triton.next_power_of_2(count),
    )  # fmt: skip
    return statistic.sum(1), difference


def launch_gradient(x: Tensor, difference: Tensor, grad: Tensor, spaced: Spacing, out: Tensor) -> None:
    """Write the gradient w.r.t. the projections x [S, N, K] to `out`, which may be x."""
    batch, rows, slices = x.shape
    tiles = cdiv(slices, GRADIENT_BLOCKS["BLOCK_K"]) * cdiv(rows, GRADIENT_BLOCKS["BLOCK_N"])
    launch(
        _projection_gradient_kernel, (tiles * batch,), x, difference, grad.contiguous(), out, rows, slices,
        spaced.count, spaced.step, BETWEEN=spaced.between, **GRADIENT_BLOCKS,
    )  # fmt: skip


def _turns(x: Tensor, spaced: Spacing) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cosine and sine of t x at the first knot, and of the angle from each knot to the next."""
    first = x * (spaced.step / 2 if spaced.between else spaced.step)
    cosine, sine = first.cos(), first.sin()
    turn = (cosine * cosine - sine * sine, 2 * cosine * sine) if spaced.between else (cosine, sine)
    return (cosine, sine), turn


def _plain_sums(x: Tensor, spaced: Spacing) -> Tensor:
    """Sums over rows [S, 2, knots, K] of the cosines and sines of t x, for x [S, N, K].

    Plain operations, for devices without Triton, and for torch.compile, which makes one loop of them.
    """
    (cosine, sine), turn = _turns(x, spaced)
    sums = []
    for number in range(spaced.count):
        if number and number % ANEW == 0:
            angle = x * ((number + (0.5 if spaced.between else 1)) * spaced.step)
            cosine, sine = angle.cos(), angle.sin()
        sums.append(torch.stack([cosine.sum(1), sine.sum(1)], 1))
        cosine, sine = cosine * turn[0] - sine * turn[1], sine * turn[0] + cosine * turn[1]
    return torch.stack(sums, 2)


def plain_gradient(x: Tensor, slopes: Tensor, spaced: Spacing) -> Tensor:
    """Gradient [S, N, K] w.r.t. the projections, from t times those w.r.t. the sums, [S, 2, knots, K].

    It is the real part of a polynomial in exp(i x step), computed by Horner's rule. Were it a sum over angles,
    torch.compile would find these in the forward pass, and keep all of them.
    """
    (cosine, sine), (turn_cosine, turn_sine) = _turns(x, spaced)
    real, imaginary = slopes[:, 1, -1, None], slopes[:, 0, -1, None]
    for number in reversed(range(slopes.shape[2] - 1)):
        real, imaginary = (
            real * turn_cosine - imaginary * turn_sine + slopes[:, 1, number, None],
            real * turn_sine + imaginary * turn_cosine + slopes[:, 0, number, None],
        )
    return cosine * real - sine * imaginary


class TracedSums(torch.autograd.Function):
    """`_plain_sums` for torch.compile, with a gradient that keeps nothing but the projections."""

    @staticmethod
    def forward(ctx, x, step, between, count):
        ctx.save_for_backward(x)
        ctx.spaced = Spacing(step, between, count)
        return _plain_sums(x, ctx.spaced)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        return plain_gradient(x, grad * _positions(ctx.spaced, x), ctx.spaced), None, None, None


def cached(x: Tensor, slices: int) -> tuple[Tensor, ...]:
    """Parts of the rows of x [S, N, ...] for which a tensor [S, rows, slices] stays in a CPU's cache."""
    return x.split(max(torch.get_num_threads() * CACHED // max(x.shape[0] * slices, 1), 1), dim=1)


def _waves(x: Tensor, spaced: Spacing) -> tuple[Tensor, Tensor]:
    """exp(i t x) at the first knot, and the factor from each knot to the next, which may be the same tensor."""
    angle = x * (spaced.step / 2 if spaced.between else spaced.step)
    first = torch.polar(angle.new_ones(()).expand_as(angle), angle)
    return first, first * first if spaced.between else first


def _eager_sums(x: Tensor, spaced: Spacing) -> Tensor:
    """`_plain_sums` on a CPU: one product and one sum for each knot.

    Blocks of columns lie one after the other, so that a thread adds up what it has multiplied itself. Threads that
    fetch it from each other's caches take longer than one alone.
    """
    width = x.shape[2]
    whole = width - width % COLUMNS
    if 0 < whole < width:
        return torch.cat([_eager_sums(part, spaced) for part in x.split([whole, width - whole], dim=2)], dim=-1)
    blocks = max(width // COLUMNS, 1)
    sums = x.new_zeros((x.shape[0], spaced.count, blocks, width // blocks), dtype=x.dtype.to_complex())
    for part in cached(x, width):
        wave, turn = _waves(part.unflatten(2, sums.shape[2:]).transpose(1, 2).contiguous(), spaced)
        knots = [wave.sum(2)]
        for number in range(1, spaced.count):
            wave = wave * turn if number == 1 else wave.mul_(turn)
            knots.append(wave.sum(2))
        sums += torch.stack(knots, 1)
    sums = sums.flatten(2)
    return torch.stack([sums.real, sums.imag], 1)


def eager_gradient(x: Tensor, slopes: Tensor, spaced: Spacing) -> Tensor:
    """`plain_gradient` on a CPU, in complex numbers."""
    coefficients = torch.complex(slopes[:, 1], slopes[:, 0])[:, :, None]  # [S, knots, 1, K]
    wave, turn = _waves(x, spaced)
    total = coefficients[:, -1].expand_as(wave).contiguous()
    for number in reversed(range(slopes.shape[2] - 1)):
        torch.addcmul(coefficients[:, number], total, turn, out=total)
    return total.mul_(wave).real
