"""Where torch stands in for the kernels."""

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
