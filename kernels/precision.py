"""The widest floating-point type of a device, for sums and schedules that should lose nothing."""

from .internal.backend import widest

__all__ = ["widest"]
