"""Signals, and launchers that died: the training loop checks for both between steps, and stops the run."""

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import torch
from accelerate import Accelerator


class Interrupted(Exception):
    """The run was asked to stop: it saves and ends."""


TIME_IS_UP = 0x100  # in the place of a signal's number


class Interrupts:
    """While entered, remembers SIGINT, SIGTERM and SIGHUP; one that is repeated later has its usual effect.

    `accelerate launch` dies of a SIGTERM without passing it on, so its children also watch their parent. Python lets
    only its main thread handle signals: in another one, as tuners and notebooks use, there is no handling.

    Args:
        parent: process that started this one.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
    GRACE = 2.0  # seconds in which a signal may arrive repeatedly, from a scheduler and from a launcher
    EXCHANGE_SECONDS = 2.0  # seconds after which processes ask each other again
    GLANCE = 0.2  # seconds between two checks in `at_once`

    def __init__(self, parent: int):
        self.received: int | None = None  # number of the first signal
        self.deadline = math.inf  # of time.monotonic(), at which the run stops as if it were interrupted
        self.received_at = 0.0
        # launchers set these variables; any other parent, such as a shell, may end while the run goes on
        self.launcher = parent if {"ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID"} & os.environ.keys() else None
        self.alive_at = time.monotonic()  # when the loop last looked for signals
        self._previous: dict[int, Any] = {}
        self.new_pace()

    def __enter__(self) -> Self:
        if not _may_listen():
            print("not in the main thread: signals are not handled, and save nothing", file=sys.stderr)
            return self
        for number in self.SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:  # as under nohup
                continue
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: object) -> None:
        if not self._receive(number) and time.monotonic() - self.received_at > self.GRACE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def _receive(self, number: int) -> bool:
        """Note why to stop; returns whether nothing was noted before."""
        if self.received is not None:
            return False
        self.received, self.received_at = number, time.monotonic()
        return True

    @property
    def out_of_time(self) -> bool:
        """Whether the run stops because of its deadline."""
        return self.received == TIME_IS_UP

    @property
    def cause(self) -> signal.Signals:
        """The signal because of which the run should stop."""
        return signal.Signals(self.received or signal.SIGTERM)

    def check(self) -> None:
        """Raise `Interrupted` if this process was asked to stop."""
        if self.launcher is not None and os.getppid() != self.launcher:
            self._receive(signal.SIGTERM)
        if time.monotonic() > self.deadline:
            self._receive(TIME_IS_UP)
        if self.received is not None:
            raise Interrupted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Within it, `Interrupted` is raised wherever the main thread is: for long work that may stop anywhere."""
        self.check()
        if not _may_listen() or not hasattr(signal, "setitimer"):
            yield
            return

        def look(number: int, frame: object) -> None:
            try:
                self.check()
            except Interrupted:
                signal.setitimer(signal.ITIMER_REAL, 0)  # clean-up must not be interrupted again
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

    def keep_alive(self, seconds: float = 0.0) -> None:
        """Tell `IdleWatch` that the process works, and may do so for so many seconds beyond its limit."""
        self.alive_at = time.monotonic() + seconds

    def new_pace(self) -> None:
        """Begin work whose steps take another time: processes exchange signals in its first step."""
        self._steps, self._due = 0, 1  # steps since they last asked each other; step in which they ask again
        self._asked_at = time.monotonic()

    def check_together(self, accelerator: Accelerator) -> None:
        """Raise `Interrupted` on every process if any of them was asked to stop.

        Every process calls it in every step. About every two seconds, all in the same step, the processes exchange what
        they received.
        """
        self.keep_alive()
        if accelerator.num_processes == 1:
            self.check()
            return
        self._steps += 1
        if self._steps < self._due:
            return
        with contextlib.suppress(Interrupted):
            self.check()
        now, asked = time.monotonic(), self.received or 0
        mine = torch.tensor([[asked, (now - self._asked_at) / self._steps]], device=accelerator.device)
        gathered: Any = accelerator.gather(mine)
        asked, pace = gathered.max(dim=0).values.tolist()
        self._steps, self._asked_at = 0, now
        self._due = max(1, min(2 * self._due, int(self.EXCHANGE_SECONDS / max(pace, 1e-6))))
        if asked:
            self._receive(int(asked))  # this process's own signal may follow: a repetition
            raise Interrupted


def _may_listen() -> bool:
    return threading.current_thread() is threading.main_thread()
