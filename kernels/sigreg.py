"""SIGReg: how far features are from an isotropic Gaussian, by characteristic functions of random projections.

With unit directions a_k, projections x_ik = z_i·a_k and φ(t) = exp(-t²/2), the Epps-Pulley statistic of slice k is

    T_k = N Σ_t w_t φ(t) [(mean_i cos(t x_ik) - φ(t))² + (mean_i sin(t x_ik))²]

and SIGReg is the mean over slices. The knots t are equally spaced, so cosines and sines at all knots follow from the
first ones by angle addition. No tensor of size N x slices x knots is ever made, neither forward nor backward.

Source: LeJEPA (arXiv 2511.08544); Epps & Pulley (1983).

There are two conventions. LeJEPA's loss is (1 - λ) inv + λ T with T as above; eb_jepa's is inv + λ_u T / N, with ten
knots on [-3, 3] (`span="full"`). They agree, up to a factor and the knots, for λ_u = λ N / (1 - λ).
"""

from __future__ import annotations

import math
import warnings
from numbers import Integral
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ._ops import add_op_namespace_prefix
from .collectives import group_of, name_of
from .directions import directions, sincos
from .internal.backend import jit, launch, tl, triton, uses_triton, widest
from .internal.buffers import BufferedModule
from .internal.checks import check_count, check_positive, plain, real
from .internal.matmul import matmul
from .internal.transforms import count_up, differentiable, folded, transformed

__all__ = ["SIGReg", "degenerate_value", "directions", "sigreg", "sigreg_reference"]

MOMENTS_BLOCKS = {"BLOCK_N": 32, "BLOCK_K": 128}
GRADIENT_BLOCKS = {"BLOCK_N": 32, "BLOCK_K": 64}
STATISTIC_BLOCK = 64  # slices
CACHED = 2**16  # projections that a thread of a CPU processes at a time, so that they stay in its cache


def knots(t_max: float, num_points: int, span: str) -> tuple[list[float], list[float]]:
    """Positive knots, equally spaced, and their trapezoidal weights for the integral over [-t_max, t_max].

    The integrand is even and zero at t = 0. The first knot is one step from zero, or half a step if zero is no knot.
    """
    step = t_max / (num_points - 1) * (1 if span == "half" else 2)
    between = span == "full" and num_points % 2 == 0  # zero lies between two knots
    count = num_points - 1 if span == "half" else num_points // 2
    t = [(i + (0.5 if between else 1)) * step for i in range(count)]
    return t, [2 * step] * (count - 1) + [step]


def degenerate_value(t_max: float = 3.0, num_points: int = 17, span: str = "half") -> float:
    """T / N if all projections are zero: SIGReg gets stuck there, with samples that are collapsed or of unit length."""
    t, w = knots(t_max, num_points, span)
    return sum(wi * math.exp(-(ti**2) / 2) * (1 - math.exp(-(ti**2) / 2)) ** 2 for ti, wi in zip(t, w, strict=True))


def sigreg_reference(
    z: Tensor, unit: Tensor, *, t_max: float = 3.0, num_points: int = 17, span: str = "half"
) -> Tensor:
    """The plain formula, for tests and benchmarks: computes every cosine and sine, differentiable by autograd.

    Args:
        z: [..., N, D].
        unit: directions [D, num_slices].
        t_max, num_points, span: as in `sigreg`.
    """
    t, w = (torch.tensor(values, dtype=z.dtype, device=z.device) for values in knots(t_max, num_points, span))
    phi = torch.exp(-(t**2) / 2)
    angle = (z @ unit)[..., None] * t  # [..., N, slices, knots]
    error = (angle.cos().mean(-3) - phi) ** 2 + angle.sin().mean(-3) ** 2
    return z.shape[-2] * (error @ (w * phi)).mean(-1)


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


def _turns(x: Tensor, step: float, between: bool) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Cosine and sine of t x at the first knot, and of the angle from each knot to the next."""
    first = x * (step / 2 if between else step)
    cosine, sine = first.cos(), first.sin()
    turn = (cosine * cosine - sine * sine, 2 * cosine * sine) if between else (cosine, sine)
    return (cosine, sine), turn


def _plain_sums(x: Tensor, step: float, between: bool, count: int) -> Tensor:
    """Sums over rows [S, 2, knots, K] of the cosines and sines of t x, for x [S, N, K].

    Plain operations, for devices without Triton, and for torch.compile, which makes one loop of them.
    """
    (cosine, sine), turn = _turns(x, step, between)
    sums = []
    for _ in range(count):
        sums.append(torch.stack([cosine.sum(1), sine.sum(1)], 1))
        cosine, sine = cosine * turn[0] - sine * turn[1], sine * turn[0] + cosine * turn[1]
    return torch.stack(sums, 2)


def _plain_gradient(x: Tensor, slopes: Tensor, step: float, between: bool) -> Tensor:
    """Gradient [S, N, K] w.r.t. the projections, from t times those w.r.t. the sums, [S, 2, knots, K].

    It is the real part of a polynomial in exp(i x step), computed by Horner's rule. Were it a sum over angles,
    torch.compile would find these in the forward pass, and keep all of them.
    """
    (cosine, sine), (turn_cosine, turn_sine) = _turns(x, step, between)
    real, imaginary = slopes[:, 1, -1, None], slopes[:, 0, -1, None]
    for number in reversed(range(slopes.shape[2] - 1)):
        real, imaginary = (
            real * turn_cosine - imaginary * turn_sine + slopes[:, 1, number, None],
            real * turn_sine + imaginary * turn_cosine + slopes[:, 0, number, None],
        )
    return real * cosine - imaginary * sine


def _cached(x: Tensor, slices: int) -> tuple[Tensor, ...]:
    """Parts of the rows of x [S, N, ...] for which a tensor [S, rows, slices] stays in a CPU's cache."""
    return x.split(max(torch.get_num_threads() * CACHED // max(x.shape[0] * slices, 1), 1), dim=1)


def _waves(x: Tensor, step: float, between: bool) -> tuple[Tensor, Tensor]:
    """exp(i t x) at the first knot, and the factor from each knot to the next."""
    angle = x * (step / 2 if between else step)
    first = torch.complex(angle.cos(), angle.sin())
    return first, first * first if between else first.clone()


def _eager_sums(x: Tensor, step: float, between: bool, count: int) -> Tensor:
    """`_plain_sums` on a CPU: one product and one sum for each knot."""
    sums = x.new_zeros((x.shape[0], count, x.shape[2]), dtype=x.dtype.to_complex())
    for part in _cached(x, x.shape[2]):
        wave, turn = _waves(part, step, between)
        for number in range(count):
            sums[:, number] += wave.sum(1)
            wave *= turn
    return torch.stack([sums.real, sums.imag], 1)


def _eager_gradient(x: Tensor, slopes: Tensor, step: float, between: bool) -> Tensor:
    """`_plain_gradient` on a CPU, in complex numbers."""
    coefficients = torch.complex(slopes[:, 1], slopes[:, 0])[:, :, None]  # [S, knots, 1, K]
    wave, turn = _waves(x, step, between)
    total = coefficients[:, -1].expand_as(wave).contiguous()
    for number in reversed(range(slopes.shape[2] - 1)):
        torch.addcmul(coefficients[:, number], total, turn, out=total)
    return total.mul_(wave).real


def _sums(x: Tensor, step: float, between: bool, count: int) -> Tensor:
    """Sums over parts of the rows of the cosines and sines of t x: [S, N, K] to [S, parts, 2, knots, K]."""
    if not uses_triton(x):
        return (_eager_sums if x.device.type == "cpu" else _plain_sums)(x, step, between, count)[:, None]
    batch, rows, slices = x.shape
    parts = min(triton.cdiv(rows, MOMENTS_BLOCKS["BLOCK_N"]), 16)
    sums = torch.empty((batch, parts, 2, count, slices), dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(slices, MOMENTS_BLOCKS["BLOCK_K"]) * batch, parts)
    launch(
        _moments_kernel, grid, x, sums, rows, slices, count, step,
        BETWEEN=between, BLOCK_P=triton.next_power_of_2(count), **MOMENTS_BLOCKS,
    )  # fmt: skip
    return sums


def _compared(sums: Tensor, rows: int, step: float, between: bool) -> tuple[Tensor, Tensor]:
    """The statistic [S] and differences from φ [S, 2, knots, K], from the sums over parts of the rows."""
    batch, parts, _, count, slices = sums.shape
    blocks = triton.cdiv(slices, STATISTIC_BLOCK)
    difference = torch.empty((batch, 2, count, slices), dtype=torch.float32, device=sums.device)
    statistic = torch.empty((batch, blocks), dtype=torch.float32, device=sums.device)
    launch(
        _statistic_kernel, (batch * blocks,), sums, difference, statistic, rows, slices, count, parts, step,
        BETWEEN=between, BLOCK_K=STATISTIC_BLOCK, BLOCK_P=triton.next_power_of_2(count),
    )  # fmt: skip
    return statistic.sum(1), difference


def _launch_gradient(x: Tensor, difference: Tensor, grad: Tensor, step: float, between: bool) -> Tensor:
    """Gradient w.r.t. the projections [S, N, K]."""
    batch, rows, slices = x.shape
    out = torch.empty_like(x)
    tiles = triton.cdiv(slices, GRADIENT_BLOCKS["BLOCK_K"]) * triton.cdiv(rows, GRADIENT_BLOCKS["BLOCK_N"])
    launch(
        _projection_gradient_kernel, (tiles * batch,), x, difference, grad.contiguous(), out, rows, slices,
        difference.shape[2], step, BETWEEN=between, **GRADIENT_BLOCKS,
    )  # fmt: skip
    return out


def _table(t_max: float, num_points: int, span: str, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots t, φ(t) and weights w φ(t), each [knots, 1]; computed on the device, since copying them would wait."""
    step, between, count = _spacing(t_max, num_points, span)
    t = (torch.arange(count, dtype=like.dtype, device=like.device)[:, None] + (0.5 if between else 1)) * step
    phi = torch.exp(-(t**2) / 2)
    weight = 2 * step * phi
    weight[-1] /= 2
    return t, phi, weight


@torch.library.custom_op(add_op_namespace_prefix("sigreg"), mutates_args=())
def _forward(
    z: Tensor, seed: Tensor, num_slices: int, t_max: float, num_points: int, span: str, group: str, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistic [S] of z [S, N, D], number of samples of a group's processes [S], and three tensors for the gradient.

    These are directions [D, K], projections [S, N, K] and differences from φ [S, 2, knots, K]. Without a group there is
    no number of samples, [0].
    """
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    unit = directions(seed, z.shape[-1], num_slices).to(exact)
    x = matmul(z, unit.expand(z.shape[0], -1, -1))
    step, between, count = _spacing(t_max, num_points, span)
    sums = _sums(x, step, between, count)
    samples = sums.new_full((z.shape[0] if group else 0,), z.shape[1])
    if uses_triton(x) and not group:
        statistic, difference = _compared(sums, z.shape[1], step, between)
        return statistic, samples, unit, x, difference
    sums = sums.sum(1)
    total = z.shape[1]
    if group:
        packed = torch.cat([sums.flatten(1), samples[:, None]], dim=1)
        dist.all_reduce(packed, group=group_of(group))
        sums, samples = packed[:, :-1].view_as(sums), packed[:, -1].clone()
        total = samples[:, None, None, None]
    _, phi, weight = _table(t_max, num_points, span, x)
    difference = sums / total
    difference[:, 0] -= phi
    statistic = (samples if group else total) * ((difference**2).sum(1) * weight).sum(1).mean(-1)
    return statistic, samples, unit, x, difference


def _spacing(t_max: float, num_points: int, span: str) -> tuple[float, bool, int]:
    """Distance between knots, whether the first knot is half that distance from zero, and the number of knots."""
    t, _ = knots(t_max, num_points, span)
    between = span == "full" and num_points % 2 == 0
    return t[0] * (2 if between else 1), between, len(t)


@_forward.register_fake
def _(z, seed, num_slices, t_max, num_points, span, group, size):
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    batch, rows, width = z.shape
    count = _spacing(t_max, num_points, span)[2]
    shapes = (
        (batch,),
        (batch if group else 0,),
        (width, num_slices),
        (batch, rows, num_slices),
        (batch, 2, count, num_slices),
    )
    return tuple(z.new_empty(shape, dtype=exact) for shape in shapes)


@torch.library.custom_op(add_op_namespace_prefix("sigreg_backward"), mutates_args=())
def _backward(
    grad: Tensor, z: Tensor, unit: Tensor, x: Tensor, difference: Tensor, t_max: float, num_points: int, span: str
) -> Tensor:
    """Gradient [S, N, D] w.r.t. the samples z, which are an argument so that a second derivative raises an error."""
    step, between, _ = _spacing(t_max, num_points, span)
    back = unit.mT.expand(x.shape[0], -1, -1)
    if uses_triton(x):
        return matmul(_launch_gradient(x, difference, grad, step, between), back, dtype=z.dtype)
    t, _, weight = _table(t_max, num_points, span, x)
    slopes = difference * (2 * t * weight) * (grad / x.shape[-1])[:, None, None, None]
    if x.device.type != "cpu":
        return matmul(_plain_gradient(x, slopes, step, between), back, dtype=z.dtype)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for part, out in zip(_cached(x, x.shape[2]), _cached(dz, x.shape[2]), strict=True):
        out.copy_(matmul(_eager_gradient(part, slopes, step, between), back))
    return dz


@_backward.register_fake
def _(grad, z, unit, x, difference, t_max, num_points, span):
    return z.new_empty(z.shape)


def _setup(ctx, inputs, output):
    z, _, _, *ctx.settings, ctx.group, ctx.size = inputs
    ctx.mark_non_differentiable(*output[1:])
    return z, *output[2:]


_gradient = differentiable(_backward, vmap=folded(shared=(2,)))


def _differentiate(ctx, grad, *_):
    if ctx.group:
        grad = grad * ctx.size  # makes up for data-parallel training, which averages gradients over processes
    dz = _gradient(grad, *ctx.saved_tensors, *ctx.settings)
    return dz, None, None, None, None, None, None, None


def _tangent(ctx, z_tangent, *_):
    """Forward mode: the gradient times the tangents."""
    if ctx.group:
        raise RuntimeError("sigreg has no forward-mode derivative over several processes; use reverse mode")
    z, unit, x, difference = ctx.saved_tensors
    # with z in the precision of x; otherwise the gradient would be rounded to bfloat16 before it is used
    dz = _gradient(x.new_ones(len(x)), z.to(x.dtype), unit, x, difference, *ctx.settings)
    return (dz * z_tangent).sum((-2, -1)), None, None, None, None


_statistic = differentiable(_forward, _setup, _differentiate, _tangent, folded(shared=(1,), alike=(2,)))


@torch.library.custom_op(add_op_namespace_prefix("sigreg_projections"), mutates_args=())
def _projections(z: Tensor, unit: Tensor) -> Tensor:
    """z [S, N, D] times unit [D, K] in float32 (float64), whatever autocast makes of other products."""
    return matmul(z, unit.expand(z.shape[0], -1, -1))


@_projections.register_fake
def _(z, unit):
    return unit.new_empty((*z.shape[:2], unit.shape[1]))


def _projections_setup(ctx, inputs, output):
    ctx.dtype = inputs[0].dtype
    return inputs[1:]


def _projections_gradient(ctx, grad):
    (unit,) = ctx.saved_tensors
    return _projections(grad, unit.mT).to(ctx.dtype), None


_projected = differentiable(_projections, _projections_setup, _projections_gradient)


@torch.library.custom_op(add_op_namespace_prefix("sigreg_directions"), mutates_args=())
def _directions(seed: Tensor, dim: int, num_slices: int) -> Tensor:
    """`directions`, whose integers Inductor would compute one by one on a CPU."""
    return directions(seed, dim, num_slices)


@_directions.register_fake
def _(seed, dim, num_slices):
    return seed.new_empty((dim, num_slices), dtype=torch.float32)


class _TracedSums(torch.autograd.Function):
    """`_plain_sums` for torch.compile, with a gradient that keeps nothing but the projections."""

    @staticmethod
    def forward(ctx, x, step, between, count):
        ctx.save_for_backward(x)
        ctx.spacing = step, between
        return _plain_sums(x, step, between, count)

    @staticmethod
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        step, between = ctx.spacing
        first = 0.5 if between else 1
        t = (torch.arange(grad.shape[2], dtype=x.dtype, device=x.device)[:, None] + first) * step
        return _plain_gradient(x, grad * t, step, between), None, None, None


def _traced(z: Tensor, seed: Tensor, num_slices: int, t_max: float, num_points: int, span: str) -> Tensor:
    """The statistic [S] for torch.compile on a CPU, whose loops over knots are faster than eager operations."""
    unit = _directions(seed, z.shape[-1], num_slices).to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    sums = _TracedSums.apply(_projected(z, unit), *_spacing(t_max, num_points, span))
    _, phi, weight = _table(t_max, num_points, span, unit)
    cosines, sines = (sums / z.shape[1]).unbind(1)
    return z.shape[1] * (((cosines - phi) ** 2 + sines**2) * weight).sum(1).mean(-1)


def sigreg(
    z: Tensor,
    *,
    num_slices: int,
    t_max: float = 3.0,
    num_points: int = 17,
    span: Literal["half", "full"] = "half",
    seed: int | Tensor,
    group: ProcessGroup | None = None,
) -> Tensor:
    """SIGReg statistic of each batch of samples, with LeJEPA's factor N; differentiable once, in `z`.

    It is about 1 for samples of a standard Gaussian and 0.40 N for collapsed ones. Do not normalise `z` to unit length:
    in many dimensions the projections of unit vectors are close to zero, and the statistic is nearly constant.

    Args:
        z: samples [..., N, D], bfloat16, float16, float32 or float64, any strides. Computed in float32 (float64 for
            float64).
        num_slices: number K of random directions; every seed gives other directions.
        t_max: largest knot.
        num_points: number of knots, zero included; 17 in LeJEPA.
        span: `half` for knots on [0, t_max] with doubled weights, `full` for knots on [-t_max, t_max].
        seed: an int, or int64, 0-dim, on the device of `z`, which may change between replays of a CUDA graph. It must
            be the same on all processes.
        group: processes whose samples form one batch; each may bring any number of samples, or none. The statistic is
            that of the joint batch. Gradients are those of the joint batch times the number of processes, so that they
            are exact after data-parallel training has averaged them.

    Returns:
        [...], float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or number is not allowed.

    Source: LeJEPA (arXiv 2511.08544), with a Gaussian window and the trapezoidal rule.
    """
    return joint_sigreg(z, num_slices, t_max, num_points, span, seed, group)[0]


def joint_sigreg(
    z: Tensor,
    num_slices: int,
    t_max: float,
    num_points: int,
    span: str,
    seed: int | Tensor,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor | int]:
    """What `sigreg` returns, and the sum of N over all processes, [...], or N if there is no group."""
    name, size = name_of(group)
    if z.ndim < 2 or z.shape[-1] == 0 or (z.shape[-2] == 0 and not name) or not z.is_floating_point():
        raise ValueError(f"z must be floating-point [..., N, D] with rows and columns, got {z.dtype} {list(z.shape)}")
    check_settings(num_slices, t_max, num_points, span)
    if not isinstance(seed, Tensor):
        seed = _seed_on(z.device, seed)
    if seed.dtype != torch.int64 or seed.ndim or seed.device != z.device:
        raise ValueError(
            f"seed must be int64, 0-dim, on {z.device} like z, got {seed.dtype} {list(seed.shape)} on {seed.device}"
        )
    flat = z.reshape(math.prod(z.shape[:-2]), *z.shape[-2:])
    if torch.compiler.is_compiling() and z.device.type == "cpu" and not (name or transformed() or uses_triton(z)):
        statistic = _traced(flat, seed, num_slices, float(t_max), num_points, span)
    else:
        statistic, samples, *_ = _statistic(flat, seed, num_slices, float(t_max), num_points, span, name, size)
        if name:
            return statistic.view(z.shape[:-2]), samples.view(z.shape[:-2])
    return statistic.view(z.shape[:-2]), z.shape[-2]


def check_seed(seed: int) -> None:
    if not isinstance(real(seed), Integral):
        raise ValueError(f"seed must be a whole number, or an int64 tensor, got {seed!r}")


def _seed_on(device: torch.device, seed: int) -> Tensor:
    """A seed as a tensor, by arithmetic: `torch.full` would be recompiled for each seed."""
    if not torch.compiler.is_compiling():  # torch.compile traces NumPy integers as tensors
        check_seed(seed)
    elif isinstance(seed, int):
        from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports SymPy, which is slow

        # an int computed from a float, by a schedule for instance, becomes an input of the graph only as a float
        if guard_or_false(abs(seed) < 2**53):
            return (torch.ones((), dtype=widest(device), device=device) * float(seed)).long()
    return torch.zeros((), dtype=torch.int64, device=device) + plain(seed)


def check_settings(num_slices: int, t_max: float, num_points: int, span: str) -> None:
    """Check the settings of `sigreg`."""
    check_count(1, num_slices=num_slices)
    check_count(2, num_points=num_points)
    check_positive(t_max=t_max)
    if span not in ("half", "full"):
        raise ValueError(f"span must be 'half' or 'full', got {span!r}")


class SIGReg(BufferedModule):
    """`sigreg` with new directions at each call in training, and a warning after 100 calls without progress.

    A call counts as stuck if the statistic is within 3 % of `degenerate_value`: the samples are then normalised or
    collapsed, and the gradient is close to zero. The buffer `stuck` counts such calls in a row, on the device. In eager
    mode the module reads it now and then, without waiting, and warns. In `torch.compile` and CUDA graphs, or to know at
    once, call `check()` at a point where your code waits for the device anyway. Under activation checkpointing call
    `sigreg` with a seed of your own, since a module that runs twice would draw twice. Calls under `torch.func` are not
    counted.

    Args:
        num_slices, t_max, num_points, span, group: as in `sigreg`.
        seed: seed of the first call; the buffer `step` counts up from it.
    """

    CALLS = 100
    BAND = 0.03
    step: Tensor
    stuck: Tensor

    def __init__(
        self,
        num_slices: int = 1024,
        *,
        t_max: float = 3.0,
        num_points: int = 17,
        span: Literal["half", "full"] = "half",
        seed: int = 0,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        check_settings(num_slices, t_max, num_points, span)
        check_seed(seed)
        self.num_slices, self.t_max, self.num_points, self.span, self.group = num_slices, t_max, num_points, span, group
        self.degenerate = degenerate_value(t_max, num_points, span)
        self.hold("step", int(seed), dtype=torch.int64)
        self.hold("stuck", 0, dtype=torch.int64)
        self._calls = 0
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._warned = False

    def forward(self, z: Tensor) -> Tensor:
        """Statistic [...] of z [..., N, D]."""
        value, samples = joint_sigreg(z, self.num_slices, self.t_max, self.num_points, self.span, self.step, self.group)
        if self.training:
            count_up(self.step)
        if transformed():
            return value
        with torch.no_grad():
            near = ((value / samples).mean() - self.degenerate).abs() < self.BAND * self.degenerate
            self.stuck.copy_((self.stuck + near) * near)
        if not torch.compiler.is_compiling():
            self._poll()
        return value

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pending": None}  # a CUDA event cannot be pickled

    def check(self) -> bool:
        """Whether the statistic has been stuck for 100 calls; warns the first time. Waits for the device."""
        return self._warn(int(self.stuck))

    def _warn(self, stuck: int) -> bool:
        if stuck >= self.CALLS and not self._warned:
            self._warned = True
            warnings.warn(
                f"SIGReg has been at its degenerate value, {self.degenerate:.3f} per sample, for {stuck} calls: "
                "are its inputs normalised to unit length, or collapsed?",
                stacklevel=4,
            )
        return stuck >= self.CALLS

    def _poll(self) -> None:
        """Every 100 calls start copying the count to the host, and read it in a later call once it has arrived."""
        if self._warned:
            return
        self._calls += 1
        if not self.stuck.is_cuda:
            if self._calls % self.CALLS == 0:
                self._warn(int(self.stuck))
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._pending is None and self._calls % self.CALLS == 0:
            arrived = torch.cuda.Event()
            host = torch.zeros((), dtype=torch.int64, device="cpu").pin_memory()
            host.copy_(self.stuck, non_blocking=True)
            arrived.record(torch.cuda.current_stream(self.stuck.device))
            self._pending = host, arrived
        elif self._pending is not None and self._pending[1].query():
            self._warn(int(self._pending[0]))
            self._pending = None
