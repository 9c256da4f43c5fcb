"""Sums and gathers over processes that autograd, `torch.func` and `torch.compile` follow, and the groups they run in.

Every process differentiates its own loss, and data-parallel training (DDP, FSDP) averages the gradients. The backward
of a sum over processes is therefore itself a sum over processes. From gathered rows every process computes the same
loss, so each gets the gradient of its own rows, times the number of processes to make up for the averaging.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group  # pyright: ignore[reportPrivateImportUsage]

from ._ops import add_op_namespace_prefix
from .internal.transforms import differentiable

__all__ = ["gather_rows", "group_of", "name_of", "sum_over_processes"]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # torch 2.14 renames it


def name_of(group: ProcessGroup | None) -> tuple[str, int]:
    """Name and size of a process group, as operators take them; ("", 1) for no group and for a group of one process."""
    if group is None or group.size() == 1:
        return "", 1
    return group.group_name, group.size()


def group_of(name: str) -> ProcessGroup:
    """The process group that has this name."""
    return _resolve_process_group(name)  # pyright: ignore[reportArgumentType]  (GroupName is a str)


def sum_over_processes(x: Tensor, group: str) -> Tensor:
    """Elementwise sum over the processes of a group; gradients are summed as well.

    Args:
        x: any tensor, of the same shape on all processes.
        group: name of the group; not "".
    """
    return _sum(x, group)


def gather_rows(z: Tensor, group: str, size: int) -> Tensor:
    """Rows of all processes of a group, from which every process must compute the same.

    Args:
        z: rows [..., B, d], of the same shape on all processes.
        group: name of the group; not "".
        size: its number of processes.

    Returns:
        [..., size * B, d], ordered by rank. The gradient of `z` is that of its rows, times `size`.
    """
    return _gathered(z, group, size)


@torch.library.custom_op(add_op_namespace_prefix("sum_over_processes"), mutates_args=())
def _sum_over_processes(x: Tensor, group: str) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group_of(group))
    return total


@_sum_over_processes.register_fake
def _(x, group):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _sum_setup(ctx, inputs, output):
    ctx.group = inputs[1]
    return ()


def _sum_gradient(ctx, grad):
    return _sum(grad, ctx.group), None


def _sum_tangent(ctx, tangent, *_):
    return _sum(tangent, ctx.group)


_sum = differentiable(_sum_over_processes, _sum_setup, _sum_gradient, _sum_tangent)


@torch.library.custom_op(add_op_namespace_prefix("gather_rows"), mutates_args=())
def _gather_rows(z: Tensor, group: str, size: int) -> Tensor:
    own = z.movedim(-2, 0).contiguous()
    gathered = own.new_empty((size * own.shape[0], *own.shape[1:]))
    _all_gather(gathered, own, group=group_of(group))
    return gathered.movedim(0, -2).contiguous()


@_gather_rows.register_fake
def _(z, group, size):
    return z.new_empty((*z.shape[:-2], size * z.shape[-2], z.shape[-1]))


def _gather_setup(ctx, inputs, output):
    z, ctx.group, ctx.size = inputs
    ctx.rows = z.shape[-2]
    return ()


def _gather_gradient(ctx, grad):
    rank = dist.get_rank(group_of(ctx.group))
    return grad.narrow(-2, rank * ctx.rows, ctx.rows) * ctx.size, None, None


def _gather_tangent(ctx, tangent, *_):
    return _gathered(tangent, ctx.group, ctx.size)


def _gather_vmap(call):
    return lambda info, in_dims, z, group, size: (call(z.movedim(in_dims[0], 0), group, size), 0)


_gathered = differentiable(_gather_rows, _gather_setup, _gather_gradient, _gather_tangent, _gather_vmap)
