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
from .characteristic import (
    TracedSums,
    cached,
    compared,
    eager_gradient,
    knots,
    launch_gradient,
    plain_gradient,
    spacing,
    sums_of,
    table,
)
from .collectives import group_of, name_of
from .directions import directions
from .internal.backend import uses_triton, widest
from .internal.buffers import BufferedModule
from .internal.checks import check_count, check_positive, check_tensors, plain, real
from .internal.matmul import matmul
from .internal.transforms import count_up, differentiable, folded, transformed

__all__ = ["SIGReg", "degenerate_value", "directions", "sigreg", "sigreg_reference"]

MANY = 2**20  # projections: so many are computed again on a GPU, instead of being kept for the backward pass


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


@torch.library.custom_op(add_op_namespace_prefix("sigreg"), mutates_args=())
def _forward(
    z: Tensor, seed: Tensor, num_slices: int, t_max: float, num_points: int, span: str, group: str, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Statistic [S] of z [S, N, D], number of samples of a group's processes [S], and three tensors for the gradient.

    These are directions [D, K], projections [S, N, K], or [S, 0, K] if they are not kept, and differences from φ
    [S, 2, knots, K]. Without a group there is no number of samples, [0].
    """
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    unit = directions(seed, z.shape[-1], num_slices).to(exact)
    x = matmul(z, unit.expand(z.shape[0], -1, -1))
    spaced = spacing(t_max, num_points, span)
    sums = sums_of(x, spaced)
    x = x if _are_kept(z, num_slices) else x.new_empty((z.shape[0], 0, num_slices))
    samples = sums.new_full((z.shape[0] if group else 0,), z.shape[1])
    if uses_triton(z) and not group:
        statistic, difference = compared(sums, z.shape[1], spaced)
        return statistic, samples, unit, x, difference
    sums = sums.sum(1)
    total = z.shape[1]
    if group:
        packed = torch.cat([sums.flatten(1), samples[:, None]], dim=1)
        dist.all_reduce(packed, group=group_of(group))
        sums, samples = packed[:, :-1].view_as(sums), packed[:, -1].clone()
        total = samples.clamp(min=1)[:, None, None, None]  # no process may have a sample
    _, phi, weight = table(spaced, x)
    difference = sums / total
    difference[:, 0] -= phi
    statistic = (samples if group else total) * ((difference**2).sum(1) * weight).sum(1).mean(-1)
    return statistic, samples, unit, x, difference


def _are_kept(z: Tensor, num_slices: int) -> bool:
    """Whether the backward pass gets the projections; with Triton, many of them are one more product instead."""
    return not uses_triton(z) or z.shape[0] * z.shape[1] * num_slices < MANY


@_forward.register_fake
def _(z, seed, num_slices, t_max, num_points, span, group, size):
    exact = torch.float64 if z.dtype == torch.float64 else torch.float32
    batch, rows, width = z.shape
    count = spacing(t_max, num_points, span)[2]
    shapes = (
        (batch,),
        (batch if group else 0,),
        (width, num_slices),
        (batch, rows if _are_kept(z, num_slices) else 0, num_slices),
        (batch, 2, count, num_slices),
    )
    return tuple(z.new_empty(shape, dtype=exact) for shape in shapes)


@torch.library.custom_op(add_op_namespace_prefix("sigreg_backward"), mutates_args=())
def _backward(
    grad: Tensor, z: Tensor, unit: Tensor, x: Tensor, difference: Tensor, t_max: float, num_points: int, span: str
) -> Tensor:
    """Gradient [S, N, D] w.r.t. the samples z, which are an argument so that a second derivative raises an error."""
    spaced = spacing(t_max, num_points, span)
    back = unit.mT.expand(x.shape[0], -1, -1)
    if uses_triton(x):
        kept = x.shape[1] == z.shape[1]
        x = x if kept else matmul(z, back.mT)
        slopes = torch.empty_like(x) if kept else x
        launch_gradient(x, difference, grad, spaced, out=slopes)
        return matmul(slopes, back, dtype=z.dtype)
    t, _, weight = table(spaced, x)
    slopes = difference * (2 * t * weight) * (grad / x.shape[-1])[:, None, None, None]
    if x.device.type != "cpu":
        return matmul(plain_gradient(x, slopes, spaced), back, dtype=z.dtype)
    dz = torch.empty_like(z, memory_format=torch.contiguous_format)
    for part, out in zip(cached(x, x.shape[2]), cached(dz, x.shape[2]), strict=True):
        out.copy_(matmul(eager_gradient(part, slopes, spaced), back))
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


def _traced(z: Tensor, seed: Tensor, num_slices: int, t_max: float, num_points: int, span: str) -> Tensor:
    """The statistic [S] for torch.compile on a CPU, whose loops over knots are faster than eager operations."""
    unit = _directions(seed, z.shape[-1], num_slices).to(torch.float64 if z.dtype == torch.float64 else torch.float32)
    spaced = spacing(t_max, num_points, span)
    sums = TracedSums.apply(_projected(z, unit), *spaced)
    _, phi, weight = table(spaced, unit)
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
    check_tensors(z=z)
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
