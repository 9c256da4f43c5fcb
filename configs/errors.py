"""What a user is told when something that they gave cannot be used."""

__all__ = ["InputError", "shown"]


class InputError(ValueError):
    """What the user gave cannot be used: one line that says what was given and what is allowed.

    Args:
        message: that line.
        field: dotted name of the config field at fault, where one is.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def shown(name: object) -> str:
    """A name of unknown origin, in one line."""
    return text if (text := str(name)).isprintable() else repr(text)
