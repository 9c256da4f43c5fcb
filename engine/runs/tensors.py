"""Reads and writes a checkpoint: tensors of model, probes, optimisers and random generators, and its record.

Tensors are safetensors, everything else is JSON: nothing in a checkpoint is executed when it is read.
"""

import os
import random
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...configs.errors import InputError, first_line, shown
from ...configs.files import naming, to_json, write_atomically
from .checksums import MANIFEST, Damaged, reading, regular_file, seal, verify
from .state import VERSION, TrainingState, read_state

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool)
METRIC_BANKS = ("train_losses", "train_metrics")


def check(path: Path) -> TrainingState:
    """The record of a checkpoint, after its files were compared with its manifest.

    Raises:
        Damaged: a file is missing, cut short or changed.
        InputError: the checkpoint is of a version that cannot be read, or this user may not read a file.
    """
    with reading(path):
        names = os.listdir(path)
    if MANIFEST in names or "state.json" not in names:
        verify(path)
    state = read_state(path / "state.json")
    if state.version > 3 and MANIFEST not in names:  # since version 4 there is always one
        raise Damaged(f"{path / MANIFEST}: missing", "run.resume")
    return state


def read(
    path: Path, rank: int = 0, files: tuple[str, ...] = ("model", "probes", "trainer")
) -> tuple[dict[str, dict[str, Tensor]], TrainingState]:
    """The tensors of a checkpoint, by file and name, and its record.

    Args:
        rank: number of the process whose random generators are read; their tensors are missing if it had none.
        files: those that are read.

    Raises:
        InputError: as `check`, or the checkpoint holds a number that is not finite.
    """
    state = check(path)
    for name in files:
        regular_file(path / f"{name}.safetensors")
    try:
        tensors = {name: load_file(path / f"{name}.safetensors") for name in files}
        generators = path / f"rng-{rank:05d}.safetensors"
        tensors["rng"] = load_file(generators) if generators.is_file() else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise Damaged(f"{path}: not a readable checkpoint ({error})", "run.resume") from None
    for file, entries in tensors.items():
        for name, tensor in entries.items():
            if tensor.dtype not in DTYPES:
                raise InputError(f"{path}: {file} {shown(name)} is {tensor.dtype}", "run.resume")
    if broken := _not_finite(tensors):
        raise InputError(f"{path}: {broken} is not finite", "run.resume")
    return tensors, state


def _not_finite(tensors: dict[str, dict[str, Tensor]]) -> str | None:
    """The file and name of a tensor that holds NaN or an infinity."""
    for file, entries in tensors.items():
        for name, tensor in entries.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{file} {shown(name)}"
    return None


def write(
    folder: Path, training: Any, accelerator: Accelerator, state: dict[str, Any], stream: dict[str, Tensor]
) -> str | None:
    """Write a checkpoint's files; every process calls it.

    Args:
        folder: to write to; it is emptied first.
        training: the `TrainingStep` whose model, probes, optimisers and metrics are saved.
        state: content of state.json.
        stream: what the measurement of a stream keeps; only the main process's is saved.

    Returns:
        None, or the name of a tensor that is not finite, and then nothing was written.
    """
    tensors = {"model": training.model.state_dict(), "probes": training.probes.state_dict()}
    trainer = optimizer_tensors(training.optimizer, _trained(training), "optimizer")
    trainer |= optimizer_tensors(training.probe_optimizer, training.probes.named_parameters(), "probe_optimizer")
    trainer |= {f"objective.{name}": value for name, value in training.objective.state_dict().items()}
    for bank in METRIC_BANKS:
        # each process accumulates metrics of its own part of the batches: the file has their sum
        collected = getattr(training, bank).collect(accelerator).state_dict()
        trainer |= {f"{bank}.{name}": value for name, value in collected.items()}
    if training.churn:
        trainer |= {f"churn.{name}": value for name, value in training.churn.seen.items()}
    trainer |= {f"stream.{name}": value for name, value in stream.items()}
    tensors["trainer"] = trainer
    if broken := _not_finite(tensors):
        return broken
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    accelerator.wait_for_everyone()  # until the folder is there
    save_tensors(rng_tensors(), folder / f"rng-{accelerator.process_index:05d}.safetensors")
    if accelerator.is_main_process:
        for file, entries in tensors.items():
            save_tensors(entries, folder / f"{file}.safetensors")
        write_atomically(folder / "state.json", to_json({"version": VERSION, **state}, indent=1) + "\n")
    accelerator.wait_for_everyone()  # until every process has written its generators
    if accelerator.is_main_process:
        seal(folder)  # last: a checkpoint without a manifest does not count
    return None


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, contiguous, in a file whose permissions follow the umask."""
    with naming(path):
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
        # safetensors makes files that only their owner may read; the umask decided the folder's permissions
        path.chmod(path.parent.stat().st_mode & 0o666)


def restore(training: Any, accelerator: Accelerator, tensors: dict[str, dict[str, Tensor]], step: int) -> None:
    """Load what `read` returned into a new `TrainingStep` of the same config and into this process's generators.

    Args:
        step: number of optimiser steps done.

    Raises:
        InputError: the tensors do not fit this network.
    """
    try:
        load_model(training.model, tensors["model"])
        training.probes.load_state_dict(tensors["probes"])
        load_model(training.objective, under("objective.", tensors["trainer"]))
        load_optimizer(training.optimizer, _trained(training), "optimizer", tensors["trainer"])
        probes = training.probes.named_parameters()
        load_optimizer(training.probe_optimizer, probes, "probe_optimizer", tensors["trainer"])
        if accelerator.is_main_process:  # it continues the saved sum, the others begin at zero
            for bank in METRIC_BANKS:
                metrics = getattr(training, bank)
                # those that an older version did not have begin at zero
                metrics.load_state_dict(metrics.state_dict() | under(f"{bank}.", tensors["trainer"]))
    except RuntimeError as error:
        raise InputError(f"its weights do not fit this network ({first_line(error)})", "run.resume") from None
    training.device_step.fill_(step)
    if training.churn:
        codes = under("churn.", tensors["trainer"])
        training.churn.seen = {name: value.to(accelerator.device) for name, value in codes.items()}
    try:
        load_rng(tensors["rng"])
    except (RuntimeError, ValueError, TypeError, OverflowError, IndexError) as error:
        raise InputError(f"its random-generator state is invalid ({first_line(error)})", "run.resume") from None


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load weights, or raise an `InputError` that names one that does not fit."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in own | found:
        if own.get(name) != found.get(name):
            difference = f"{shown(name)} is {found.get(name, 'missing')}, the config asks for {own.get(name, 'none')}"
            raise InputError(f"its weights do not fit this network ({difference})", "run.resume")
    model.load_state_dict(tensors)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


Named = Iterable[tuple[str, nn.Parameter]]


def _trained(training: Any) -> Named:
    """The parameters that the optimiser has: the model's, and then those of its objective."""
    return chain(training.model.named_parameters(), training.objective.named_parameters("objective"))


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Named, prefix: str) -> dict[str, Tensor]:
    """State of an optimiser as `<prefix>.<parameter>.<entry>`."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters}
    return {
        f"{prefix}.{names[parameter]}.{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


ENTRIES = {"step", "exp_avg", "exp_avg_sq", "ema"}  # of AdamW's state; "ema" is the teacher's average


def load_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Named, prefix: str, tensors: dict[str, Tensor]
) -> None:
    """The reverse of `optimizer_tensors`; entries take their parameter's device and memory format.

    Optimisers trust their state, and torch's fused Adam writes beyond an entry that is too short. So each entry is
    checked against its parameter.
    """
    found = {name for name in tensors if name.startswith(f"{prefix}.")}
    if optimizer.param_groups and not found:
        raise InputError(f"{prefix} has no state", "run.resume")
    for name, parameter in parameters:
        entries = under(f"{prefix}.{name}.", tensors)
        if entries and not {"step", "exp_avg", "exp_avg_sq"} <= entries.keys() <= ENTRIES:
            raise InputError(f"{prefix} of {name} has {', '.join(map(shown, sorted(entries)))}", "run.resume")
        for entry, value in entries.items():
            shape = () if entry == "step" else tuple(parameter.shape)
            if tuple(value.shape) != shape or value.dtype not in FLOATS:
                given = f"{tuple(value.shape)} of {value.dtype}"
                raise InputError(f"{prefix} of {name}: {entry} is {given}, not {shape} of floats", "run.resume")
            if entry == "step":
                moved = value.to(parameter.device) if optimizer.defaults.get("fused") else value
            else:
                moved = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)
            optimizer.state[parameter][entry] = moved.detach()
            found.discard(f"{prefix}.{name}.{entry}")
    if found:
        raise InputError(f"{shown(min(found))} belongs to no parameter", "run.resume")


def rng_tensors() -> dict[str, Tensor]:
    """State of this process's random generators: Python's, NumPy's, torch's on the CPU and on the GPU."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    state = {
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*numpy_state["key"].tolist(), numpy_state["pos"]], dtype=torch.int64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def load_rng(state: dict[str, Tensor]) -> None:
    """The reverse of `rng_tensors`."""
    if "python" in state:
        random.setstate((3, tuple(state["python"].tolist()), None))
    if "numpy" in state:
        *keys, position = state["numpy"].tolist()
        if len(keys) != 624 or not 0 <= position <= 624:
            raise ValueError("numpy's has another size")
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position, 0, 0.0))
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
