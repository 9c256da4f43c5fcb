"""One launch over lists of tensors, by a table of their addresses on the device.

All tensors are cut into pieces of the same size, and every program takes one piece. A row of the table describes a
tensor: its number of elements, the number of its first piece, and its address in each list. A second table has the
number of its row for each piece.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .backend import jit, tl

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is private: without it, every call checks and sorts its tensors anew
    TensorGuards = None

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = [
    "PIECE",
    "Table",
    "address_table",
    "find_piece",
    "kept",
    "local",
    "pointer",
    "recalled",
    "remember",
    "same_layout",
    "sent",
]

PIECE = 2048  # elements that one program takes, in one access of each thread to each tensor
KEPT = 4096  # tables in the cache, a few kilobytes each
PLANS = 256  # a list of numbers each, and what identifies their tensors
_kept: OrderedDict[tuple, tuple[int | None, Any]] = OrderedDict()  # with the stream on which it was made
_held: WeakKeyDictionary[torch.UntypedStorage, dict[int, Any]] = WeakKeyDictionary()  # by what lasts as long
_plans: dict[tuple, tuple[Any, Any]] = {}


class Table:
    """Addresses of T tensors in L lists of equal length; an empty tensor has address 0.

    Attributes:
        rows: int64 [T, 2 + L] on the device.
        pieces: int32 [P] on the device, the row of each piece.
        aligned: whether all addresses are multiples of 16 bytes.

    Raises:
        ValueError: a tensor is on another device.
    """

    def __init__(self, lists: Sequence[Sequence[Tensor]], device: torch.device, lasting: Tensor):
        for tensor in (tensor for tensors in lists for tensor in tensors):
            if tensor.device != device:
                raise ValueError(
                    f"a tensor of shape {list(tensor.shape)} is on {tensor.device}, the first is on {device}"
                )
        counts = torch.tensor([tensor.numel() for tensor in lists[0]], dtype=torch.int64, device="cpu")
        pieces = (counts + PIECE - 1) // PIECE
        columns = torch.tensor([list(map(Tensor.data_ptr, tensors)) for tensors in lists], device="cpu")
        rows = torch.cat([torch.stack([counts, pieces.cumsum(0) - pieces]), columns]).T
        named = torch.arange(len(counts), dtype=torch.int32, device="cpu").repeat_interleave(pieces)
        self.rows = sent(rows.contiguous(), device)
        # apart from the addresses, of which there may be many: it has four bytes for each piece
        self.pieces = kept(("pieces", *counts.tolist()), device, lasting, lambda: sent(named, device))
        self.aligned = not (columns % 16).any()


def recalled(use: str, lists: Sequence[Sequence[Tensor]]) -> Any:
    """The plan that was remembered for plain tensors like these; None if there is none, or they are not plain now.

    Values and addresses may be others than they were, but not a class, dtype, device, layout, shape or stride. Lists
    that name a tensor twice are not remembered.
    """
    # what else traces or transforms operations changes the dispatch keys, which are compared too
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    guard, plan = _plans.get((use, id(lists[0][0]), *map(len, lists)), (None, None))
    return plan if guard is not None and guard.check(*itertools.chain(*lists)) else None


def remember(use: str, lists: Sequence[Sequence[Tensor]], plan: Any) -> None:
    """Keep a plan for `recalled`, but not the tensors."""
    if TensorGuards is None:
        return
    if len(_plans) >= PLANS:
        _plans.clear()
    guard = TensorGuards(*itertools.chain(*lists), dynamic_dims_sizes=None, dynamic_dims_strides=None)
    _plans[use, id(lists[0][0]), *map(len, lists)] = guard, plan


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


def address_table(lists: Sequence[Sequence[Tensor]], device: torch.device, lasting: Tensor) -> Table:
    """Table of tensors in lists of equal length; one that was made for the same addresses is taken again."""
    key = (len(lists), *map(Tensor.numel, lists[0]), *map(Tensor.data_ptr, itertools.chain(*lists)))
    return kept(key, device, lasting, lambda: Table(lists, device, lasting))


def kept(key: tuple, device: torch.device, lasting: Tensor, make: Callable[[], Any]) -> Any:
    """What `make` puts on the device, made once for each key.

    A CUDA graph takes what was made before its capture, and it is then held for as long as there is the memory of
    `lasting`: one of the tensors that the graph writes to, without which it is of no use either. What the capture is
    the first to need is part of the graph: each replay makes it anew.
    """
    key, capturing, stream = (device, *key), False, None
    if device.type == "cuda":
        capturing = torch.cuda.is_current_stream_capturing()
        stream = torch._C._cuda_getCurrentRawStream(device.index)  # a copy is ordered on its own stream only
    made, value = _kept.get(key, (None, None))
    if capturing:
        if value is None:
            return make()
        _held.setdefault(lasting.untyped_storage(), {})[id(value)] = value
    elif value is None or made != stream:
        value = make()
        _kept[key] = stream, value
        if len(_kept) > KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(key)
    return value


def sent(host: Tensor, device: torch.device) -> Tensor:
    """A tensor on the CPU, copied to the device without waiting."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


@jit
def find_piece(table, pieces, COLUMNS: tl.constexpr, PIECE: tl.constexpr):
    """Number of this program's tensor, pointer to its row, index of its first element, and how many follow."""
    i_tensor = tl.load(pieces + tl.program_id(0))
    row = table + i_tensor * COLUMNS
    first = (tl.program_id(0) - tl.load(row + 1)) * PIECE
    return i_tensor, row, first, tl.load(row) - first


@jit
def pointer(row, i_list, first, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `first` of the tensor of a row, in list `i_list`."""
    address = tl.load(row + 2 + i_list).to(tl.pointer_type(DTYPE))  # pyright: ignore[reportArgumentType]
    if ALIGNED:  # said of the pointer: a cast from an integer forgets it
        address = tl.multiple_of(address, 16)
    return address + first
