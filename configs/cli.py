"""What all commands share: streams, options, error lines, exit codes and signals."""

import contextlib
import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from .compose import Composed
from .console import Parser, open_console
from .errors import InputError

DONE, GATE_FAILED, BAD_INPUT, DIVERGED, MACHINE_FAILED, OUT_OF_TIME, IDLE = range(7)  # exit codes


def command(outcome: str) -> Callable[[Callable[[list[str]], int]], Callable[..., int]]:
    """Decorate the main function of a command, which takes its words and returns its exit code.

    An `InputError` becomes a line `error: ...` and exit code 2. SIGINT, SIGTERM and SIGHUP, unless they are ignored,
    raise a KeyboardInterrupt where the command is, and become a line and exit code 128 + signal.

    Args:
        outcome: what happened to the command's work if a signal ends it; printed.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt(number)

    def decorate(main: Callable[[list[str]], int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: list[str] | None = None) -> int:
            open_console()
            numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
            if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
                numbers = []
            numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
            try:
                for number in numbers:
                    signal.signal(number, stop)
                return main(sys.argv[1:] if argv is None else argv)
            except InputError as error:
                field = f"{error.field}: " if error.field else ""
                lines = [f"error: {field}{line}\n" for line in str(error).splitlines()]
                sys.stderr.write("".join(lines))  # at once: other processes may write too
                return BAD_INPUT
            except KeyboardInterrupt as error:
                number = signal.Signals(error.args[0] if error.args else signal.SIGINT)
                print(f"interrupted by {number.name}: {outcome}", file=sys.stderr)
                return 128 + number
            finally:
                for number in numbers:
                    signal.signal(number, signal.SIG_DFL)

        return run

    return decorate


def parser_of(name: str, doc: str | None) -> Parser:
    """A parser of the command `seqjepa name`; its --help begins and ends with the module's docstring."""
    summary, _, details = (doc or "").partition("\n\n")
    return Parser(prog=f"seqjepa {name}", description=summary, epilog=details)


@contextlib.contextmanager
def located(composed: Composed[Any]) -> Iterator[None]:
    """A context in which an `InputError` about a setting also says where that was set."""
    try:
        yield
    except InputError as error:
        raise InputError(composed.located(error)) from None


def check_options(words: list[str], *known: str) -> None:
    """Refuse a word that begins with a dash and is not one of the options.

    Raises:
        InputError: names the word and the options.
    """
    if unknown := [word for word in words if word.startswith("-") and word not in known]:
        options = ", ".join(known)
        raise InputError(f"{unknown[0]}: unknown option; allowed: {options}, and section.key=value for a setting")
