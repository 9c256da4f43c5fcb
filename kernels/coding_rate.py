"""Coding rate of a batch of features: the nats needed to encode them up to a given distortion.

    R(Z) = log det(I + c ZᵀZ),    c = alpha / B  or  c = d / (B eps)

The logarithm is natural, and there is no factor ½, which some implementations have. Rows of Z [B, d] are centred
unless `center=False`. With row weights w, Z becomes diag(√w) Z, the mean is weighted, and B is Σ w, so that hard or
soft memberships give one rate per class.

    dR/dZ = 2c diag(w) Z (I + c Zᵀ diag(w) Z)⁻¹

The d x d matrix above or its B x B counterpart is factored, whichever is smaller: rate and gradient are the same.

Source: Ma, Derksen, Hong, Wright (2007), "Segmentation of multivariate mixed data via lossy data coding and
compression"; MCR² (arXiv 2006.08558), equation 6, with eps for its squared distortion.

Gram matrix, factorisation and gradient are always computed in float32 (float64 for float64 inputs), whatever the input
dtype and the autocast or TF32 settings.
"""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ._ops import add_op_namespace_prefix
from .collectives import group_of, name_of
from .internal.backend import widest
from .internal.buffers import BufferedModule
from .internal.checks import check_positive, check_tensors, plain, readable
from .internal.cholesky import factor_logdet, inverse_of
from .internal.matmul import gram, matmul, side_to_factor
from .internal.rows import centered, exact_dtype, is_empty, root_of, rows_of, weighted_moments
from .internal.transforms import differentiable

__all__ = ["CodingRate", "coding_rate", "coding_rate_reference", "join", "joint_rate", "scale_of"]


def coding_rate_reference(z: Tensor, scale: Tensor, weights: Tensor | None = None, *, center: bool = True) -> Tensor:
    """The plain formula, for tests and benchmarks: differentiable by autograd, but slow.

    Args:
        z: [..., B, d].
        scale: alpha, or d / eps.
        weights: [..., B]; None weights all rows by 1.
        center: whether to subtract the (weighted) mean.
    """
    weights = torch.ones_like(z[..., 0]) if weights is None else weights
    mass = weights.sum(-1)[..., None, None]
    if center:
        z = z - (weights[..., None] * z).sum(-2, keepdim=True) / mass
    covariance = z.mT @ (weights[..., None] * z) / mass
    return torch.logdet(torch.eye(z.shape[-1], dtype=z.dtype, device=z.device) + scale * covariance)


@torch.library.custom_op(add_op_namespace_prefix("coding_rate"), mutates_args=())
def _forward(
    z: Tensor, weights: Tensor, scale: Tensor, center: bool, samples: bool, alone: bool, group: str, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Rate [S], info [S], mean [S, d], mass [S], c [S], factor [S, m, m] and rows y of z [S, B, d], for scale [S].

    No weights are [S, 0]. The mass is the sum of all processes' weights. Without weights and a group, mass and c are
    [0], because nothing but scale / B is needed then. With `samples` a B x B matrix is factored instead of a d x d one;
    m is that side, or a little more. The rows are [S, 0, d] if the backward pass has to compute them again.
    """
    if weights.numel():
        mean, mass = weighted_moments(z, weights, center)
        y = rows_of(z, weights, center, mean)
    else:
        y, mean = centered(z, center)
        mass = scale.new_full(scale.shape, z.shape[1]) if group else scale.new_empty(0)
    sides = y if samples else y.mT
    side = _side(z, samples, group)
    if group:
        local = gram(sides, torch.ones_like(mass))
        matrix, mean, mass = join(local, mean, mass, group, size)
    c = torch.where(is_empty(mass), 0.0, scale / mass) if mass.numel() else mass.new_empty(0)
    if group:
        matrix *= c[:, None, None]
        matrix.diagonal(dim1=-2, dim2=-1).add_(1)
    elif mass.numel():
        matrix = gram(sides, c, identity=True, side=side)
    else:
        matrix = gram(sides, scale, times=1 / z.shape[1], identity=True, side=side)
    rate, factor, info = factor_logdet(matrix, alone=alone)
    y = y.contiguous() if _are_kept(weights, center, group) else rate.new_empty((z.shape[0], 0, z.shape[2]))
    return rate, info, mean, mass, c, factor, y


def _side(z: Tensor, samples: bool, group: str) -> int:
    n = z.shape[1] if samples else z.shape[2]
    return n if group else side_to_factor(n, z)


def _are_kept(weights: Tensor, center: bool, group: str) -> bool:
    """Whether the backward pass gets the rows less their mean.

    The mean of a group's rows is known only after they were used, and with weights there can be rows for each of many
    classes.
    """
    return center and not (weights.numel() or group)


def join(local: Tensor, mean: Tensor, mass: Tensor, group: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix, mean and mass of all processes' rows, by one all-reduce of a packed buffer.

    Each process writes its mean and mass into a slot of its own. All of them then know all means, and the scatter
    between processes is a sum of squares rather than a small difference of large numbers.
    """
    batch, width = mean.shape
    slots = local.new_zeros((size, batch, 2 * width + 1))
    upper = mean.to(local.dtype)
    slots[dist.get_rank(group_of(group))] = torch.cat([upper, (mean - upper).to(local.dtype), mass[:, None]], dim=-1)
    packed = torch.cat([local.flatten(), slots.flatten()])
    dist.all_reduce(packed, group=group_of(group))
    matrix = packed[: local.numel()].view_as(local)
    upper, lower, masses = packed[local.numel() :].view_as(slots).transpose(0, 1).split([width, width, 1], dim=-1)
    exact = widest(upper.device)
    means = upper.to(exact) + lower.to(exact)  # [S, processes, d]
    mass = masses.sum((1, 2))
    mean = torch.where(is_empty(mass)[:, None], 0.0, (masses * means).sum(1) / mass[:, None])
    between = masses.sqrt() * (means - mean[:, None]).to(local.dtype)
    return matrix + gram(between.mT, torch.ones_like(mass)), mean, mass


@_forward.register_fake
def _(z, weights, scale, center, samples, alone, group, size):
    batch, rows, width = z.shape
    side = _side(z, samples, group)
    rate = z.new_empty(batch, dtype=exact_dtype(z))
    info, mean = rate.new_empty(batch, dtype=torch.int32), rate.new_empty((batch, width), dtype=widest(rate.device))
    mass = rate.new_empty(batch if group or weights.numel() else 0)
    y = rate.new_empty((batch, rows if _are_kept(weights, center, group) else 0, width))
    return rate, info, mean, mass, torch.empty_like(mass), rate.new_empty((batch, side, side)), y


@torch.library.custom_op(add_op_namespace_prefix("coding_rate_backward"), mutates_args=())
def _backward(
    grad: Tensor, z: Tensor, weights: Tensor, scale: Tensor, info: Tensor, mean: Tensor, mass: Tensor, c: Tensor,
    factor: Tensor, y: Tensor, center: bool, samples: bool, alone: bool, weighted: bool, group: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of z and of the weights, the latter [S, 0] unless `weighted`."""
    c, times = (c, 2.0) if mass.numel() else (scale, 2 / z.shape[1])
    n = z.shape[1] if samples else z.shape[2]
    inverse = inverse_of(factor, info, c, times=times, alone=alone)[:, :n, :n]  # 2c M⁻¹
    if not weighted:
        y = y if _are_kept(weights, center, group) else rows_of(z, weights, center, mean)
        rows = grad[:, None].expand(z.shape[:2]) if not weights.numel() else grad[:, None] * weights.sqrt()
        dz = matmul(inverse, y, rows, z.dtype) if samples else matmul(y, inverse, rows, z.dtype)
        return dz, weights.new_empty((len(z), 0))
    y, root = rows_of(z, weights.new_empty(0), center, mean), root_of(weights)
    # rows 2c z_i M⁻¹; with Y = diag(√w) Z they are those of 2c diag(√w)⁻¹ (I + c Y Yᵀ)⁻¹ Y
    solved = matmul(inverse, root[..., None] * y, 1 / root) if samples else matmul(y, inverse)
    dz = (grad[:, None] * weights)[..., None] * solved
    # c = scale / Σ w falls as a weight grows: d log det M / d log c = tr(I - M⁻¹) = c Σ w_i z_i M⁻¹ z_iᵀ. No term of
    # this sum is negative, while d - tr M⁻¹ would suffer from cancellation
    leverage = (y * solved).sum(-1) / 2
    total = (weights * leverage).sum(-1)
    if group:
        dist.all_reduce(total, group=group_of(group))
    average = torch.where(is_empty(mass), 0.0, total / mass)
    dw = grad[:, None] * (leverage - average[:, None])
    return dz.to(z.dtype), dw.to(weights.dtype)


@_backward.register_fake
def _(grad, z, weights, scale, info, mean, mass, c, factor, y, center, samples, alone, weighted, group):
    return z.new_empty(z.shape), weights.new_empty(weights.shape if weighted else (z.shape[0], 0))


_gradient = differentiable(_backward)
NO_SCALE = "coding_rate has no derivative in alpha and eps"


def _setup(ctx, inputs, output):
    z, weights, scale, ctx.center, ctx.samples, ctx.alone, ctx.group, ctx.size = inputs
    ctx.mark_non_differentiable(*output[1:])
    return z, weights, scale, *output[1:]


def _differentiate(ctx, grad, *_):
    _, weighted, scaled, *_ = ctx.needs_input_grad
    if scaled:
        raise RuntimeError(NO_SCALE)
    if ctx.group:
        grad = grad * ctx.size  # makes up for data-parallel training, which averages gradients over processes
    dz, dw = _gradient(grad, *ctx.saved_tensors, ctx.center, ctx.samples, ctx.alone, weighted, ctx.group)
    return dz, dw if weighted else None, None, None, None, None, None, None


def _tangent(ctx, z_tangent, weights_tangent, scale_tangent, *_):
    """Forward mode: the gradient times the tangents."""
    if scale_tangent is not None:
        raise RuntimeError(NO_SCALE)
    if ctx.group:
        raise RuntimeError("coding_rate has no forward-mode derivative over several processes; use reverse mode")
    z, weights, scale, *rest = ctx.saved_tensors
    weighted = weights_tangent is not None
    z, grad = z.to(scale.dtype), torch.ones_like(scale)  # a gradient in bfloat16 would be rounded before it is used
    dz, dw = _gradient(grad, z, weights, scale, *rest, ctx.center, ctx.samples, ctx.alone, weighted, ctx.group)
    tangent = torch.zeros_like(scale)
    if z_tangent is not None:
        tangent = tangent + (dz * z_tangent).sum((-2, -1))
    if weighted:
        tangent = tangent + (dw * weights_tangent).sum(-1)
    return tangent, None, None, None, None, None, None


_rate = differentiable(_forward, _setup, _differentiate, _tangent)


@overload
def coding_rate(
    z: Tensor,
    *,
    alpha: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    center: bool = True,
    weights: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_info: Literal[False] = False,
) -> Tensor: ...
@overload
def coding_rate(
    z: Tensor,
    *,
    alpha: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    center: bool = True,
    weights: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_info: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def coding_rate(
    z: Tensor,
    *,
    alpha: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    center: bool = True,
    weights: Tensor | None = None,
    group: ProcessGroup | None = None,
    return_info: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Coding rate log det(I + c ZᵀZ) of each batch of rows, in nats; differentiable once, in `z` and `weights`.

    It never waits for the device and can be captured in a CUDA graph. Give exactly one of `alpha` and `eps`. Its value
    may change between steps without recompilation and, as a 0-dim tensor on the device of `z`, without a new capture.

    Args:
        z: features [..., B, d], bfloat16, float16, float32 or float64, any strides.
        alpha: scale of the covariance, c = alpha / B; positive.
        eps: distortion, c = d / (B eps); positive.
        center: whether to subtract the mean of the rows.
        weights: membership of the rows, [..., B], not negative, broadcast against the leading dimensions of `z`: with
            z [B, d] and weights [k, B] there are k rates. B is then the sum of the weights; a class without members
            has rate 0.
        group: processes whose rows form one batch; each may bring any number of rows, or none. Every process gets the
            rate of the joint batch. Gradients are those of the joint batch times the number of processes, so that
            they are exact after data-parallel training has averaged them. A d x d matrix is factored, even if B < d.
        return_info: whether to return the status of the factorisation as well.

    Returns:
        Rates [...], float32 (float64 for float64). Rates and gradients are NaN where `z` holds NaN or the factorisation
        fails, which can happen if the condition number of I + c ZᵀZ is 2²² or more. With `return_info` also int32
        [...]: 0, or the number of the first pivot that was not positive, counted from 1.

    Raises:
        ValueError: a shape, dtype, device or number is not allowed.

    Source: MCR² (arXiv 2006.08558), equation 6; SimDINO (arXiv 2502.10385), equation 7.
    """
    rate, info, _ = joint_rate(z, alpha, eps, center, weights, group)
    return (rate, info) if return_info else rate


def joint_rate(
    z: Tensor,
    alpha: float | Tensor | None,
    eps: float | Tensor | None,
    center: bool,
    weights: Tensor | None,
    group: ProcessGroup | None,
) -> tuple[Tensor, Tensor, Tensor | int]:
    """What `coding_rate` returns with `return_info`, and the sum of B over the processes, [...], or B."""
    name, size = name_of(group)
    scale = scale_of(z, alpha, eps, name)
    lead, (rows, width) = z.shape[:-2], z.shape[-2:]
    if weights is not None:
        lead = _check_weights(z, weights)
        z = z.expand(*lead, rows, width)
    batch = math.prod(lead)
    if weights is None:
        given = scale.new_empty((batch, 0))
    else:
        given = weights.to(scale.dtype).expand(*lead, rows).reshape(batch, rows)
    # several processes must factor the same side, although their numbers of rows may differ
    samples = rows < width and not name
    flat = z.reshape(batch, rows, width)
    rate, info, _, mass, *_ = _rate(flat, given, scale.expand(batch), center, samples, batch == 1, name, size)
    return rate.view(lead), info.view(lead), mass.view(lead) if name or weights is not None else rows


def scale_of(z: Tensor, alpha: float | Tensor | None, eps: float | Tensor | None, group: str) -> Tensor:
    """alpha, or d / eps, as a 0-dim tensor on the device of `z`; checks both."""
    check_tensors(z=z)
    if z.ndim < 2 or z.shape[-1] == 0 or (z.shape[-2] == 0 and not group) or not z.is_floating_point():
        raise ValueError(f"z must be floating-point [..., B, d] with rows and columns, got {z.dtype} {list(z.shape)}")
    name, value = _given(alpha, eps)
    if isinstance(value, Tensor) and (value.ndim or value.device != z.device or value.requires_grad):
        raise ValueError(
            f"{name} must be 0-dim, without gradient, on {z.device} like z, "
            f"got {list(value.shape)} on {value.device}{' with gradient' if value.requires_grad else ''}"
        )
    check_positive(**{name: value})
    if not isinstance(value, Tensor) and not torch.compiler.is_compiling():
        number = float(plain(value))
        return z.new_full((), number if eps is None else z.shape[-1] / number, dtype=exact_dtype(z))
    if not isinstance(value, Tensor):
        value = z.new_ones((), dtype=exact_dtype(z)) * value  # torch.full would be recompiled for each value
    # also NumPy numbers, which torch.compile traces as tensors; a copy, since a schedule may write to the user's tensor
    value = value.to(exact_dtype(z), copy=True)
    return value if eps is None else z.shape[-1] / value


def _given(alpha: float | Tensor | None, eps: float | Tensor | None) -> tuple[str, float | Tensor]:
    """Name and value of the one that is not None."""
    if alpha is not None and eps is None:
        return "alpha", alpha
    if eps is not None and alpha is None:
        return "eps", eps
    raise ValueError("exactly one of alpha and eps must be given")


def _check_weights(z: Tensor, weights: Tensor) -> torch.Size:
    """The leading dimensions of z and the weights, broadcast against each other."""
    check_tensors(weights=weights)
    if weights.ndim < 1 or weights.shape[-1] != z.shape[-2] or not weights.is_floating_point():
        raise ValueError(
            f"weights must be floating-point [..., {z.shape[-2]}], one per row of z, "
            f"got {weights.dtype} {list(weights.shape)}"
        )
    if weights.device != z.device:
        raise ValueError(f"weights are on {weights.device}, z is on {z.device}")
    if readable(weights) and (weights < 0).any():
        raise ValueError(f"weights must not be negative, got {weights.min().item()}")
    try:
        return torch.broadcast_shapes(z.shape[:-2], weights.shape[:-1])
    except RuntimeError:
        raise ValueError(
            f"weights {list(weights.shape)} and z {list(z.shape)} must have leading dimensions that broadcast"
        ) from None


class CodingRate(BufferedModule):
    """`coding_rate` as a module. `alpha` or `eps` is a float32 buffer, which a schedule may write to."""

    alpha: Tensor | None
    eps: Tensor | None

    def __init__(
        self,
        *,
        alpha: float | None = None,
        eps: float | None = None,
        center: bool = True,
        group: ProcessGroup | None = None,
    ):
        super().__init__()
        name, value = _given(alpha, eps)
        check_positive(**{name: value})
        self.center = center
        self.group = group
        self.hold(name, float(value), dtype=torch.float32)
        self.register_buffer("eps" if eps is None else "alpha", None)

    def forward(self, z: Tensor, weights: Tensor | None = None) -> Tensor:
        """Rates [...] of z [..., B, d]."""
        return coding_rate(z, alpha=self.alpha, eps=self.eps, center=self.center, weights=weights, group=self.group)
