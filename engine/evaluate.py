"""Frozen-probe evaluation: `accelerate launch engine/evaluate.py RUN_OR_CHECKPOINT ... eval.lengths=[1,3,5]`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqjepa.loaders import InputError

if TYPE_CHECKING:
    from seqjepa.engine.console import Reporter

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130
HELP = """\
usage: accelerate launch engine/evaluate.py RUN_OR_CHECKPOINT [...] [section.key=value ...]

Asks a frozen network for the class and the action, and its untrained control for the same.
  accelerate launch engine/evaluate.py runs/cifar100-quick eval.lengths=[1,2,3,4,5,6,7,8]
  accelerate launch engine/evaluate.py runs/cifar100-quick/checkpoints/best eval.protocol=paper

A run stands for its newest checkpoint, whose config is used; section.key=value overrides it (data.root, eval.*).
Writes eval.json, lengths.png and factors.png to eval/<checkpoint> in the run, or to eval.out. Several runs are also
compared: a grid of training length by evaluation length, and with eval.protocol=both how far the two agree.

Settings (defaults):
{settings}

Exit codes: 0 done, 2 bad input (`accelerate launch` makes every failure 1)."""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if not argv or {"-h", "--help"} & set(argv):
            print(HELP.format(settings=_settings()))
            return DONE
        if unknown := [word for word in argv if word.startswith("-")]:
            raise InputError(f"{unknown[0]}: unknown option; --help is one, values are section.key=value")
        paths = [Path(word) for word in argv if "=" not in word]
        if not paths:
            raise InputError("no run or checkpoint was given")
        from seqjepa.engine.console import Reporter

        with Reporter(True) as reporter:
            evaluate(paths, [word for word in argv if "=" in word], reporter)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return DONE


def evaluate(paths: list[Path], overrides: list[str], reporter: Reporter) -> list[dict[str, Any]]:
    """Evaluate each checkpoint, write its results, and compare them if there are several.

    Args:
        paths: of run folders and checkpoints.
        overrides: `section.key=value`, over each checkpoint's config.
        reporter: speaks.

    Raises:
        InputError: a checkpoint or the data cannot be used.
    """
    from seqjepa.engine import evaluation_report as report

    opened = [_open(path, overrides) for path in paths]  # all of them, before hours are spent on the first
    results, controls = [], {}
    for checkpoint, state, model, config in opened:
        result = _evaluate_one(checkpoint, state, model, config, controls, reporter)
        folder = Path(config.eval.out or checkpoint.parent.parent / "eval" / checkpoint.name).expanduser()
        if config.eval.out and len(paths) > 1:
            folder = folder / f"{len(results) + 1}-{checkpoint.parent.parent.name}-{checkpoint.name}"
        report.write(result, folder, reporter)
        results.append(result)
    if len(results) > 1:
        report.compare(results, Path(opened[0][3].eval.out or "runs/comparison").expanduser(), reporter)
    return results


def _open(path: Path, overrides: list[str]):
    """Checkpoint folder, state, weights and config of an evaluation."""
    from seqjepa.engine import checkpoints
    from seqjepa.engine.compose import compose

    found = checkpoints.find_checkpoint(path.expanduser())
    if found is None:
        raise InputError(f"{path}: neither a checkpoint nor a run folder that has one")
    if found.is_symlink():  # `best`: the results belong to what it points to
        found = found.parent / found.readlink()
    tensors, state = checkpoints.read(found, files=("model",))
    config = compose(overrides, (f"{found}", state["config"])).config
    return found, state, tensors["model"], config


def _evaluate_one(
    checkpoint: Path, state, tensors, config, controls: dict[str, dict[str, float]], reporter: Reporter
) -> dict[str, Any]:
    """Answers of the trained and of the untrained network; the latter's are kept in `controls` for others like it."""
    import torch

    from seqjepa.engine.checkpoints import load_model
    from seqjepa.engine.compose import dump
    from seqjepa.engine.environment import build_accelerator, commit, hardware, versions
    from seqjepa.engine.frozen import FrozenNetwork, questions, untrained_network
    from seqjepa.engine.model import build_model
    from seqjepa.engine.probe_protocols import fast_protocol, paper_protocol
    from seqjepa.loaders.loader import build_loaders

    accelerator = build_accelerator(config.run, 1)
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes: the evaluation runs in one (--num_processes 1)")
    lengths, num_observed = config.eval.lengths, config.sequence.num_observed
    loaders = build_loaders(
        config.data.model_copy(update={"batch_size": config.eval.batch_size}),
        config.sequence.model_copy(update={"num_observed": max(2, *lengths)}),
        config.actions,
        seed=config.run.seed,
        device=accelerator.device,
    )
    model = build_model(config.model, config.target, loaders.sequence.action_dim).to(accelerator.device)
    try:
        load_model(model, tensors)
    except InputError as error:
        raise InputError(f"{checkpoint}: {error}") from None
    model.to(memory_format=torch.channels_last)
    networks = {"trained": model, "untrained": untrained_network(config, loaders, accelerator)}
    asked = questions(lengths, num_observed, loaders.sequence.factors)
    protocols = {"fast": fast_protocol, "paper": paper_protocol}
    chosen = ["fast", "paper"] if config.eval.protocol == "both" else [config.eval.protocol]
    images = {"train": len(loaders.train.sampler.indices), "test": len(loaders.validation.sampler.indices)}
    reporter.say(f"{checkpoint}: {images['train']} training and {images['test']} test images, {' and '.join(chosen)}")
    if state["images"] != loaders.fingerprint:
        reporter.say("these are other images than it was trained on")
    result: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "epoch": state["epoch"],
        "num_observed": num_observed,
        "lengths": lengths,
        "factors": list(loaders.sequence.factors),
        "images": images,
        "eval": config.eval.model_dump(),
        "seed": config.run.seed,
        "trained_at": state["commit"],
        "commit": commit(),
        "timing": {"hardware": hardware(accelerator), "versions": versions()},
    }
    steps = {"fast": config.eval.renderings * len(loaders.train) + len(loaders.validation)}
    steps["paper"] = config.eval.epochs * len(loaders.train)
    for protocol in chosen:
        answers = result.setdefault(protocol, {})
        same = f"{protocol}\n{dump(config)}"
        for name, network in networks.items():
            if name == "untrained" and same in controls:
                answers[name] = controls[same]
                continue
            started = time.perf_counter()
            reporter.advance(f"{protocol}, {name}", 0, total=steps[protocol])
            frozen = FrozenNetwork(network, lengths, accelerator)
            answers[name] = protocols[protocol](frozen, asked, loaders, config, reporter.advance)
            result["timing"][f"{protocol}_{name}_seconds"] = time.perf_counter() - started
        controls[same] = answers["untrained"]
    return result


def _settings() -> str:
    from seqjepa.engine.compose import describe
    from seqjepa.engine.config import EvalConfig

    used = ("lengths", "protocol", "batch_size", "epochs", "linear_epochs", "lr", "renderings", "neighbours", "out")
    fields = {name: EvalConfig.model_fields[name] for name in used}
    return "\n".join(
        f"  eval.{name} = {'null' if field.default is None else field.default}   [{describe(field)}]\n"
        f"      {field.description}"
        for name, field in fields.items()
    )


if __name__ == "__main__":
    sys.exit(main())
