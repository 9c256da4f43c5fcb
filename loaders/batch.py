"""A batch of action sequences, and functions that apply to all of its tensors."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

Views = Tensor | tuple[Tensor, ...]  # [B, V, ...]; a NamedTuple if a view has several tensors, as a graph has


class Batch(NamedTuple):
    """A batch of action sequences. B sequences of V views, the last of which is the target."""

    views: Views  # images: float32 [B, V, C, H, W], normalised
    actions: Tensor  # float32 [B, V-1, A]; action i carries view i to view i+1
    params: Tensor  # float32 [B, V, P], absolute
    labels: Tensor  # int64 [B]
    index: Tensor  # int64 [B], position in the dataset


def each(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply `change` to every tensor of `value`, which is a tensor, None, or a tuple of such values."""
    if value is None:
        return None
    if isinstance(value, tuple):
        fields = [each(field, change) for field in value]
        return type(value)(*fields) if hasattr(value, "_fields") else tuple(fields)
    return change(value)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of `value`, which has the form that `each` takes, in order."""
    if isinstance(value, tuple):
        for field in value:
            yield from tensors(field)
    elif value is not None:
        yield value


def padded(x: Tensor, size: int) -> Tensor:
    """`x` filled up to `size` rows by repeating its first row, or by zeros if it has no rows."""
    row = x[:1] if len(x) else x.new_zeros(1, *x.shape[1:])
    return torch.cat([x, row.expand(size - len(x), *x.shape[1:])])
