"""The end of a process in which nothing happens any more: on a rented machine, waiting costs as much as training."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from typing import Self

from ...configs.cli import IDLE
from .interrupts import Interrupts


class IdleWatch:
    """While entered, ends the process with exit code 6 when its loop has not looked for signals for so long.

    What waits for a device, a disk or another process cannot be interrupted, so that nothing is saved or cleaned up.

    Args:
        interrupts: what the loop looks for signals with.
        minutes: the limit; None waits for ever.
        last_words: called before the end, in a thread of its own; after `LAST_WORDS_SECONDS` nobody waits for it.
    """

    LAST_WORDS_SECONDS = 60.0

    def __init__(self, interrupts: Interrupts, minutes: float | None, last_words: Callable[[], None]):
        self.interrupts = interrupts
        self.seconds = None if minutes is None else 60 * minutes
        self.last_words = last_words
        self._over = threading.Event()

    def __enter__(self) -> Self:
        if self.seconds is not None:
            self.interrupts.alive_at = time.monotonic()
            threading.Thread(target=self._watch, args=(self.seconds,), name="idle", daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()

    def _watch(self, seconds: float) -> None:
        while (left := self.interrupts.alive_at + seconds - time.monotonic()) > 0:
            if self._over.wait(min(left, 60)):
                return
        try:
            # a thread without Python's lock, for a stderr that nobody reads: its exit code is 1
            faulthandler.dump_traceback_later(2 * self.LAST_WORDS_SECONDS, exit=True)
            faulthandler.dump_traceback()
            words = threading.Thread(target=self.last_words, daemon=True)
            words.start()
            words.join(self.LAST_WORDS_SECONDS)
        except Exception:  # there may be no stderr, or no thread more
            pass
        finally:
            os._exit(IDLE)
