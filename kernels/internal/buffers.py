"""Modules that hold settings in buffers, and keep them intact when they are cast or leave the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["BufferedModule"]


class BufferedModule(nn.Module):
    """A module whose buffers keep their dtype when it is cast, and get their initial values back after `to_empty`."""

    def __init__(self):
        super().__init__()
        # Python numbers, since `torch.load(..., map_location="meta")` would drop the values of tensors
        self._first_values: dict[str, tuple[int | float | list[float], torch.dtype]] = {}

    def hold(self, name: str, value: int | float | list[float], *, dtype: torch.dtype, persistent: bool = True) -> None:
        """Register a buffer with an initial value; works under `torch.device("meta")` too."""
        self._first_values[name] = value, dtype
        self.register_buffer(name, self._first(name, torch.get_default_device()), persistent=persistent)

    def _first(self, name: str, device: torch.device) -> Tensor:
        value, dtype = self._first_values[name]
        return torch.tensor(value, dtype=dtype, device=device)

    def _apply(self, function, recurse: bool = True):
        before = {name: getattr(self, name) for name in self._first_values}
        super()._apply(function, recurse)
        for name, old in before.items():
            device = getattr(self, name).device
            from_meta = old.is_meta and device.type != "meta"
            setattr(self, name, self._first(name, device) if from_meta else old.to(device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if local_metadata.get("assign_to_params_buffers"):  # buffers that are in no state dict would stay on meta
            for name in self._non_persistent_buffers_set & self._first_values.keys():
                if getattr(self, name).is_meta:
                    setattr(self, name, self._first(name, torch.get_default_device()))
