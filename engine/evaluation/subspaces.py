"""Measures sweeps, subspaces, equivariance and collapse of a checkpoint, beside its untrained control."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...configs.files import to_json, write_atomically
from ...loaders.loader import build_loaders
from ..analysis.spectra import REFERENCE_NAMES, Moments
from ..analysis.subspaces import subspace_metrics
from ..analysis.sweeps import sweep
from ..reports.console import Reporter, number
from ..reports.figures.subspaces import NetworkSweeps, draw_all
from ..runtime.provenance import commit, hardware, versions
from .cases import Case
from .equivariance import equivariance_metrics, read_moved
from .frozen import FrozenNetwork, open_evaluation, untrained_network
from .report import table

__all__ = ["evaluate_subspaces"]


def evaluate_subspaces(case: Case, reporter: Reporter) -> dict[str, Any]:
    """Measure the trained and the untrained network, and write subspace.json and the figures to the case's folder."""
    config, num_observed = case.config, case.config.sequence.num_observed
    # one extra view: the aggregate is of the views after the first, which is the image itself in some sequences
    accelerator, loaders = open_evaluation(config, num_observed + 1, case.state.images, reporter.say)
    where = {"seed": config.run.seed, "device": accelerator.device}
    training = build_loaders(config.data, config.sequence, config.actions, **where)
    reporter.say(
        f"{case.checkpoint}: subspaces of {config.diagnostics.anchors} images, equivariance on "
        f"{len(loaders.train.sampler.indices)} training and {len(loaders.validation.sampler.indices)} test images"
    )
    started = time.perf_counter()
    networks = {"trained": case.model, "untrained": untrained_network(config, training, accelerator)}
    metrics, seen = {}, {}
    steps = len(loaders.train) + 2 * len(loaders.validation)
    for name, network in networks.items():
        reporter.advance(f"subspaces, {name}", 0, total=steps)
        network.to(accelerator.device, memory_format=torch.channels_last)
        frozen = FrozenNetwork(network, [num_observed], accelerator)
        sweeps = sweep(network, loaders.validation, config.diagnostics.anchors, accelerator)
        parts = (loaders.train, loaders.validation, loaders.validation.redrawn())
        train, test, again = (read_moved(frozen, part, reporter.advance) for part in parts)
        found = equivariance_metrics(train, test, again, loaders.sequence.factors, loaders.num_classes)
        spectra = {}
        for feature, rows in (("z", test["first"]), ("agg", test["agg"])):
            moments = Moments(rows.shape[1]).double().to(rows.device)
            moments.update(rows)
            figures = moments.cpu().compute()
            spectra[feature] = moments.spectrum()
            found[REFERENCE_NAMES[feature]] = figures.pop("reference_rank")
            found |= {f"{metric}_{feature}": value for metric, value in figures.items()}
        metrics[name] = subspace_metrics(sweeps)[0] | found
        seen[name] = NetworkSweeps(sweeps, spectra)
    result = {
        "checkpoint": str(case.checkpoint),
        "task": config.data.name,
        "epoch": case.state.position.segment,
        "anchors": config.diagnostics.anchors,
        "seed": config.run.seed,
        **metrics,
        "trained_commit": case.state.commit,
        "commit": commit(),
        "timing": {"hardware": hardware(accelerator), "versions": versions()},
    }
    draw_all(seen, case.folder)
    result["timing"]["seconds"] = time.perf_counter() - started
    write_atomically(case.folder / "subspace.json", to_json(result, indent=1) + "\n")
    rows = [[name, *(number(metrics[network][name]) for network in networks)] for name in metrics["trained"]]
    reporter.say(table(f"subspaces, {case.checkpoint}", ["metric", *networks], rows))
    reporter.say(f"{case.folder / 'subspace.json'} and figures; {result['timing']['seconds']:.0f} s")
    return result
