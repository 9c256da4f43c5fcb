"""Evaluates checkpoints, each beside its untrained control, and then compares them."""

import json
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from ...configs.errors import InputError
from ...configs.files import to_json, write_atomically
from ...loaders.grids.arc import read_tasks
from ..analysis.accumulators import MetricBank
from ..analysis.layers import layer_curves, layer_metrics
from ..analysis.spectra import Moments, spectrum_metrics
from ..analysis.subspaces import subspace_metrics, sweep
from ..models.seq_jepa import SeqJEPA
from ..reports.console import Reporter, table
from ..reports.figures.subspaces import NetworkSweeps, draw_all
from . import report
from .arc import Embed, arc_scores, pixels, size_and_colours
from .cases import Case, check_comparable, check_distinct, make_folder, open_case
from .equivariance import equivariance_metrics, read_moved
from .frozen import FrozenNetwork, frozen_probes, leakage_length, untrained_network
from .protocols import PROTOCOLS


def evaluate(paths: list[Path], overrides: list[str], reporter: Reporter) -> list[dict[str, Any]]:
    """Evaluate run folders and checkpoints, write their results, and compare them if there are several.

    `overrides` are `section.key=value` words that override each checkpoint's config.

    Raises:
        InputError: a checkpoint, the data or a folder of results cannot be used.
    """
    # all are opened before hours are spent on the first
    cases = [open_case(path, overrides, number if len(paths) > 1 else 0) for number, path in enumerate(paths, start=1)]
    check_distinct(paths, cases)
    for notice in filter(None, (case.state.notice(case.checkpoint) for case in cases)):
        reporter.say(notice)
    if any(case.config.eval.arc for case in cases):
        return [_measure_arc(case, reporter) for case in cases]
    if any(case.config.eval.subspace for case in cases):
        return [_measure_subspaces(case, reporter) for case in cases]
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
    config, run, settings = case.config, case.config.run, case.config.eval
    lengths, num_observed = settings.lengths, config.sequence.num_observed
    most = config.model.aggregator.most_views
    if most is not None and lengths[-1] > most:
        raise InputError(f"the aggregator has positions for {most} views, not for {lengths[-1]}", "eval.lengths")
    accelerator, loaders = case.open_data(max(2, *lengths), reporter.say)
    probes = frozen_probes(lengths, num_observed, loaders.num_classes, loaders.sequence.factors)
    if not probes:
        without = "the task has neither classes nor factors to predict; eval.subspace=true needs neither"
        raise InputError(f"{case.checkpoint}: {without}")
    images = {"train": len(loaders.train.sampler.indices), "test": len(loaders.validation.sampler.indices)}
    title = " and ".join(case.protocols)
    reporter.say(f"{case.checkpoint}: {loaders.numbers}, {title}")
    if most is not None and lengths[-1] > num_observed:
        reporter.say(f"the position embeddings after {num_observed} views were never trained")
    result: dict[str, Any] = {
        **case.facts(accelerator),
        "num_observed": num_observed,
        "lengths": lengths,
        "leakage_length": leakage_length(lengths, num_observed),
        "factors": list(loaders.sequence.factors),
        "images": images,
        "largest_class": loaders.largest_class,
        "eval": settings.model_dump(),
    }
    renderings = {"paper": settings.epochs}  # of each training image

    def measure(name: str, network: SeqJEPA) -> dict[str, float]:
        started = time.perf_counter()
        steps = renderings.get(protocol, settings.renderings) * len(loaders.train)
        reporter.advance(f"{protocol}, {name}", 0, total=steps + len(loaders.validation))
        set_seed(run.seed)  # trained and untrained get the same heads
        frozen = FrozenNetwork(network, lengths, accelerator)
        scores = PROTOCOLS[protocol](frozen, probes, loaders, settings, reporter.advance)
        result["timing"][f"{protocol}_{name}_seconds"] = time.perf_counter() - started
        return scores

    # everything that decides the untrained network's scores
    sections = config.untrained().model_dump(include={"data", "sequence", "actions", "model", "target"})
    tested = loaders.validation.sampler.indices.tolist()  # not those that this run was trained on
    deciding = [sections, settings.model_dump(), run.seed, run.precision, run.deterministic, tested]
    for protocol in case.protocols:
        key = json.dumps([protocol, *deciding])
        trained = measure("trained", case.model)
        if key not in controls:
            controls[key] = measure("untrained", untrained_network(config, accelerator))
        result[protocol] = {"trained": trained, "untrained": controls[key]}
    return result


def _measure_arc(case: Case, reporter: Reporter) -> dict[str, Any]:
    """Judge the encoder of a checkpoint by ARC tasks, beside its untrained control and two that learn nothing."""
    config, settings, started = case.config, case.config.eval, time.perf_counter()
    side, encoder = settings.arc_side, config.model.encoder
    if encoder.sees != "grids":
        raise InputError(f"{case.checkpoint}: its encoder sees {encoder.sees}, not grids", "eval.arc")
    encoder.check_images((side, side))
    every = read_tasks(Path(settings.arc or "").expanduser())
    tasks = [task for task in every if task.side <= side]
    if len(tasks) < 2:
        fit = f"{len(tasks)} of {len(every)} tasks fit {side} x {side} cells"
        raise InputError(f"{settings.arc}: {fit}; at least two are needed", "eval.arc_side")
    accelerator, _ = case.open_data(config.sequence.num_observed + 1, reporter.say)
    tests = sum(len(task.tests) for task in tasks)
    reporter.say(f"{case.checkpoint}: {len(tasks)} of {len(every)} tasks fit {side} x {side} cells; {tests} tests")

    def embed(network: SeqJEPA) -> Embed:
        network.eval()

        def features(grids: Tensor) -> Tensor:
            return network.encoder(grids[:, None, None].float().to(accelerator.device))[:, 0].float()

        return features

    networks = {"trained": case.model.to(accelerator.device), "untrained": untrained_network(config, accelerator)}
    ways = {name: embed(network) for name, network in networks.items()}
    ways |= {"pixels": pixels, "size and colours": size_and_colours}
    scores = {name: arc_scores(way, tasks, side) for name, way in ways.items()}
    result = {**case.facts(accelerator), "tasks": len(tasks), "tests": tests, "side": side, **scores}
    result["timing"]["seconds"] = time.perf_counter() - started
    write_atomically(case.folder / "arc.json", to_json(result, indent=1) + "\n")
    rows = [[name, *(found[name] for found in scores.values())] for name in scores["trained"]]
    reporter.say(table(f"ARC tasks of {settings.arc}, %", ["measure", *scores], rows))
    reporter.say(f"{case.folder / 'arc.json'}; {result['timing']['seconds']:.0f} s")
    return result


def _measure_subspaces(case: Case, reporter: Reporter) -> dict[str, Any]:
    """Measure the network of a checkpoint and its untrained control; write subspace.json and figures to its folder."""
    config, num_observed = case.config, case.config.sequence.num_observed
    if config.sequence.views != "images":
        raise InputError(
            f"{case.checkpoint}: only images are swept; eval.arc judges an encoder of grids", "eval.subspace"
        )
    # one more view: the aggregate leaves out the first, which is the unchanged image in some kinds of sequence
    accelerator, loaders = case.open_data(num_observed + 1, reporter.say)
    reporter.say(
        f"{case.checkpoint}: subspaces of {config.diagnostics.anchors} images, equivariance on {loaders.numbers}"
    )
    started = time.perf_counter()
    networks = {"trained": case.model, "untrained": untrained_network(config, accelerator)}
    metrics, sweeps = {}, {}
    for name, network in networks.items():
        reporter.advance(f"subspaces, {name}", 0, total=len(loaders.train) + 2 * len(loaders.validation))
        frozen = FrozenNetwork(network, [num_observed], accelerator)
        swept = sweep(network, loaders.validation, config.diagnostics.anchors, accelerator)
        parts = (loaders.train, loaders.validation, loaders.validation.redrawn())
        train, test, again = (read_moved(frozen, part, reporter.advance) for part in parts)
        features = {"z": test["first"], "agg": test["agg"]}
        moments = MetricBank({feature: Moments(rows.shape[1]) for feature, rows in features.items()})
        moments.to(accelerator.device)
        for feature, rows in features.items():
            moments[feature].update(rows)
        moments = moments.collect(accelerator)
        curves = layer_curves(network, next(iter(loaders.validation.epoch(0))), num_observed, accelerator)
        metrics[name] = {
            **subspace_metrics(swept)[0],
            **layer_metrics(curves),
            **equivariance_metrics(train, test, again, loaders.sequence.factors, loaders.num_classes),
            **spectrum_metrics(moments),
        }
        sweeps[name] = NetworkSweeps(swept, {feature: moments[feature].spectrum() for feature in moments}, curves)
    result = {**case.facts(accelerator), "anchors": config.diagnostics.anchors, **metrics}
    draw_all(sweeps, case.folder)
    result["timing"]["seconds"] = time.perf_counter() - started
    write_atomically(case.folder / "subspace.json", to_json(result, indent=1) + "\n")
    rows = [[name, *(metrics[network][name] for network in networks)] for name in metrics["trained"]]
    reporter.say(table(f"subspaces, {case.checkpoint}", ["metric", *networks], rows))
    reporter.say(f"{case.folder / 'subspace.json'} and figures; {result['timing']['seconds']:.0f} s")
    return result
