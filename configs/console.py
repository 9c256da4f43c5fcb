"""Standard streams that no console can break, and a parser of words that refuses in one line."""

import argparse
import contextlib
import io
import os
import sys
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """A parser that refuses words in one line, which says what was wrong and how the command is used."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, " ".join(f"error: {message}; {self.format_usage()}".split()) + "\n")


class _Stream(io.FileIO):
    """A stream whose failures to write are no errors, because the command's work matters more than its output.

    A reader that leaves early, as `head` does, is no failure. Any other one, such as a full disk, is reported once on
    stderr.
    """

    failed = False

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and not self.failed:
                self.failed = True
                with contextlib.suppress(OSError):
                    os.write(2, f"output is lost: {error.strerror}\n".encode())
            return memoryview(data).nbytes


def open_console() -> None:
    """Make stdout and stderr safe to print to.

    Letters that the console's encoding lacks are printed as escapes (`gr\\xf6\\xdfe`), and neither a reader that leaves
    early nor a full disk is an error. A stream that replaces the console's, as in a notebook, stays as it is.
    """
    # the next file to be opened would take the number of a closed stream, and receive what C code prints there
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        if sys.platform == "win32":  # where the console is no file
            stream.reconfigure(errors="backslashreplace")
            continue
        raw = _Stream(stream.fileno(), "w", closefd=False)
        text = io.TextIOWrapper(
            raw if stream.write_through else io.BufferedWriter(raw),
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, text)
