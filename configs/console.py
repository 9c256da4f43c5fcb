"""Standard streams that any console can show and any reader may leave."""

from __future__ import annotations

import contextlib
import io
import os
import sys

__all__ = ["open_console"]


class _Stream(io.FileIO):
    """What it cannot write is lost, and no error: the command's work matters more.

    A reader that has left, as `head` does, wants no more; of any other failure, as of a full disk, stderr has a line.
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
    """Let every command say what it has to say.

    Letters that the console's encoding lacks are shown as escapes (`gr\\xf6\\xdfe`), and neither a reader that leaves
    before the end nor a full disk is an error. A stream that stands in for the console's, as in a notebook, is left
    alone.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:  # a closed one: the next file would take its place,
        pass  # and receive what C code and other programs say
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        if sys.platform == "win32":  # its console is no file
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
