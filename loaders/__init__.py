"""From images on disk to (views, actions, labels) on the device."""

__all__ = ["InputError"]


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what was given and what is allowed.

    Args:
        message: that line.
        field: dotted name of the config field at fault, where one is.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field
