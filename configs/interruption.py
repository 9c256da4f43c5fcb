"""What a signal does to a command: it cleans up as after Ctrl-C, prints one line, and exits with 128 + the signal."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable

__all__ = ["interruptible"]


def interruptible(outcome: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate a command's main function, so that SIGTERM and SIGHUP end it as SIGINT does, unless they are ignored.

    Args:
        outcome: what becomes of the interrupted command's work, in words; it is printed.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args: object) -> int:
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
            if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
                numbers = []
            numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
            try:
                for number in numbers:
                    signal.signal(number, stop)
                return main(*args)
            except KeyboardInterrupt as error:
                number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
                print(f"interrupted by {number.name}: {outcome}", file=sys.stderr)
                return 128 + number
            finally:
                for number in numbers:
                    signal.signal(number, signal.SIG_DFL)

        return run

    return decorate
