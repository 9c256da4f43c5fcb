"""Whether this machine has the compiler that torch.compile calls."""

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


@functools.cache
def missing_compiler(device: str) -> str | None:
    """Why torch.compile cannot work on a device, in words; None if it can.

    A small file that includes Python's headers is compiled, as torch's own do: a compiler may be there and still fail,
    because headers or a linker are missing.

    Args:
        device: cuda, for which Triton calls a C compiler; or cpu, for which Inductor calls a C++ compiler.
    """
    if device == "cuda":
        language, suffix, variable = "C", ".c", "CC"
        default = shutil.which("gcc") or shutil.which("clang") or "gcc"
    else:
        language, suffix, variable = "C++", ".cpp", "CXX"
        default = "clang++" if sys.platform == "darwin" else "g++"
    compiler = os.environ.get(variable, default)
    try:
        command = [compiler] if device == "cuda" else shlex.split(compiler)  # as Triton and Inductor do
        reason = _failure(command, suffix) if compiler.strip() else f"{variable} is set and empty"
    except ValueError as error:  # an unclosed quote
        reason = str(error)
    if reason is None:
        return None
    return (
        f"torch.compile needs a {language} compiler and Python's headers, and {shown(compiler)} fails ({reason}); "
        f"apt-get install {'gcc' if language == 'C' else 'g++'} python3-dev brings them"
    )


def _failure(command: list[str], suffix: str) -> str | None:
    """Why a compiler cannot make a library of a file; None if it can."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, f"probe{suffix}"), Path(folder, "probe.so")
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        command = [*command, "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", str(source), "-o", str(library)]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=60, cwd=folder)
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").splitlines()
            return next((line for line in said if "error" in line), f"exit code {error.returncode}").strip()
        except (OSError, subprocess.TimeoutExpired) as error:
            return getattr(error, "strerror", None) or "no answer"
        written = library.is_file() and library.stat().st_size > 0
        return None if written else "it reports success, and has written nothing"
