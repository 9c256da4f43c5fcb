"""What a user is told when something that they gave cannot be used."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["InputError", "readable", "shown"]


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


@contextlib.contextmanager
def readable(path: Path | str, field: str) -> Iterator[None]:
    """Within it, what the system refuses to read at `path`, which the config's `field` names, is an InputError."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # some readers raise it for what is inside
            raise
        raise InputError(f"{shown(error.filename or path)}: cannot be read ({error.strerror})", field) from None
