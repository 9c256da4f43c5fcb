"""Local coding rate: the coding rate of each row's neighbourhood, instead of one of all rows.

The global rate can be high although rows collapse in pieces, since a few clusters that lie apart span many directions.
The rate of a neighbourhood sees whether rows that are close still differ. Neighbourhoods may also be given, as weights
of `coding_rate`.

Source: the rate is that of MCR² (arXiv 2006.08558), equation 6.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .coding_rate import coding_rate
from .internal.checks import check_count, check_tensors

__all__ = ["local_coding_rate", "nearest"]


@torch.no_grad()
def nearest(z: Tensor, count: int) -> Tensor:
    """Indices [..., B, count] of the rows of z [..., B, d] that are nearest to each row, itself first."""
    z = z.detach()  # forward mode would differentiate the distances
    exact = z if z.dtype == torch.float64 else z.float()
    # by differences: by products, rows far from the origin would lose their distances to rounding
    distance = torch.cdist(exact, exact, compute_mode="donot_use_mm_for_euclid_dist")
    distance.diagonal(dim1=-2, dim2=-1).fill_(-1.0)  # a row is nearest to itself, even if there are equal ones
    return distance.topk(count, largest=False).indices


def local_coding_rate(
    z: Tensor, count: int, *, alpha: float | Tensor | None = None, eps: float | Tensor | None = None
) -> Tensor:
    """Coding rate of each row and the rows nearest to it, in nats; differentiable once, in `z`.

    Each neighbourhood is centred by itself. With `count` = B, all rates are that of `coding_rate`. Which rows are
    neighbours is no part of the gradient. To give neighbourhoods instead, such as classes, use the `weights` of
    `coding_rate`.

    Args:
        z: features [..., B, d], bfloat16, float16, float32 or float64, any strides.
        count: number of rows of a neighbourhood, the row itself included; from 1 to B.
        alpha, eps: as in `coding_rate`; B is the number of rows of the neighbourhood.

    Returns:
        [..., B], float32 (float64 for float64).

    Raises:
        ValueError: a shape, dtype, device or number is not allowed.
    """
    check_tensors(z=z)
    if z.ndim < 2 or 0 in z.shape[-2:] or not z.is_floating_point():
        raise ValueError(f"z must be floating-point [..., B, d] with rows and columns, got {z.dtype} {list(z.shape)}")
    check_count(1, count=count)
    if count > z.shape[-2]:
        raise ValueError(f"count must be at most the {z.shape[-2]} rows, got {count}")
    batch, (rows, width) = math.prod(z.shape[:-2]), z.shape[-2:]
    flat = z.reshape(batch, rows, width)
    first = torch.arange(batch, device=z.device)[:, None, None] * rows
    members = flat.flatten(0, 1)[(nearest(flat, count) + first).flatten()].view(batch, rows, count, width)
    return coding_rate(members, alpha=alpha, eps=eps).view(z.shape[:-1])
