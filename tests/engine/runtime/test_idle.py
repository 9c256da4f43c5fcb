"""A process whose loop stands still ends by itself; one that goes on is left alone."""

import subprocess
import sys

import pytest

from seqjepa.configs.cli import DONE, IDLE

WAITING = """
import os, sys, time
from types import SimpleNamespace
from seqjepa.engine.runtime.idle import IdleWatch
from seqjepa.engine.runtime.interrupts import Interrupts

def where_it_waits(step):
    time.sleep(step)

interrupts, alone = Interrupts(os.getppid()), SimpleNamespace(num_processes=1)
with IdleWatch(interrupts, float(sys.argv[1]) / 60, lambda: print("last words", flush=True)):
    for _ in range(4):
        interrupts.check_together(alone)
        where_it_waits(float(sys.argv[2]))
"""


def wait(limit: float, step: float) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-c", WAITING, str(limit), str(step)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_it_says_where_it_waited():
    result = wait(limit=2, step=90)
    assert (result.returncode, result.stdout) == (IDLE, "last words\n")
    assert "in where_it_waits" in result.stderr


def test_steps_that_take_less_are_no_reason_however_many():
    result = wait(limit=8, step=2.5)  # ten seconds in all
    assert (result.returncode, result.stdout, result.stderr) == (DONE, "", "")


HANGING = """
import sys, time
from seqjepa.engine.train import main
from seqjepa.engine.training.step import TrainingStep
step = TrainingStep.step
TrainingStep.step = lambda self, batch, number: time.sleep(600) if number == 6 else step(self, batch, number)
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_that_hangs_has_its_last_checkpoint_in_the_mirror(tiny, tmp_path):
    words = tiny("run.epochs=4", "run.max_idle=0.25", f"run.mirror={tmp_path / 'bucket'}")
    command = [sys.executable, "-P", "-c", HANGING, *words]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == IDLE, result.stderr
    newest = max(path.parent.name for path in (tmp_path / "bucket/run/checkpoints").glob("*/manifest.json"))
    assert f"idle: no step for run.max_idle=0.25 minutes; last good checkpoint: {tmp_path}" in result.stdout
    assert newest in result.stdout
    assert "line 6 in <lambda>" in result.stderr  # where it sleeps
