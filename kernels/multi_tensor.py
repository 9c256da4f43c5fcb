"""One launch over lists of tensors: tables of their addresses on the device, and the pieces that programs take.

A program finds its piece by number: which tensor, from which element. The pieces depend on sizes alone and are kept;
addresses are sent again when they change, by an asynchronous copy.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["PIECE", "address_table", "pieces", "same_layout"]

PIECE = 4096  # elements that one program takes
KEPT = 64
_tables: OrderedDict[tuple, tuple[Tensor, bool]] = OrderedDict()
_captured: list[Tensor] = []  # tables whose addresses are in CUDA graphs


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether the two can be walked through in step as flat memory."""
    if tensor.shape != other.shape or tensor.stride() != other.stride():
        return False
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


@functools.cache  # for good: CUDA graphs hold the address
def pieces(sizes: tuple[int, ...], device: torch.device) -> Tensor:
    """Number of the tensor and of the first element of each piece, int64 [pieces, 2]."""
    rows = [(number, start) for number, size in enumerate(sizes) for start in range(0, size, PIECE)]
    return _to_device(rows, device)


def address_table(lists: Sequence[Sequence[Tensor]], device: torch.device) -> tuple[Tensor, bool]:
    """Addresses of tensors in lists of equal length, and whether all are multiples of 16 bytes.

    Args:
        lists: L lists of T tensors; a tensor without elements has address 0.
        device: where the table goes.

    Returns:
        int64 [T, 1 + L]: elements of the first list's tensor, then an address in each list.
    """
    rows = tuple(
        (row[0].numel(), *(tensor.data_ptr() if tensor.numel() else 0 for tensor in row))
        for row in zip(*lists, strict=True)
    )
    key = (device, rows)
    if key in _tables:
        _tables.move_to_end(key)
    else:
        aligned = all(address % 16 == 0 for row in rows for address in row[1:])
        _tables[key] = _to_device(rows, device), aligned
        if len(_tables) > KEPT:
            _tables.popitem(last=False)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        _captured.append(_tables[key][0])
    return _tables[key]


def _to_device(rows: Sequence[tuple[int, ...]], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(rows, dtype=torch.int64)
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "these tensors are new to the kernel: run the step once on them before capturing it in a CUDA graph"
        )
    return torch.tensor(rows, dtype=torch.int64).pin_memory().to(device, non_blocking=True)
