"""One launch over lists of tensors, by a table of their addresses on the device.

All tensors are cut into pieces of the same size, and every program takes one piece, whose tensor it looks up in the
table. A row of the table describes a tensor: its number of elements, the number of its first piece, and its address in
each list.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

from .backend import jit, tl

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["PIECE", "Table", "address_table", "find_piece", "local", "pointer", "same_layout", "sent"]

PIECE = 4096  # elements that one program takes
KEPT = 4096  # tables in the cache, a few kilobytes each
ARENA = 2**17  # addresses in pinned memory for CUDA graphs, one MiB
_tables: OrderedDict[tuple, Tensor] = OrderedDict()
_arena: list[Tensor] = []


class Table:
    """Addresses of T tensors in L lists.

    Attributes:
        rows: int64 [T, 2 + L] on the device.
        num_tensors: T.
        num_pieces: programs to launch.
        aligned: whether all addresses are multiples of 16 bytes.
    """

    def __init__(self, rows: Tensor, num_tensors: int, num_pieces: int, aligned: bool):
        self.rows, self.num_tensors, self.num_pieces, self.aligned = rows, num_tensors, num_pieces, aligned


def local(tensor: Tensor, like: Tensor, redistribute: bool = False) -> Tensor:
    """The shard of a DTensor that this process holds; any other tensor unchanged.

    Args:
        tensor: a DTensor or any other tensor.
        like: a tensor that must be sharded in the same way, since both are processed elementwise.
        redistribute: whether `tensor` may be redistributed to the placements of `like`; only if it is not written.

    Raises:
        ValueError: the two are not placed alike.
    """
    own, other = _sharding(tensor), _sharding(like)
    if _is_dtensor(tensor) and other is not None and redistribute and own != other:
        tensor, own = tensor.redistribute(*other), other
    if own != other:
        raise ValueError(
            f"a tensor of shape {list(tensor.shape)} is {_described(own)}, "
            f"the one that belongs to it {_described(other)}: shard both alike"
        )
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    return hasattr(tensor, "to_local")  # importing the class would take half a second


def _sharding(tensor: Tensor) -> tuple | None:
    """Mesh and placements of a DTensor, as FSDP2 makes them; None for any other tensor."""
    return (tensor.device_mesh, tensor.placements) if _is_dtensor(tensor) else None


def _described(sharding: tuple | None) -> str:
    return "not sharded" if sharding is None else f"a DTensor with placements {sharding[1]}"


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether both can be processed elementwise as flat memory: dense, and of the same strides."""
    if tensor.shape != other.shape:
        return False
    if tensor.is_contiguous() and other.is_contiguous():
        return True
    channels_last = torch.channels_last
    if tensor.ndim == 4 and all(t.is_contiguous(memory_format=channels_last) for t in (tensor, other)):
        return True
    steps = _steps(tensor)
    if steps != _steps(other):
        return False
    expected = 1
    for stride, size in sorted(steps):
        if stride != expected:
            return False
        expected *= size
    return True


def _steps(tensor: Tensor) -> list[tuple[int, int]]:
    """Strides and sizes, without dimensions of size 1, whose stride does not matter."""
    return [(stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1]


def address_table(lists: Sequence[Sequence[Tensor]], device: torch.device) -> Table:
    """Table of tensors in lists of equal length; an empty tensor has address 0.

    Raises:
        ValueError: a tensor is on another device.
    """
    rows, num_pieces = [], 0
    for row in zip(*lists, strict=True):
        for tensor in row:
            if tensor.device != device:
                raise ValueError(
                    f"a tensor of shape {list(tensor.shape)} is on {tensor.device}, the first is on {device}"
                )
        count = row[0].numel()
        rows.append((count, num_pieces, *(tensor.data_ptr() if tensor.numel() else 0 for tensor in row)))
        num_pieces += -(-count // PIECE)
    aligned = all(address % 16 == 0 for row in rows for address in row[2:])
    return Table(sent(tuple(rows), device), len(rows), num_pieces, aligned)


def sent(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """The rows as an int64 tensor on the device, copied without waiting; recent ones are cached."""
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64, device="cpu")
    if torch.cuda.is_current_stream_capturing():
        return _in_graph(rows, device)
    if not _arena:
        _arena.append(torch.zeros(ARENA, dtype=torch.int64, device="cpu").pin_memory())
    key = (torch.cuda.current_stream(device).cuda_stream, device, rows)  # a copy is ordered on its own stream only
    if key in _tables:
        _tables.move_to_end(key)
    else:
        _tables[key] = torch.tensor(rows, dtype=torch.int64, device="cpu").pin_memory().to(device, non_blocking=True)
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    return _tables[key]


def _in_graph(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """During a capture: the graph copies the rows at each replay, from pinned memory that is never reused."""
    host = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if not _arena or _arena[0].numel() < host.numel():
        raise RuntimeError(
            "pinned memory cannot be allocated during the capture of a CUDA graph: run one step before capturing"
            if not _arena
            else "the pinned memory for addresses in CUDA graphs is used up: capture fewer graphs, or fewer tensors"
        )
    kept = _arena[0][: host.numel()].view(host.shape)
    _arena[0] = _arena[0][host.numel() :]
    kept.copy_(host)
    return torch.empty(host.shape, dtype=torch.int64, device=device).copy_(kept, non_blocking=True)


@jit
def find_piece(table, T, COLUMNS: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Number of this program's tensor, pointer to its row, and index of its first element."""
    o = tl.arange(0, BLOCK_T)
    b_first = tl.load(table + o * COLUMNS + 1, mask=o < T, other=2**31)
    i_tensor = (b_first <= tl.program_id(0)).to(tl.int32).sum(axis=0) - 1
    row = table + i_tensor * COLUMNS
    return i_tensor, row, (tl.program_id(0) - tl.load(row + 1)) * PIECE


@jit
def pointer(row, i_list, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `start` of the tensor of a row, in list `i_list`."""
    address = tl.load(row + 2 + i_list)
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address.to(tl.pointer_type(DTYPE)) + tl.multiple_of(start, 16)  # pyright: ignore[reportArgumentType]
