"""What a coding rate says of a batch: the rate, its share of the largest one, the effective rank and the spectrum.

All four follow from the eigenvalues of one Gram matrix of the rows, B x B or d x d, whichever is smaller.

Source: MCR² (arXiv 2006.08558), equation 6; Roy & Vetterli (2007), "The effective rank"; RankMe (arXiv 2210.02885).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ._ops import add_op_namespace_prefix
from .coding_rate import join, scale_of
from .collectives import name_of
from .internal.backend import full_precision, widest
from .internal.matmul import gram
from .internal.rows import centered, exact_dtype, torch_rows
from .internal.transforms import differentiable

__all__ = ["CodingRateStats", "coding_rate_stats"]


@torch.library.custom_op(add_op_namespace_prefix("coding_rate_gram"), mutates_args=())
def _gram(z: Tensor, center: bool, samples: bool, group: str, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gram matrix [S, n, n], mean [S, d] and number [S] of the rows z [S, B, d] of all processes."""
    y, mean = centered(z, center)
    mass = z.new_full((z.shape[0],), z.shape[1], dtype=exact_dtype(z))
    matrix = gram(y if samples else y.mT, torch.ones_like(mass))
    return join(matrix, mean, mass, group, size) if group else (matrix, mean, mass)


@_gram.register_fake
def _(z, center, samples, group, size):
    batch, rows, width = z.shape
    n = rows if samples else width
    mass = z.new_empty(batch, dtype=exact_dtype(z))
    return mass.new_empty((batch, n, n)), mass.new_empty((batch, width), dtype=widest(mass.device)), mass


def _gram_setup(ctx, inputs, output):
    z, ctx.center, ctx.samples, ctx.group, _ = inputs
    ctx.mark_non_differentiable(*output[1:])
    return z, output[1]


def _gram_tangent(ctx, tangent, *_):
    if ctx.group:
        raise RuntimeError("coding_rate_stats has no forward-mode derivative over several processes")
    z, mean = ctx.saved_tensors
    y, tangent = torch_rows(z, mean.new_empty(0), ctx.center, mean), tangent.to(exact_dtype(z))
    if ctx.center:
        tangent = tangent - tangent.mean(-2, keepdim=True)
    with full_precision(z.device):
        half = tangent @ y.mT if ctx.samples else tangent.mT @ y
    return half + half.mT, None, None


_stats_gram = differentiable(_gram, _gram_setup, jvp=_gram_tangent)


class CodingRateStats(NamedTuple):
    """Result of `coding_rate_stats`; the leading dimensions are those of `z`."""

    rate: Tensor
    """Coding rate in nats, [...]."""
    rate_fraction: Tensor
    """R / R_max, [...]. R_max is the rate of an isotropic batch with the same energy, n log(1 + c tr(ZᵀZ) / n). It is 0
    for a batch whose energy is 0."""
    effective_rank: Tensor
    """exp of the entropy of the normalised singular values of Z, [...]; at least 1. Roy & Vetterli (2007); RankMe."""
    spectrum: Tensor
    """Eigenvalues of the (centred) covariance ZᵀZ / B in descending order, [..., min(B, d)]."""


@torch.no_grad()
def coding_rate_stats(
    z: Tensor,
    *,
    alpha: float | Tensor | None = None,
    eps: float | Tensor | None = None,
    center: bool = True,
    group: ProcessGroup | None = None,
) -> CodingRateStats:
    """Rate, fraction of its maximum, effective rank and spectrum, all from one Gram matrix.

    For logs and evaluations: computing eigenvalues takes longer than the rate alone, and waits for a GPU. Forward mode
    differentiates the results; reverse mode treats them as constants.

    Args:
        z: features [..., B, d]; this and the other arguments are those of `coding_rate`.

    Raises:
        ValueError: as in `coding_rate`.
    """
    name, size = name_of(group)
    scale = scale_of(z, alpha, eps, name)
    lead, (rows, width) = z.shape[:-2], z.shape[-2:]
    flat = z.reshape(math.prod(lead), rows, width)
    matrix, _, mass = _stats_gram(flat, center, rows < width and not name, name, size)
    if name:
        rows = int(mass.amax()) if len(mass) else 0
    finite = matrix.isfinite().all(-1).all(-1)[:, None]
    # one matrix with NaN would make eigvalsh fail for all of them
    values = torch.linalg.eigvalsh(torch.where(finite[..., None], matrix, 0.0)).flip(-1).clamp(min=0)
    rank = max(min(rows - int(center), width), 1)  # centring removes one dimension
    values = values[:, : min(rows, width)]
    values[:, rank:] = 0
    spectrum = torch.where(finite, values / mass[:, None], float("nan"))
    energy = spectrum.sum(-1)
    rate = torch.log1p(scale * spectrum).sum(-1)
    largest = rank * torch.log1p(scale * energy / rank)
    singular = spectrum[:, :rank].sqrt()  # without those that are always zero, where a root has no derivative
    share = torch.where(energy[:, None] == 0, 0.0, singular / singular.sum(-1, keepdim=True))
    entropy = -torch.xlogy(share, share).sum(-1)
    rate_fraction = torch.where(largest == 0, 0.0, rate / largest)
    return CodingRateStats(
        rate.view(lead), rate_fraction.view(lead), entropy.exp().view(lead), spectrum.view(*lead, spectrum.shape[-1])
    )
