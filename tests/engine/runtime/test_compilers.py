"""A machine without a compiler: a run that asks to be compiled says what is missing, and another goes on without."""

import types

import pytest
import torch

from seqjepa.configs.errors import InputError
from seqjepa.engine.runtime import accelerator as environment
from seqjepa.engine.runtime.compilers import missing_compiler
from seqjepa.engine.runtime.config import RunConfig
from seqjepa.engine.train import main

NO_RULES = "gates.rules.digits_affine=[]"


@pytest.fixture(autouse=True)
def _anew():
    """What was found out about compilers is of another environment."""
    for cached in (missing_compiler, environment._say_once):
        cached.cache_clear()
    yield
    missing_compiler.cache_clear()


@pytest.fixture
def script(tmp_path):
    """A compiler that is this text."""

    def write(text: str) -> str:
        path = tmp_path / "compiler"
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.mark.parametrize(("device", "variable", "name"), [("cpu", "CXX", "C++"), ("cuda", "CC", "C")])
def test_a_compiler_is_tried(device, variable, name, monkeypatch, script):
    assert missing_compiler(device) is None
    headers = script("echo 'probe.c:1:10: fatal error: Python.h: No such file or directory' >&2; exit 1")
    for compiler, reason in (("/bin/false", "exit code 1"), ("/nowhere/cc", "No such file"), (headers, "Python.h")):
        missing_compiler.cache_clear()
        monkeypatch.setenv(variable, compiler)
        said = missing_compiler(device)
        assert f"needs a {name} compiler" in said
        assert f"{compiler} fails" in said
        assert reason in said
        assert "\n" not in said


@pytest.mark.parametrize(
    ("device", "variable", "value", "said"),
    [
        ("cpu", "CXX", 'g++ "', 'g++ " fails (No closing quotation)'),
        ("cpu", "CXX", "/bin/true", "/bin/true fails (it reports success, and has written nothing)"),
        ("cuda", "CC", "/bin/true", "/bin/true fails (it reports success, and has written nothing)"),
        ("cpu", "CXX", "", " fails (CXX is set and empty)"),
        ("cpu", "CXX", " ", " fails (CXX is set and empty)"),
        ("cuda", "CC", "", " fails (CC is set and empty)"),
        ("cuda", "CC", "gcc -O1", "gcc -O1 fails (No such file or directory)"),  # which torch would split
    ],
)
def test_a_program_that_is_no_compiler_is_recognised(device, variable, value, said, monkeypatch):
    monkeypatch.setenv(variable, value)
    assert said in missing_compiler(device)


def test_a_compiler_may_have_options(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O1 '-DA=\"b c\"'")
    assert missing_compiler("cpu") is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_no_compiler_on_the_path(device, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    assert "No such file or directory" in missing_compiler(device)


def test_what_was_asked_for_is_refused(tiny, tmp_path, refused, monkeypatch):
    monkeypatch.setenv("CXX", "/bin/false")
    parts = ("override run.compile=default: run.compile: ", "C++ compiler", "none trains without it")
    refused(tiny("run.deterministic=false", "run.compile=default"), *parts)
    assert not (tmp_path / "run").exists()
    assert (
        main(tiny("run.epochs=1", "run.deterministic=false", "run.compile=auto", "control.enabled=false", NO_RULES))
        == 0
    )


def test_what_auto_would_compile_on_a_gpu_goes_on_eagerly(monkeypatch, capsys):
    gpu = types.SimpleNamespace(device=torch.device("cuda"), num_processes=1, is_main_process=True)
    assert environment.compile_mode(RunConfig(), gpu) == "default"
    missing_compiler.cache_clear()
    monkeypatch.setenv("CC", "/bin/false")
    for _ in range(2):
        assert environment.compile_mode(RunConfig(), gpu) == "none"
    assert capsys.readouterr().out.count("not compiled, which is slower") == 1
    for mode in ("default", "graph", "max-autotune"):
        with pytest.raises(InputError, match="needs a C compiler"):
            environment.compile_mode(RunConfig(compile=mode), gpu)


@pytest.mark.slow
def test_a_compiler_that_fails_later_is_one_line(tiny, monkeypatch, capsys, script):
    """It compiles the probe, and nothing else."""
    cases = '*probe.cpp*) exec g++ "$@";; *--version*) exit 0;;'
    compiler = script(f'case "$*" in {cases} esac; echo "error: no space" >&2; exit 1')
    monkeypatch.setenv("CXX", compiler)
    words = tiny("run.epochs=1", "run.deterministic=false", "run.compile=default", "control.enabled=false", NO_RULES)
    torch.compiler.reset()
    with torch._inductor.config.patch("cpp.cxx", (None, compiler)):
        assert main(words) == 4
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert "CppCompileError" in printed.out
    (line,) = [line for line in printed.out.splitlines() if "run.compile=none trains without it" in line]
    assert "nothing was saved" in line
