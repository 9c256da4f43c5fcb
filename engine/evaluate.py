"""Frozen-probe evaluation: `accelerate launch engine/evaluate.py RUN_OR_CHECKPOINT ... eval.lengths=[1,3,5]`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from seqjepa.configs.console import open_console
from seqjepa.configs.interruption import interruptible
from seqjepa.loaders import InputError

if TYPE_CHECKING:
    from seqjepa.engine.config import Config
    from seqjepa.engine.console import Reporter
    from seqjepa.engine.model import SeqJEPA
    from seqjepa.engine.training_state import TrainingState

DONE, BAD_INPUT, MACHINE_FAILED = 0, 2, 4
HELP = """\
usage: accelerate launch engine/evaluate.py RUN_OR_CHECKPOINT [...] [section.key=value ...]

Asks a frozen network for the class and the action, and its untrained control for the same.
  accelerate launch engine/evaluate.py runs/cifar100-quick eval.lengths=[1,2,3,4,5,6,7,8]
  accelerate launch engine/evaluate.py runs/cifar100-quick/checkpoints/best eval.protocol=paper

A run stands for its newest checkpoint, whose config is used; section.key=value overrides it (data.root, eval.*).
Writes eval.json, lengths.png and factors.png to eval/<checkpoint>-<protocol> in the run, or to eval.out. With
eval.subspace=true: factor sweeps, subspaces, equivariance and collapse, to eval/<checkpoint>-subspace. Several runs
are also compared: a grid of training length by evaluation length, and with eval.protocol=both how far the two agree.

Settings (defaults):
{settings}

Exit codes: 0 done, 2 bad input, 4 the machine failed it, 128 + signal when
interrupted (`accelerate launch` makes every failure 1)."""


@interruptible("what was finished is written")
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    open_console()
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or {"-h", "--help"} & set(argv):
            print(HELP.format(settings=_settings()))
            return DONE
        if unknown := [word for word in argv if word.startswith("-")]:
            raise InputError(f"{unknown[0]}: unknown option; --help is one, values are section.key=value")
        paths = [Path(word).expanduser() for word in argv if "=" not in word or Path(word).exists()]
        if not paths:
            raise InputError("no run or checkpoint was given")
        from seqjepa.engine.console import Reporter

        with Reporter(True) as reporter:
            evaluate(paths, [word for word in argv if Path(word).expanduser() not in paths], reporter)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {error.field + ': ' if error.field else ''}{line}", file=sys.stderr)
        return BAD_INPUT
    except (OSError, MemoryError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        print(f"{cause}; what was finished is written", file=sys.stderr)
        return MACHINE_FAILED
    return DONE


def _cause(error: Exception) -> str | None:
    """What failed, in a line; None if it is not the machine's fault."""
    from seqjepa.engine.failures import explain, out_of_memory

    if out_of_memory(error):
        return "out of memory; a smaller eval.batch_size, or a smaller data.train_subset, needs less"
    return explain(error, 0, 1, 1)  # the numbers are those of a step, for want of memory


class Case(NamedTuple):
    """A checkpoint that can be evaluated."""

    checkpoint: Path
    state: TrainingState
    model: SeqJEPA
    config: Config
    folder: Path  # of its results

    @property
    def protocols(self) -> list[str]:
        return ["fast", "paper"] if self.config.eval.protocol == "both" else [self.config.eval.protocol]


def evaluate(paths: list[Path], overrides: list[str], reporter: Reporter) -> list[dict[str, Any]]:
    """Evaluate each checkpoint, write its results, and compare them if there are several.

    Args:
        paths: of run folders and checkpoints.
        overrides: `section.key=value`, over each checkpoint's config.
        reporter: speaks.

    Raises:
        InputError: a checkpoint, the data or a folder of results cannot be used.
    """
    from seqjepa.engine import evaluation_report as report

    # all of them, before hours are spent on the first
    cases = [_open(path, overrides, number if len(paths) > 1 else 0) for number, path in enumerate(paths, start=1)]
    if any(case.config.eval.subspace for case in cases):
        from seqjepa.engine.subspace_evaluation import evaluate_subspaces

        return [evaluate_subspaces(case, reporter) for case in cases]
    together = Path(cases[0].config.eval.out or "runs/comparison").expanduser()
    if len(cases) > 1:
        report.check_comparable(cases)
        report.make_folder(together)
    results, controls = [], {}
    for case in cases:
        result = _measure(case, controls, reporter)
        report.write(result, case.folder, reporter)
        results.append(result)
    if len(results) > 1:
        report.compare(results, together, reporter)
    return results


def _open(path: Path, overrides: list[str], number: int) -> Case:
    """Read a checkpoint and see that all but its data can be used; `number` is its place among several, or 0."""
    from seqjepa.engine import checkpoint_files
    from seqjepa.engine.checkpoints import find_checkpoint
    from seqjepa.engine.compose import compose
    from seqjepa.engine.evaluation_report import make_folder
    from seqjepa.engine.model import build_model
    from seqjepa.loaders.sequences import build_sequence

    found = find_checkpoint(path)
    if found is None:
        raise InputError(f"{path}: neither a checkpoint nor a run folder that has one")
    if found.is_symlink():  # `best`: the results belong to what it points to
        found = found.parent / found.readlink()
    try:
        tensors, state = checkpoint_files.read(found, files=("model",))
        # where results go is for the user to say, not for the file
        here = {"eval": state.config.get("eval", {}) | {"out": None}, "tracking": {"wandb": "disabled"}}
        saved = state.config | here
        config = compose(overrides, (f"{found}", saved)).config
        action_dim = build_sequence(config.sequence, (32, 32), config.actions).action_dim  # of images of any size
        model = build_model(config.model, config.target, action_dim)
        checkpoint_files.load_model(model, tensors["model"])
    except InputError as error:
        raise InputError(str(error) if str(found) in str(error) else f"{found}: {error}") from None
    run = found.parent.parent if found.parent.name == "checkpoints" else found.parent
    folder = run / "eval" / f"{found.name}-{'subspace' if config.eval.subspace else config.eval.protocol}"
    if config.eval.out:
        folder = Path(config.eval.out).expanduser()
        folder = folder / f"{number}-{run.name}-{found.name}" if number else folder
    make_folder(folder)
    return Case(found, state, model, config, folder)


def _measure(case: Case, controls: dict[str, dict[str, float]], reporter: Reporter) -> dict[str, Any]:
    """Answers of the trained and of the untrained network; the latter's are kept in `controls` for others like it."""
    import torch
    from accelerate.utils import set_seed

    from seqjepa.engine.environment import commit, hardware, versions
    from seqjepa.engine.frozen import FrozenNetwork, leakage_length, open_evaluation, questions, untrained_network
    from seqjepa.engine.probe_protocols import PROTOCOLS
    from seqjepa.loaders.loader import build_loaders

    config, settings = case.config, case.config.eval
    lengths, num_observed = settings.lengths, config.sequence.num_observed
    accelerator, loaders = open_evaluation(config, max(2, *lengths), case.state.images, reporter.say)
    asked = questions(lengths, num_observed, loaders.sequence.factors)
    images = {"train": len(loaders.train.sampler.indices), "test": len(loaders.validation.sampler.indices)}
    title = " and ".join(case.protocols)
    reporter.say(f"{case.checkpoint}: {images['train']} training and {images['test']} test images, {title}")
    if config.model.time_embedding and lengths[-1] > num_observed:
        reporter.say(f"the embeddings of the places after {num_observed} were never trained")
    result: dict[str, Any] = {
        "checkpoint": str(case.checkpoint),
        "task": config.data.name,
        "epoch": case.state.epoch,
        "num_observed": num_observed,
        "lengths": lengths,
        "leakage_length": leakage_length(lengths, num_observed),
        "factors": list(loaders.sequence.factors),
        "images": images,
        "eval": settings.model_dump(),
        "seed": config.run.seed,
        "trained_commit": case.state.commit,
        "commit": commit(),
        "timing": {"hardware": hardware(accelerator), "versions": versions()},
    }
    steps = {"fast": settings.renderings * len(loaders.train), "paper": settings.epochs * len(loaders.train)}

    def ask(name: str, network: SeqJEPA) -> dict[str, float]:
        started = time.perf_counter()
        reporter.advance(f"{protocol}, {name}", 0, total=steps[protocol] + len(loaders.validation))
        network.to(accelerator.device, memory_format=torch.channels_last)
        set_seed(config.run.seed)  # trained and untrained get the same heads
        frozen = FrozenNetwork(network, lengths, accelerator)
        answers = PROTOCOLS[protocol](frozen, asked, loaders, settings, reporter.advance)
        result["timing"][f"{protocol}_{name}_seconds"] = time.perf_counter() - started
        return answers

    for protocol in case.protocols:
        key = f"{protocol} {_control_key(config)}"
        trained = ask("trained", case.model)
        if key not in controls:
            where = {"seed": config.run.seed, "device": accelerator.device}
            training = build_loaders(config.data, config.sequence, config.actions, **where)
            controls[key] = ask("untrained", untrained_network(config, training, accelerator))
        result[protocol] = {"trained": trained, "untrained": controls[key]}
    return result


def _control_key(config: Config) -> str:
    """What decides the untrained network's answers."""
    sections = config.model_dump(include={"data", "sequence", "actions", "model", "target", "eval"})
    return json.dumps([sections, config.run.seed, config.run.precision, config.run.deterministic])


def _settings() -> str:
    from seqjepa.engine.compose import describe
    from seqjepa.engine.config import EvalConfig

    used = ("lengths", "protocol", "batch_size", "epochs", "linear_epochs", "lr", "hidden")
    used += ("renderings", "neighbours", "subspace", "out")
    fields = {name: EvalConfig.model_fields[name] for name in used}
    return "\n".join(
        f"  eval.{name} = {'null' if field.default is None else field.default}   [{describe(field)}]\n"
        f"      {field.description}"
        for name, field in fields.items()
    )


if __name__ == "__main__":
    sys.exit(main())
