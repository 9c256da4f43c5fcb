"""Checkpoints: a folder of safetensors and JSON, written beside and renamed; reading one executes nothing.

checkpoints/epoch-0007/              seven epochs are done
checkpoints/epoch-0007-step-00042/   and 42 steps of the next one: an interrupted run
    model.safetensors      encoder, aggregator, predictor and teacher
    probes.safetensors
    trainer.safetensors    optimisers, metric accumulators
    rng-00000.safetensors  generators of process 0, and so on
    state.json             position, best epoch, config, tracker; written last
checkpoints/best -> epoch-0005
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqjepa.engine.records import to_json
from seqjepa.loaders import InputError

__all__ = ["Checkpoints", "find_checkpoint", "read", "restore", "write"]

VERSION = 3
METRIC_BANKS = ("train_losses", "train_metrics")
NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{5,}))?")


class Checkpoints:
    """The checkpoints of a run.

    Args:
        folder: their folder.
        keep: how many of the newest are kept, besides the best.
    """

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        found = [
            path
            for path in self.folder.glob("epoch-*")
            if NAME.fullmatch(path.name) and (path / "state.json").is_file()
        ]
        return sorted(found, key=_position)

    def newest(self) -> Path | None:
        """The latest complete checkpoint."""
        return (self.all() or [None])[-1]

    def partial(self, epoch: int, step: int) -> tuple[Path, Path]:
        """Where a checkpoint is written, and the name that it will have.

        Args:
            epoch: number of complete epochs.
            step: number of steps done in the next one.
        """
        name = f"epoch-{epoch:04d}" + (f"-step-{step:05d}" if step else "")
        return self.folder / f".partial-{name}", self.folder / name

    def publish(self, partial: Path, final: Path, *, best: bool) -> None:
        """Make a written checkpoint visible, whole, and drop the ones that are no longer kept."""
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        link = self.folder / "best"
        if best:
            fresh = self.folder / f".best-{os.getpid()}"
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(final.name)
            os.replace(fresh, link)
        kept = [final, *self.all()[-self.keep :]]
        for path in self.all():
            if path not in kept and path.name != (os.readlink(link) if link.is_symlink() else None):
                shutil.rmtree(path)

    def rewind(self, epoch: int, step: int, best_epoch: int) -> None:
        """Drop what lies after a position that the run goes back to, and point `best` at what was best by then."""
        for path in self.all():
            if _position(path) > (epoch, step):
                shutil.rmtree(path)
        link = self.folder / "best"
        best = self.folder / f"epoch-{best_epoch:04d}"
        if link.is_symlink() and os.readlink(link) != best.name:
            link.unlink()
            if best.is_dir():
                link.symlink_to(best.name)


def _position(path: Path) -> tuple[int, int]:
    epoch, step = NAME.fullmatch(path.name).groups()
    return int(epoch), int(step or 0)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint at `path`, or the newest of the run folder there; None if there is neither."""
    if (path / "checkpoints").is_dir():
        return Checkpoints(path / "checkpoints", 1).newest()
    return path if (path / "state.json").is_file() else None


def read(
    path: Path, rank: int = 0, files: tuple[str, ...] = ("model", "probes", "trainer")
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors by file, and the state, of a checkpoint.

    Args:
        path: its folder.
        rank: of the process whose generators are read; one that has none in the file starts fresh ones.
        files: which of its files are read.

    Raises:
        InputError: it is missing, damaged or of another version.
    """
    wanted = {"epoch", "step", "best", "final", "patience", "seconds", "train_seconds", "wandb_id", "images"}
    wanted |= {"commit", "config"}
    try:
        state = json.loads((path / "state.json").read_text())
        tensors = {name: load_file(path / f"{name}.safetensors") for name in files}
        generators = path / f"rng-{rank:05d}.safetensors"
        tensors["rng"] = load_file(generators) if generators.is_file() else {}
    except (OSError, SafetensorError, ValueError) as error:
        raise InputError(f"{path}: not a readable checkpoint ({error})", "run.resume") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise InputError(f"{path}: not a checkpoint of version {VERSION}", "run.resume")
    if missing := sorted(wanted - state.keys()):
        raise InputError(f"{path}: its state.json holds no {missing[0]}", "run.resume")
    if not isinstance(state["config"], dict):
        raise InputError(f"{path}: the config in its state.json is no mapping", "run.resume")
    return tensors, state


def write(folder: Path, learner: Any, accelerator: Accelerator, state: dict[str, Any]) -> str | None:
    """Write a checkpoint's files; every process calls it.

    Args:
        folder: receives them; made anew.
        learner: whose model, probes, optimisers and metrics are saved.
        accelerator: of the processes.
        state: what goes into state.json.

    Returns:
        The name of a tensor that is not finite, and then nothing was written; else None.
    """
    tensors = {"model": learner.model.state_dict(), "probes": learner.probes.state_dict()}
    trainer = optimizer_tensors(learner.optimizer, learner.model, "optimizer")
    trainer |= optimizer_tensors(learner.probe_optimizer, learner.probes, "probe_optimizer")
    for bank in METRIC_BANKS:
        # each process holds its own part of the metrics: their sum goes into the file
        collected = getattr(learner, bank).collect(accelerator).state_dict()
        trainer |= {f"{bank}.{name}": value for name, value in collected.items()}
    tensors["trainer"] = trainer
    for file, entries in tensors.items():
        for name, tensor in entries.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                return f"{file} {name}"
    if accelerator.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _save(rng_tensors(), folder / f"rng-{accelerator.process_index:05d}.safetensors")
    if accelerator.is_main_process:
        for file, entries in tensors.items():
            _save(entries, folder / f"{file}.safetensors")
        (folder / "state.json").write_text(to_json({"version": VERSION, **state}, indent=1))
    accelerator.wait_for_everyone()
    return None


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    """On the CPU, dense and in the standard layout, as safetensors asks."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def restore(learner: Any, accelerator: Accelerator, tensors: dict[str, dict[str, Tensor]], step: int) -> None:
    """Put a learner, and this process's generators, where a checkpoint left them.

    Args:
        learner: freshly built from the same config.
        accelerator: of the processes.
        tensors: of `read`.
        step: optimiser steps done.

    Raises:
        InputError: the tensors are not those of this network.
    """
    try:
        load_model(learner.model, tensors["model"])
        learner.probes.load_state_dict(tensors["probes"])
        load_optimizer(learner.optimizer, learner.model, "optimizer", tensors["trainer"])
        load_optimizer(learner.probe_optimizer, learner.probes, "probe_optimizer", tensors["trainer"])
        if accelerator.is_main_process:  # the others add to the sum from zero
            for bank in METRIC_BANKS:
                getattr(learner, bank).load_state_dict(_under(f"{bank}.", tensors["trainer"]))
    except RuntimeError as error:
        raise InputError(f"its tensors are not this network's ({str(error).splitlines()[0]})", "run.resume") from None
    learner.device_step.fill_(step)
    load_rng(tensors["rng"])


def load_model(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load weights that are all of this network's, or raise an `InputError` that names one that differs."""
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in own | found:
        if own.get(name) != found.get(name):
            difference = f"{name} is {found.get(name, 'missing')}, the config asks for {own.get(name, 'none')}"
            raise InputError(f"its tensors are not this network's ({difference})", "run.resume")
    model.load_state_dict(tensors)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """State of an optimiser as `<prefix>.<parameter>.<entry>`."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        f"{prefix}.{names[parameter]}.{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer, module: nn.Module, prefix: str, tensors: dict[str, Tensor]
) -> None:
    """The reverse of `optimizer_tensors`; entries take their parameter's device and layout."""
    for name, parameter in module.named_parameters():
        for entry, value in _under(f"{prefix}.{name}.", tensors).items():
            if value.shape == parameter.shape:
                moved = torch.empty_like(parameter, memory_format=torch.preserve_format).copy_(value)
            else:
                moved = value.to(parameter.device) if entry == "step" and optimizer.defaults.get("fused") else value
            optimizer.state[parameter][entry] = moved.detach()


def rng_tensors() -> dict[str, Tensor]:
    """State of this process's generators: Python's, NumPy's, torch's on the CPU and on the GPU."""
    _, keys, position, *_ = np.random.get_state()
    state = {
        "python": torch.tensor(random.getstate()[1], dtype=torch.int64),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
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
        np.random.set_state(("MT19937", np.array(keys, np.uint32), position))
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
