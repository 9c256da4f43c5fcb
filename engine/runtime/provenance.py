"""What a run was made by: hardware, versions, commit, and the code itself."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator

__all__ = ["PACKAGE", "code_digest", "commit", "cores", "hardware", "versions"]

PACKAGE = Path(__file__).resolve().parents[2]


def cores() -> int:
    """Cores that this process may use: those that it is bound to, and no more than a container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no container, or "max": no quota
        return bound
    return max(1, min(bound, -(-quota // period)))


def hardware(accelerator: Accelerator) -> str:
    """The GPUs that the run uses, or the CPU with its cores."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes}x {torch.cuda.get_device_name(accelerator.device)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    return f"{name}, {cores()} cores"


def versions() -> dict[str, str]:
    """Of Python and of what decides the numbers."""
    names = ("seqjepa", "torch", "torchvision", "triton", "accelerate", "ffcv")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest(package: Path = PACKAGE) -> str:
    """SHA-256 of all code of the project, with the names of its files."""
    digest = hashlib.sha256()
    for part in ("engine", "kernels", "loaders", "configs"):
        for path in sorted((package / part).rglob("*.py")):
            digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """Commit of the checkout that this file belongs to, `-dirty` with uncommitted changes; None outside one."""
    here = Path(__file__).resolve()
    tracked = ["git", "ls-files", "--error-unmatch", here.name]  # a wheel may lie in somebody else's repository
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for words in (tracked, command):
            found = subprocess.run(words, cwd=here.parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
