"""When signals are answered, and what happens where nobody may listen to them."""

import os
import signal
import threading
import time

import pytest
import torch

from seqjepa.engine.runtime.interrupts import Interrupted, Interrupts
from seqjepa.engine.train import main


def work(seconds):
    """In Python, as long as nobody interrupts it; a sleep may end at a signal."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


@pytest.mark.parametrize("number", Interrupts.SIGNALS)
def test_at_once_interrupts_whatever_runs(number):
    """But not what cleans up, though launchers repeat their signal."""
    course = []

    def interrupted():
        try:
            os.kill(os.getpid(), number)
            work(30)
            course.append("nobody came")
        finally:
            os.kill(os.getpid(), number)
            work(3 * Interrupts.GLANCE)
            course.append("cleaned up")

    with Interrupts(os.getppid()) as interrupts:
        with pytest.raises(Interrupted), interrupts.at_once():
            interrupted()
        assert interrupts.cause == number
    assert course == ["cleaned up"]


def test_outside_at_once_a_signal_is_only_remembered():
    with Interrupts(os.getppid()) as interrupts:
        with interrupts.at_once():
            pass
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted), interrupts.at_once():
            pytest.fail("it was told before")
        with pytest.raises(Interrupted):
            interrupts.check()


def test_a_signal_that_another_process_told_of_is_a_repetition(monkeypatch):
    """It arrives here a moment later, and must not end the process that saves because of it."""

    class Accelerator:
        device = torch.device("cpu")
        num_processes = 2

        def gather(self, mine):
            return torch.cat([mine, torch.tensor([[float(signal.SIGTERM), 0.0]])])

    ended = []
    monkeypatch.setattr(os, "kill", lambda *given: ended.append(given))
    with Interrupts(os.getppid()) as interrupts:
        with pytest.raises(Interrupted):
            interrupts.check_together(Accelerator())
        signal.raise_signal(signal.SIGTERM)
        assert not ended
        monkeypatch.setattr(interrupts, "GRACE", 0.0)
        signal.raise_signal(signal.SIGTERM)
    assert ended == [(os.getpid(), signal.SIGTERM)]


def test_timers_and_handlers_of_others_are_given_back():
    def handler(number, frame):
        pass

    before, timer = signal.signal(signal.SIGALRM, handler), signal.setitimer(signal.ITIMER_REAL, 1000, 7)
    try:
        with Interrupts(os.getppid()) as interrupts, interrupts.at_once():
            assert signal.getsignal(signal.SIGALRM) is not handler
        assert signal.getsignal(signal.SIGALRM) is handler
        left, interval = signal.getitimer(signal.ITIMER_REAL)
        assert 900 < left <= 1000
        assert interval == 7
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def test_a_launcher_that_has_died_is_noticed_at_once(monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    with Interrupts(os.getppid() + 1) as interrupts, pytest.raises(Interrupted), interrupts.at_once():
        work(30)
    assert interrupts.cause == signal.SIGTERM


def test_training_in_another_thread_says_that_signals_are_not_handled(tiny, capfd):
    """As tuners, servers and notebooks start it; Python lets the main thread alone listen."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(tiny())))
    thread.start()
    thread.join()
    assert codes == [0]
    said = capfd.readouterr().err
    assert said.count("not in the main thread: signals are not handled") == 1


# what Python lacks on Windows
WITHOUT = """
import signal
for name in ("SIGHUP", "SIGALRM", "SIGKILL", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
import seqjepa.loaders.write
from seqjepa.engine.runtime.interrupts import Interrupts
with Interrupts(0) as interrupts, interrupts.at_once():
    print([number.name for number in interrupts.SIGNALS])
"""


def test_without_the_signals_of_unix(run_process, python):
    result = run_process(python, "-c", WITHOUT)
    assert result.stdout == "['SIGINT', 'SIGTERM']\n", result.stderr
