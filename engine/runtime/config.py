"""Config of where and on what a run is carried out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation

__all__ = ["RunConfig"]


class RunConfig(Operation):
    """Where the run lives, how long it lasts, and on what it runs."""

    fixed = frozenset({"seed", "batch_statistics"})

    name: str = "run"
    """Name of the run."""
    dir: str | None = None
    """Folder of the run; null is runs/<name>."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training images."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the weights, of every draw and of the order."""
    resume: str = "none"
    """none, auto (the newest checkpoint in the run's folder, if any), or the path of a checkpoint or a run."""
    overwrite: bool = False
    """Whether a run that stands in the folder is replaced; otherwise it is resumed or refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes CUDA where it is there."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; auto is bf16 on GPUs that have it and on CPUs whose oneDNN does, else fp32."""
    compile: Literal["auto", "none", "default", "max-autotune", "graph"] = "auto"
    """torch.compile of the losses and the views; graph also captures the whole step as a CUDA graph. auto is default on
    GPUs and none elsewhere."""
    compile_cache: str = "runs/.compiled"
    """Folder of compiled programs, kept between runs; the environment's TORCHINDUCTOR_CACHE_DIR comes first."""
    deterministic: bool = False
    """Bit-for-bit repeatable: deterministic algorithms, compile off."""
    threads: Literal["auto"] | int = "auto"
    """CPU threads of a process; auto is the cores over the local processes."""
    batch_statistics: Literal["global", "process"] = "global"
    """With several processes: batch norm, rate, SIGReg, variance, covariance and the center of the whole batch, as one
    process has them, or of each process's part, which talks less and makes results depend on their number."""
    log_every: int = Field(default=50, ge=1)
    """Steps between looks at the device (loss on the console and in the tracker, divergence)."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if isinstance(self.threads, int) and not 1 <= self.threads <= 1024:
            raise InputError("must be auto or 1 to 1024", "threads")
        if self.deterministic and self.compile not in ("auto", "none"):
            raise InputError("deterministic=true turns compile off; none or auto is allowed", "compile")
        return self
