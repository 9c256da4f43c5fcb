"""Modules with numbers in buffers: what becomes of these where a module is moved or cast, or leaves the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BufferedModule"]


class BufferedModule(nn.Module):
    """A module whose buffers keep their dtype where it is cast, and have their first values after `to_empty`."""

    def __init__(self):
        super().__init__()
        self._first_values: dict[str, Tensor] = {}

    def hold(self, name: str, value, *, dtype: torch.dtype, persistent: bool = True) -> None:
        """Register a buffer, under `torch.device("meta")` too; `value` is what `torch.tensor` takes."""
        first = torch.tensor(value, dtype=dtype, device="cpu")
        self._first_values[name] = first
        buffer = torch.empty_like(first, device=torch.get_default_device()).copy_(first)
        self.register_buffer(name, buffer, persistent=persistent)

    def _apply(self, function, recurse: bool = True):
        before = {name: getattr(self, name) for name in self._first_values}
        super()._apply(function, recurse)
        for name, old in before.items():
            device = getattr(self, name).device
            from_meta = old.is_meta and device.type != "meta"
            setattr(self, name, self._first_values[name].to(device, copy=True) if from_meta else old.to(device))
        return self
