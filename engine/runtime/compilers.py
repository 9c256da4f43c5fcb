"""Whether this machine has the compiler that torch.compile calls."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from ...configs.errors import shown

__all__ = ["missing_compiler"]


@functools.cache
def missing_compiler(device: str) -> str | None:
    """What keeps torch.compile from working on a device, in words; None if nothing does.

    A file as torch's own are is compiled: a compiler may be there and fail, for want of Python's headers or a linker.

    Args:
        device: cuda, for which Triton calls a C compiler; or cpu, for which Inductor calls a C++ compiler.
    """
    if device == "cuda":
        language, suffix, variable = "C", ".c", "CC"
        default = shutil.which("gcc") or shutil.which("clang") or "gcc"
    else:
        language, suffix, variable = "C++", ".cpp", "CXX"
        default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get(variable, default)  # set to nothing, it is taken at its word
    try:
        command = [compiler] if device == "cuda" else shlex.split(compiler)  # as Triton and Inductor do
        reason = _failure(command, suffix) if compiler.strip() else f"{variable} is set and empty"
    except ValueError as error:  # a quote that is not closed
        reason = str(error)
    if reason is None:
        return None
    return (
        f"torch.compile needs a {language} compiler and Python's headers, and {shown(compiler)} fails ({reason}); "
        f"apt-get install {'gcc' if language == 'C' else 'g++'} python3-dev brings them"
    )


def _failure(command: list[str], suffix: str) -> str | None:
    """Why a compiler makes no library of a file; None if it does."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, f"probe{suffix}"), Path(folder, "probe.so")
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        include = sysconfig.get_paths()["include"]
        arguments = ["-shared", "-fPIC", f"-I{include}", str(source), "-o", str(library)]
        try:
            subprocess.run([*command, *arguments], capture_output=True, check=True, timeout=60, cwd=folder)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").splitlines()
            return next((line for line in said if "error" in line), f"exit code {error.returncode}").strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return getattr(error, "strerror", None) or "no answer"
        written = library.is_file() and library.stat().st_size > 0
        return None if written else "it says that it is done, and has written nothing"
