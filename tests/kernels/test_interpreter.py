"""The tests marked `triton`, once more on the kernels themselves, in Triton's interpreter."""

import sys

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_the_suite_passes_under_the_interpreter(run_process):
    words = ["-m", "triton and not gpu and not slow", "-q", "-p", "no:xdist", "tests/kernels"]
    result = run_process(sys.executable, "-m", "pytest", *words, timeout=1500, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert "passed" in result.stdout
