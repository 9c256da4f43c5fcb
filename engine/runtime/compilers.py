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

__all__ = ["missing_compiler"]


@functools.cache
def missing_compiler(device: str) -> str | None:
    """What keeps torch.compile from working on a device, in words; None if nothing does.

    A file as torch's own are is compiled: a compiler may be there and fail, for want of Python's headers or a linker.

    Args:
        device: cuda, for which Triton calls a C compiler; or cpu, for which Inductor calls a C++ compiler.
    """
    if device == "cuda":
        language, suffix = "C", ".c"
        command = [os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "gcc"]
    else:
        language, suffix = "C++", ".cpp"
        command = shlex.split(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, f"probe{suffix}")
        source.write_text("#include <Python.h>\n", encoding="utf-8")
        command += ["-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", str(source), "-o", f"{source}.so"]
        try:
            subprocess.run(command, capture_output=True, check=True, timeout=60, cwd=folder)
            return None
        except subprocess.CalledProcessError as error:
            said = error.stderr.decode(errors="replace").splitlines()
            reason = next((line for line in said if "error" in line), f"exit code {error.returncode}")
        except (OSError, subprocess.TimeoutExpired) as error:
            reason = getattr(error, "strerror", None) or "no answer"
    return (
        f"torch.compile needs a {language} compiler and Python's headers, and {command[0]} fails ({reason.strip()}); "
        f"apt-get install {'gcc' if language == 'C' else 'g++'} python3-dev brings them"
    )
