"""From images on disk to (views, actions, labels) on the device."""

from ..configs.errors import InputError, shown

__all__ = ["InputError", "shown"]
