"""What produced a run: hardware, versions, commit, and a digest of the code."""

import contextlib
import hashlib
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch
from accelerate import Accelerator

PACKAGE = Path(__file__).resolve().parents[2]


def cores() -> int:
    """Number of cores that this process may use, by its affinity and its container's quota."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):  # no container, or "max": no quota
        return bound
    return max(1, min(bound, -(-quota // period)))


def hardware(accelerator: Accelerator) -> str:
    """Name and number of the GPUs that the run uses, or of the CPU and its cores."""
    if accelerator.device.type == "cuda":
        return f"{accelerator.num_processes}x {torch.cuda.get_device_name(accelerator.device)}"
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists() and (found := re.search(r"^model name\s*:(.+)", cpuinfo.read_text(), re.MULTILINE)):
        name = found[1].strip()
    return f"{name}, {cores()} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    found = {"python": platform.python_version()}
    for name in ("seqjepa", "torch", "torchvision", "timm", "triton", "accelerate", "ffcv"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def code_digest(package: Path = PACKAGE) -> str:
    """SHA-256 of all code of the project, including the names of its files."""
    digest = hashlib.sha256()
    for part in ("engine", "kernels", "loaders", "configs"):
        for path in sorted((package / part).rglob("*.py")):
            digest.update(f"{path.relative_to(package)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def commit() -> str | None:
    """Commit of the checkout of this file, with `-dirty` for uncommitted changes; None outside a checkout."""
    here = Path(__file__).resolve()
    tracked = ["git", "ls-files", "--error-unmatch", here.name]  # a wheel may be installed within another repository
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        for words in (tracked, command):
            found = subprocess.run(words, cwd=here.parent, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
