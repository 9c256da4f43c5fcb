"""Sets up device, precision, threads and compiler, as the config says, whatever the environment says."""

import contextlib
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin, TorchDynamoPlugin

from ...configs.errors import InputError, first_line
from .compilers import missing_compiler
from .config import RunConfig
from .provenance import cores

TRUE = ("1", "true", "yes", "y", "t", "on")
# modes of Accelerate that would replace the model, the optimiser or the backward pass by their own
UNSUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
DATA_PARALLEL = "accelerate launch --multi_gpu, or configs/accelerate/multi_gpu.yaml, trains on several GPUs"
# variables by which launchers tell a process that it is one of several
OF_LAUNCHERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PMI_SIZE")
OF_LAUNCHERS += ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# the CUDA graphs of torch.compile would overwrite outputs that validation keeps; `graph` captures the whole step itself
COMPILE_MODES = {"default": "default", "graph": "default", "max-autotune": "max-autotune-no-cudagraphs"}
_say_once = functools.cache(functools.partial(print, flush=True))  # several places look up the mode


def build_accelerator(run: RunConfig, accumulate: int) -> Accelerator:
    """Set device, threads, precision and determinism, and start Accelerate.

    Raises:
        InputError: this machine lacks the device, or the launcher asks for something that is not supported.
    """
    # before anything else: Accelerate would already have started what is refused here
    for name, what in UNSUPPORTED.items():
        if os.environ.get(name, "").lower() in TRUE:
            raise InputError(f"the launcher asks for {what} ({name}), which is not supported; {DATA_PARALLEL}")
    if run.device == "cuda" and not torch.cuda.is_available():
        raise InputError("cuda is not there; this machine has cpu", "run.device")
    if run.device == "mps" and not torch.backends.mps.is_available():
        raise InputError("mps is not there: it needs Apple's GPU and macOS", "run.device")
    kind = run.device
    if kind == "auto":
        on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE  # accelerate launch --cpu
        kind = "cuda" if torch.cuda.is_available() and not on_cpu else "cpu"
    torch.set_num_threads(_threads(run))
    if run.compile != "none":  # compiled programs are kept in a folder, so that a restarted job finds them
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(run.compile_cache).expanduser().absolute()))
    # the transformer's fast path for evaluation mixes bf16 with fp32 on a CPU, and fails there under torch.compile
    torch.backends.mha.set_fastpath_enabled(False)
    torch.use_deterministic_algorithms(run.deterministic)
    torch.backends.cudnn.benchmark = not run.deterministic
    if run.deterministic:  # read by cuBLAS when it is first used
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if kind == "cuda":
        torch.set_float32_matmul_precision("high")
    # Accelerate keeps its state for the whole process: a second run, as in a notebook, may want another device
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    GradientState._reset_state()
    try:
        accelerator = Accelerator(
            cpu=kind == "cpu",
            mixed_precision="bf16" if _use_bf16(run.precision, kind) else "no",
            # without these two Accelerate would take them from the environment or from its saved config
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=accumulate),
            dynamo_plugin=TorchDynamoPlugin(
                DynamoBackend.NO, "default", fullgraph=False, dynamic=False, use_regional_compilation=False
            ),
        )
    except (ValueError, ImportError, RuntimeError) as error:
        found = [f"{name}={os.environ[name]}" for name in OF_LAUNCHERS if name in os.environ]
        left = f"; launchers have set {', '.join(found)}: unset what was left over" if found else ""
        raise InputError(f"Accelerate cannot start ({first_line(error)}){left}") from None
    if accelerator.device.type != kind:  # as under `accelerate launch --cpu`
        raise InputError(f"{kind} is set, but the launcher gave {accelerator.device.type}", "run.device")
    return accelerator


@contextlib.contextmanager
def settings_restored() -> Iterator[None]:
    """A context after which what `build_accelerator` sets for the whole process is as it was."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, fastpath = torch.backends.cudnn.benchmark, torch.backends.mha.get_fastpath_enabled()
    unset = {"CUBLAS_WORKSPACE_CONFIG", "TORCHINDUCTOR_CACHE_DIR"} - os.environ.keys()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.benchmark = benchmark
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for name in unset:
            os.environ.pop(name, None)


def _threads(run: RunConfig) -> int:
    """CPU threads of this process.

    Raises:
        InputError: a launcher says a number of processes that is none.
    """
    processes = os.environ.get("LOCAL_WORLD_SIZE") or "1"  # of this machine, as launchers say
    if not processes.isdecimal() or int(processes) < 1:
        raise InputError(f"LOCAL_WORLD_SIZE={processes} in the environment: must be a whole number >= 1, or unset")
    if run.threads != "auto":
        return run.threads
    asked = os.environ.get("OMP_NUM_THREADS", "")
    # launchers set it to 1 by themselves, which would leave all cores but one idle
    launched = {"LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys()
    if asked.isdecimal() and int(asked) and not launched:
        return int(asked)
    return max(1, cores() // int(processes))


def overruled(run: RunConfig, accumulate: int, accelerator: Accelerator) -> list[str]:
    """A line for each setting of Accelerate's launcher, environment or saved config that the run's config overrules."""
    settled = {
        "ACCELERATE_MIXED_PRECISION": ("run.precision", accelerator.mixed_precision.replace("no", "fp32")),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("optim.accumulate", str(accumulate)),
        "ACCELERATE_DYNAMO_BACKEND": ("run.compile", compile_mode(run, accelerator)),
    }
    asked = {name: os.environ.get(name, "").lower() for name in settled}
    return [
        f"{name}={asked[name]} is not used: {field} decides, and is {value}"
        for name, (field, value) in settled.items()
        if asked[name] not in ("", "no", value)  # the launcher sets "no" where nothing was set
    ]


def crowded(threads: int) -> str | None:
    """A line of advice if other programs keep so many cores busy that this many threads would slow each other down."""
    if threads < 2:
        return None
    shares = psutil.cpu_percent(interval=0.2, percpu=True)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(shares))
    free = sum(100 - shares[core] for core in own if core < len(shares)) / 100
    if free > threads / 2:
        return None
    fewer = max(1, int(free))
    return f"only {free:.1f} of {len(own)} cores are free: run.threads={fewer} can be much faster than {threads}"


def compile_mode(run: RunConfig, accelerator: Accelerator) -> str:
    """How training is compiled here, whatever `run.compile` leaves open.

    Raises:
        InputError: a CUDA graph is to be used on a CPU or with several processes, or there is no compiler.
    """
    device, processes = accelerator.device.type, accelerator.num_processes
    if run.compile == "none" or (run.compile == "auto" and (device != "cuda" or run.deterministic)):
        return "none"
    missing = missing_compiler(device)
    if run.compile == "auto":
        if missing and accelerator.is_main_process:
            _say_once(f"{missing}; until then training is not compiled, which is slower")
        return "none" if missing else "default"
    if run.compile == "graph" and (device != "cuda" or processes > 1):
        here = f"{processes} on {device}"
        raise InputError(f"graph needs one process on cuda, here: {here}; default is allowed", "run.compile")
    if missing:
        raise InputError(f"{missing}; none trains without it", "run.compile")
    return run.compile


def _use_bf16(precision: str, device: str) -> bool:
    if precision != "auto":
        return precision == "bf16"
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "mps":
        return False
    # without native instructions bf16 on a CPU is several times slower than fp32
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
