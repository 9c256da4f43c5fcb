"""Config of where and on which hardware a run is carried out, and of what it saves."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation


class RunConfig(Operation):
    """Where a run is stored, how long it trains, and on which hardware."""

    fixed = frozenset({"seed", "batch_statistics"})

    name: str = "run"
    """Name of the run; auto makes one of the task and a checksum of all that decides what is learnt and of data.root,
    so that other settings have another folder, and the same ones, with run.resume=auto, go on."""
    dir: str | None = None
    """Folder of the run; null is runs/<name>."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training images."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the weights, of all random draws and of the order of the images."""
    max_hours: float | None = Field(default=None, gt=0)
    """Hours that the run may take, over all its starts, of each until it last saved. After them it saves and ends, with
    exit code 5."""
    max_idle: float | None = Field(default=None, gt=0)
    """Minutes without a step of training or validation after which the process ends, with exit code 6 and a list of
    where each thread was. Images that have to be read first, and compilation, must take less."""
    price: float | None = Field(default=None, ge=0)
    """Price of an hour on this machine, in any currency: console, summary and trackers then tell the cost."""
    mirror: str | None = None
    """A second place for checkpoints, metrics and figures: a folder, or an address of fsspec such as s3://BUCKET/runs
    or hf://buckets/USER/runs, to which the run's name is appended. They are copied in the background after each
    checkpoint; with run.resume=auto, a run without a checkpoint on its disk fetches the newest whole one."""
    resume: str = "none"
    """none, auto (the newest checkpoint in the run's folder, if any), or the path of a checkpoint or a run."""
    overwrite: bool = False
    """Whether to replace a run that exists in the folder; otherwise it is resumed, or the new run refused."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto is cuda where it is available, else cpu. mps is Apple's GPU: fp32, not compiled, metrics
    in float32, and evaluations on the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; auto is bf16 on GPUs that support it and on CPUs whose oneDNN does, else fp32."""
    compile: Literal["auto", "none", "default", "max-autotune", "graph"] = "auto"
    """torch.compile of the losses and the views; graph also captures the whole step as a CUDA graph. auto is default on
    GPUs and none elsewhere."""
    compile_cache: str = "runs/.compiled"
    """Folder of compiled programs, kept between runs; TORCHINDUCTOR_CACHE_DIR in the environment overrides it."""
    deterministic: bool = False
    """Whether runs repeat bit for bit: deterministic algorithms, no compilation."""
    threads: Literal["auto"] | int = "auto"
    """CPU threads per process; auto is OMP_NUM_THREADS, but under a launcher, which sets that by itself, the machine's
    cores are divided among its processes."""
    batch_statistics: Literal["global", "process"] = "global"
    """Scope of batch norm, of terms that use statistics of a batch, and of center, with several processes. global: the
    whole batch, as with one process; process: each process's part, with less communication, but results then depend on
    the number of processes."""
    log_every: int = Field(default=50, ge=1)
    """Steps between host syncs, at which the loss is logged and checked for divergence."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.threads, int) and not 1 <= self.threads <= 1024:
            raise InputError("must be auto or 1 to 1024", "threads")
        if self.device == "mps" and (self.precision == "bf16" or self.compile not in ("auto", "none")):
            field = "precision" if self.precision == "bf16" else "compile"
            raise InputError(
                f"device=mps trains in fp32 and does not compile: auto is allowed, not {getattr(self, field)}", field
            )
        if self.deterministic and self.compile not in ("auto", "none"):
            raise InputError("deterministic=true turns compile off; none or auto is allowed", "compile")
        return self


class CheckpointConfig(Operation):
    """What is saved, and how much of it is kept."""

    every: int = Field(default=1, ge=1)
    """Epochs between checkpoints; the last, the best and an interrupted one are always saved."""
    keep: int = Field(default=2, ge=1)
    """Number of newest checkpoints that are kept, besides the best."""
