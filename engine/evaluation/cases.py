"""Opens checkpoints: their networks, and what an evaluation of them needs."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from ...configs.errors import InputError
from ...loaders.config import DataConfig, NoCurriculumConfig
from ...loaders.loader import Loaders, build_loaders
from ...loaders.sequences import build_sequence
from ..config import Config, compose
from ..models.seq_jepa import SeqJEPA
from ..runs.checkpoints import find_checkpoint
from ..runs.state import TrainingState
from ..runs.tensors import load_model, read
from ..runtime.accelerator import build_accelerator
from ..runtime.provenance import commit, hardware, versions


class Case(NamedTuple):
    """A checkpoint, ready to be evaluated."""

    checkpoint: Path
    state: TrainingState
    model: SeqJEPA
    config: Config
    folder: Path  # where its results are written

    @property
    def protocols(self) -> list[str]:
        """Names of the protocols that its config asks for."""
        return ["fast", "paper"] if self.config.eval.protocol == "both" else [self.config.eval.protocol]

    def open_data(self, num_observed: int, say: Callable[[str], None]) -> tuple[Accelerator, Loaders]:
        """The accelerator, and the loaders for an evaluation that needs `num_observed` views.

        Raises:
            InputError: there are several processes, the data cannot be used, or all held-out images were trained on.
        """
        config, run = self.config, self.config.run
        if run.device == "mps":  # regressions and spectra need float64
            run = run.model_copy(update={"device": "cpu"})
        accelerator = build_accelerator(run, 1)
        if accelerator.num_processes > 1:
            raise InputError(f"{accelerator.num_processes} processes: the evaluation runs in one (--num_processes 1)")
        torch.set_float32_matmul_precision("highest")  # regressions and neighbours need more than TF32's ten bits
        anew = {"fixed_views": False, "curriculum": NoCurriculumConfig()}  # probes see as many views as of any run
        data = config.data.model_copy(update={"batch_size": config.eval.batch_size, **anew})
        sequence = config.sequence.model_copy(update={"num_observed": num_observed})
        where = {"seed": config.run.seed, "device": accelerator.device}
        loaders = build_loaders(data, sequence, config.actions, drop_last=False, **where)
        if loaders.notice:
            say(loaders.notice)
        if self.state.images not in ("unknown", loaders.fingerprint):
            say(f"these are not the images that the network was trained on{self.state.other_pillow()}")
            return accelerator, loaders
        return accelerator, self._without_trained_on(loaders, say)

    def _without_trained_on(self, loaders: Loaders, say: Callable[[str], None]) -> Loaders:
        """The loaders without held-out images that the network was trained on, as overrides can hold out others."""
        validation = loaders.validation
        unseen = loaders.unseen(DataConfig.model_validate(self.state.config.get("data", {})))
        count = len(validation.sampler.indices)
        if not len(unseen):
            advice = "leave data.held_out, data.val_subset and data.subset_seed as they were in training"
            raise InputError(f"{self.checkpoint}: all {count} held-out images were trained on; {advice}")
        if len(unseen) == count:
            return loaders
        say(f"{count - len(unseen)} of the {count} held-out images were trained on, and are left out")
        return replace(loaders, validation=validation.restricted(unseen))

    def facts(self, accelerator: Accelerator) -> dict[str, Any]:
        """Facts that each file of results begins with; durations are added to `timing`."""
        return {
            "checkpoint": str(self.checkpoint),
            "task": self.config.data.name,
            "epoch": self.state.position.segment,
            "seed": self.config.run.seed,
            "trained_commit": self.state.commit,
            "commit": commit(),
            "timing": {"hardware": hardware(accelerator), "versions": versions()},
        }


def open_case(path: Path, overrides: list[str], number: int) -> Case:
    """Read a checkpoint and check everything but its data.

    Args:
        path: a checkpoint, or a run folder, which stands for its newest checkpoint.
        overrides: `section.key=value` words that override the checkpoint's config.
        number: position among several checkpoints, from 1; 0 if it is the only one.

    Raises:
        InputError: there is no checkpoint, it cannot be read, the overrides do not fit it, or its folder of results
            cannot be written.
    """
    found = find_checkpoint(path)
    if found is None:
        raise InputError(f"{path}: neither a checkpoint nor a run folder that has one")
    if found.is_symlink():  # `best`: the results belong to the checkpoint that it points to
        found = found.parent / found.readlink()
    model, state, config = read_network(found, overrides)
    run = found.parent.parent if found.parent.name == "checkpoints" else found.parent
    kind = "arc" if config.eval.arc else "subspace" if config.eval.subspace else config.eval.protocol
    folder = run / "eval" / f"{found.name}-{kind}"
    if config.eval.out:
        folder = Path(config.eval.out).expanduser()
        folder = folder / f"{number}-{run.name}-{found.name}" if number else folder
    make_folder(folder)
    return Case(found, state, model, config, folder)


def read_network(checkpoint: Path, overrides: Sequence[str] = ()) -> tuple[SeqJEPA, TrainingState, Config]:
    """The network of a checkpoint, its record, and its config.

    Args:
        checkpoint: its folder.
        overrides: `section.key=value` words that override its config.

    Raises:
        InputError: the checkpoint is damaged, or of a version that cannot be read, or the overrides do not fit it.
    """
    try:
        tensors, state = read(checkpoint, files=("model",))
        # the user decides where results go, not the checkpoint's config
        here = {"eval": state.config.get("eval", {}) | {"out": None}, "tracking": {"wandb": "disabled"}}
        config = compose([*overrides], (str(checkpoint), state.config | here)).config
        actions = build_sequence(config.sequence, (32, 32), config.actions).action_space  # same for any image size
        model = SeqJEPA(config.model, config.target, actions)
        load_model(model, tensors["model"])
    except InputError as error:  # of the field run.resume, which training alone has
        raise InputError(str(error) if str(checkpoint) in str(error) else f"{checkpoint}: {error}") from None
    return model, state, config


def make_folder(folder: Path) -> None:
    """Make a folder for results.

    Raises:
        InputError: the folder cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None


def check_distinct(paths: list[Path], cases: list[Case]) -> None:
    """Refuse a checkpoint that is given twice, as itself or as its run.

    Raises:
        InputError: names the two words.
    """
    known: dict[Path, Path] = {}
    for path, case in zip(paths, cases, strict=True):
        place = case.checkpoint.resolve()
        if place in known:
            raise InputError(f"{known[place]} and {path} are one checkpoint, {case.checkpoint}: give one of them")
        known[place] = path


def check_comparable(cases: list[Case]) -> None:
    """Refuse to compare checkpoints of different tasks, or without a common protocol.

    Raises:
        InputError: names two such checkpoints.
    """
    first = cases[0]
    for case in cases[1:]:
        both = f"{first.checkpoint} and {case.checkpoint}"
        if case.config.data.name != first.config.data.name:
            names = f"{first.config.data.name} and {case.config.data.name}"
            raise InputError(f"{both} are of {names}; compare runs of one task")
        if not set(case.protocols) & set(first.protocols):
            raise InputError(f"{both} have no protocol in common; set eval.protocol")
