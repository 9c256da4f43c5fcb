"""A batch of action sequences, and what is done to all of its tensors alike."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Views = Tensor | tuple[Tensor, ...]  # [B, V, ...]; several tensors are a NamedTuple, as of graphs or grids


class Batch(NamedTuple):
    """A batch of action sequences. B sequences of V views, the last of which is the target."""

    views: Views  # images: float32 [B, V, C, H, W], normalised
    actions: Tensor  # float32 [B, V-1, A]; action i carries view i to view i+1
    params: Tensor  # float32 [B, V, P], absolute
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position in the dataset


def each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """`value` with every tensor in it changed: a tensor, None, or a NamedTuple of such values."""
    if value is None:
        return None
    if isinstance(value, tuple):
        return type(value)(*(each(field, change) for field in value))
    return change(value)


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value of the same form, in order."""
    if isinstance(value, tuple):
        for field in value:
            yield from tensors(field)
    elif value is not None:
        yield value


def padded(x: Tensor, size: int) -> Tensor:
    """`x` with its first row repeated up to `size` rows; zeros where it has none."""
    row = x[:1] if len(x) else x.new_zeros(1, *x.shape[1:])
    return torch.cat([x, row.expand(size - len(x), *x.shape[1:])])
