"""Signals, and the death of the launcher, turned into one question that the loop asks between steps."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch
from accelerate import Accelerator

__all__ = ["Interrupted", "Interrupts"]


class Interrupted(Exception):
    """The run was asked to stop; the loop saves and leaves."""


class Interrupts:
    """While entered, SIGINT, SIGTERM and SIGHUP are remembered; one that comes much later acts as if nobody listened.

    `accelerate launch` dies of a SIGTERM without telling its child, so a child of it also watches its parent. Python
    lets its main thread alone listen to signals: in another one, as tuners and notebooks use, nothing is listened to.

    Args:
        parent: process that started this one.

    Attributes:
        received: number of the signal; None while there was none.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    GRACE = 2.0  # seconds in which schedulers and launchers repeat a signal that they all pass on
    PATIENCE = 2.0  # seconds after which processes ask each other again
    GLANCE = 0.2  # seconds between two looks `at_once`

    def __init__(self, parent: int):
        self.received: int | None = None
        self.received_at = 0.0
        # set by `accelerate launch` alone; under nohup or a shell the parent may go as it likes
        self.launcher = parent if "ACCELERATE_DYNAMO_BACKEND" in os.environ else None
        self._previous: dict[int, object] = {}
        self.new_pace()

    def __enter__(self) -> Interrupts:
        if not _may_listen():
            print("not in the main thread: signals will not be listened to, and save nothing", file=sys.stderr)
            return self
        for number in self.SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # as nohup has it
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if self.received is None:
            self.received, self.received_at = number, time.monotonic()
        elif time.monotonic() - self.received_at > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    @property
    def exit_code(self) -> int:
        return 128 + (self.received or signal.SIGTERM)

    @property
    def cause(self) -> str:
        """What interrupted the run, in words."""
        return signal.Signals(self.received or signal.SIGTERM).name

    def check(self) -> None:
        """Raise `Interrupted` if this process was asked to stop."""
        if self.received is None and self.launcher is not None and os.getppid() != self.launcher:
            self.received = signal.SIGTERM
        if self.received is not None:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, `Interrupted` is raised wherever the main thread is: for what is long and may be left anywhere."""
        self.check()
        if not _may_listen() or not hasattr(signal, "setitimer"):
            yield
            return

        def look(number: int, frame: object) -> None:
            try:
                self.check()
            except Interrupted:
                signal.setitimer(signal.ITIMER_REAL, 0)  # what cleans up is left alone
                raise

        handler = signal.signal(signal.SIGALRM, look)
        timer = signal.setitimer(signal.ITIMER_REAL, self.GLANCE, self.GLANCE)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, handler)
            signal.setitimer(signal.ITIMER_REAL, *timer)
        self.check()

    def new_pace(self) -> None:
        """What begins has steps of another length: processes ask each other from its first on."""
        self._steps, self._due = 0, 1  # since they last asked each other; at which they do so again
        self._asked_at = time.monotonic()

    def check_together(self, accelerator: Accelerator) -> None:
        """Raise `Interrupted` on every process if any was asked to stop.

        All must call it in each step; they ask each other every two seconds or so, in the same step.
        """
        self._steps += 1
        if self._steps < self._due:
            return
        try:
            self.check()
            asked = 0
        except Interrupted:
            asked = self.received
        now = time.monotonic()
        mine = torch.tensor([[asked, (now - self._asked_at) / self._steps]], device=accelerator.device)
        asked, pace = accelerator.gather(mine).max(dim=0).values.tolist()
        self._steps, self._asked_at = 0, now
        self._due = max(1, min(2 * self._due, int(self.PATIENCE / max(pace, 1e-6))))
        if asked:
            self.received = self.received or int(asked)
            raise Interrupted


def _may_listen() -> bool:
    return threading.current_thread() is threading.main_thread()
