"""Rates and statistics of a batch that several processes hold: equal to one process on the joined batch."""

import sys

import pytest


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_equal_one_on_the_joined_batch(processes, run_process):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    result = run_process(sys.executable, *command, "tests/kernels/processes.py", OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr[-4000:]
