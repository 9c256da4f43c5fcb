"""Errors that are reported to the user in one line."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError


class InputError(ValueError):
    """Something that the user gave cannot be used.

    Args:
        message: one line that says what was given and what is allowed.
        field: dotted name of the config field at fault, if there is one.
    """

    def __init__(self, message: str, field: str | None = None):
        super().__init__(message)
        self.field = field


def first_line(error: BaseException) -> str:
    """What an error says, in one line: of pydantic's, the first field and its fault; of an empty one, its type."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{shown('.'.join(map(str, first['loc'])))}: {first['msg']}"
    return (str(error).splitlines() or [type(error).__name__])[0]


def shown(name: object) -> str:
    """A name as one printable line, with escapes where it needs them."""
    return text if (text := str(name)).isprintable() else repr(text)


@contextlib.contextmanager
def readable(path: Path | str, field: str) -> Iterator[None]:
    """Turn an error of the system while `path` is read into an InputError of the config's `field`."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # raised by a reader, because of what the file contains
            raise
        raise InputError(f"{shown(error.filename or path)}: cannot be read ({error.strerror})", field) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory has run out, on the host or on a GPU; torch raises RuntimeErrors for it."""
    said = ("out of memory", "allocate memory", "enough memory", "new thread")
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(w in str(error) for w in said))
