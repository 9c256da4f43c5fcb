"""Kernels that other JEPA code can drop in. They import torch and triton alone, and nothing of this project."""

from .ema import ema_update_

__all__ = ["ema_update_"]
