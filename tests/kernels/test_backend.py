"""Where torch stands in for the kernels."""

import sys

import pytest

from seqjepa.kernels.internal import backend


@pytest.mark.skipif(backend.triton is None, reason="needs Triton")
def test_without_a_compiler_triton_is_of_no_use(monkeypatch, tmp_path):
    """It compiles its launchers where the program runs: with $CC, else gcc, else clang."""
    missing = backend._missing.__wrapped__  # past the cache
    for name in ("cc-of-mine", "clang"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    assert missing() is None
    (tmp_path / "clang").unlink()
    assert missing() == "there is no C compiler (gcc or clang), which Triton needs"
    monkeypatch.setenv("CC", "cc-of-mine")
    assert missing() is None
    monkeypatch.setenv("CC", "nowhere-to-be-found")
    assert missing() == "there is no C compiler (nowhere-to-be-found), which Triton needs"


LAUNCHES = """
import sys
sys.path.insert(0, "bench")
import torch
import triton.runtime.driver
from host import NoGPU
from seqjepa.kernels import coding_rate
from seqjepa.kernels.internal import backend

launched = []


class Recording(NoGPU):
    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: launched.append((source, arguments[9:])))


triton.runtime.driver.set_active(Recording())
backend.INTERPRETED = True
rows = torch.zeros(5000 * 5)
for shape in ((1, 5), (16, 16), (5000, 4)):
    for start in (0, 1):
        z = rows[start:][: shape[0] * shape[1]].view(shape).requires_grad_()
        turns = []
        for _ in range(3):  # Triton's binaries; those that were found; and Triton's again
            launched.clear()
            torch.autograd.grad(coding_rate(z, eps=0.5), z)
            turns.append(list(launched))
            if len(turns) == 2:
                backend._binaries.clear()
        for turn in turns[1:]:
            assert len(turn) == len(turns[0]) >= 6
            for (source, given), (first, before) in zip(turn, turns[0]):
                assert source is first, source.fn
                for x, y in zip(given, before, strict=True):
                    assert type(x) is type(y)
                    assert isinstance(x, torch.Tensor) or x == y
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_a_binary_that_was_found_before_is_the_one_that_triton_takes(run_process):
    """With a driver that launches nothing: of sizes one, odd and even, and of memory that is not aligned."""
    result = run_process(sys.executable, "-c", LAUNCHES)
    assert result.returncode == 0, result.stderr
