"""Evaluates checkpoints, each beside its untrained control, and then compares them."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from ...configs.errors import InputError
from ..config import Config
from ..models.seq_jepa import SeqJEPA
from ..reports.console import Reporter
from . import report
from .cases import Case, check_comparable, make_folder, open_case
from .frozen import FrozenNetwork, frozen_probes, leakage_length, untrained_network
from .protocols import PROTOCOLS
from .subspaces import evaluate_subspaces


def evaluate(paths: list[Path], overrides: list[str], reporter: Reporter) -> list[dict[str, Any]]:
    """Evaluate run folders and checkpoints, write their results, and compare them if there are several.

    `overrides` are `section.key=value` words that override each checkpoint's config.

    Raises:
        InputError: a checkpoint, the data or a folder of results cannot be used.
    """
    # all are opened before hours are spent on the first
    cases = [open_case(path, overrides, number if len(paths) > 1 else 0) for number, path in enumerate(paths, start=1)]
    for notice in filter(None, (case.state.notice(case.checkpoint) for case in cases)):
        reporter.say(notice)
    if any(case.config.eval.subspace for case in cases):
        return [evaluate_subspaces(case, reporter) for case in cases]
    together = Path(cases[0].config.eval.out or "runs/comparison").expanduser()
    if len(cases) > 1:
        check_comparable(cases)
        make_folder(together)
    results, controls = [], {}
    for case in cases:
        result = _measure(case, controls, reporter)
        report.write(result, case.folder, reporter)
        results.append(result)
    if len(results) > 1:
        report.compare(results, together, reporter)
    return results


def _measure(case: Case, controls: dict[str, dict[str, float]], reporter: Reporter) -> dict[str, Any]:
    """Scores of the trained and the untrained network; the latter's are kept in `controls` for runs that share them."""
    config, settings = case.config, case.config.eval
    lengths, num_observed = settings.lengths, config.sequence.num_observed
    accelerator, loaders = case.open_data(max(2, *lengths), reporter.say)
    probes = frozen_probes(lengths, num_observed, loaders.num_classes, loaders.sequence.factors)
    if not probes:
        raise InputError(
            f"{case.checkpoint}: the task has neither classes nor factors to predict; eval.subspace=true needs neither"
        )
    images = {"train": len(loaders.train.sampler.indices), "test": len(loaders.validation.sampler.indices)}
    title = " and ".join(case.protocols)
    reporter.say(f"{case.checkpoint}: {images['train']} training and {images['test']} test images, {title}")
    if config.model.aggregator.knows_positions and lengths[-1] > num_observed:
        reporter.say(f"the position embeddings after {num_observed} views were never trained")
    result: dict[str, Any] = {
        **case.facts(accelerator),
        "num_observed": num_observed,
        "lengths": lengths,
        "leakage_length": leakage_length(lengths, num_observed),
        "factors": list(loaders.sequence.factors),
        "images": images,
        "eval": settings.model_dump(),
    }
    steps = {"fast": settings.renderings * len(loaders.train), "paper": settings.epochs * len(loaders.train)}

    def measure(name: str, network: SeqJEPA) -> dict[str, float]:
        started = time.perf_counter()
        reporter.advance(f"{protocol}, {name}", 0, total=steps[protocol] + len(loaders.validation))
        set_seed(config.run.seed)  # trained and untrained get the same heads
        frozen = FrozenNetwork(network, lengths, accelerator)
        scores = PROTOCOLS[protocol](frozen, probes, loaders, settings, reporter.advance)
        result["timing"][f"{protocol}_{name}_seconds"] = time.perf_counter() - started
        return scores

    for protocol in case.protocols:
        key = f"{protocol} {_control_key(config)}"
        trained = measure("trained", case.model)
        if key not in controls:
            controls[key] = measure("untrained", untrained_network(config, accelerator))
        result[protocol] = {"trained": trained, "untrained": controls[key]}
    return result


def _control_key(config: Config) -> str:
    """Everything that decides the untrained network's scores."""
    sections = config.untrained().model_dump(include={"data", "sequence", "actions", "model", "target"})
    return json.dumps(
        [sections, config.eval.model_dump(), config.run.seed, config.run.precision, config.run.deterministic]
    )
