"""Measures subspaces, equivariance and collapse of a checkpoint, beside its untrained control."""

import time
from typing import Any

from ...configs.files import to_json, write_atomically
from ..analysis.accumulators import MetricBank
from ..analysis.spectra import Moments, spectrum_metrics
from ..analysis.subspaces import subspace_metrics
from ..analysis.sweeps import sweep
from ..reports.console import Reporter, number, table
from ..reports.figures.subspaces import NetworkSweeps, draw_all
from .cases import Case
from .equivariance import equivariance_metrics, read_moved
from .frozen import FrozenNetwork, untrained_network


def evaluate_subspaces(case: Case, reporter: Reporter) -> dict[str, Any]:
    """Measure the network of a checkpoint and its untrained control; write subspace.json and figures to its folder."""
    config, num_observed = case.config, case.config.sequence.num_observed
    # one more view: the aggregate leaves out the first, which is the unchanged image in some kinds of sequence
    accelerator, loaders = case.open_data(num_observed + 1, reporter.say)
    reporter.say(
        f"{case.checkpoint}: subspaces of {config.diagnostics.anchors} images, equivariance on "
        f"{len(loaders.train.sampler.indices)} training and {len(loaders.validation.sampler.indices)} test images"
    )
    started = time.perf_counter()
    networks = {"trained": case.model, "untrained": untrained_network(config, accelerator)}
    metrics, sweeps = {}, {}
    steps = len(loaders.train) + 2 * len(loaders.validation)
    for name, network in networks.items():
        reporter.advance(f"subspaces, {name}", 0, total=steps)
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
        metrics[name] = {
            **subspace_metrics(swept)[0],
            **equivariance_metrics(train, test, again, loaders.sequence.factors, loaders.num_classes),
            **spectrum_metrics(moments),
        }
        sweeps[name] = NetworkSweeps(swept, {feature: moments[feature].spectrum() for feature in moments})
    result = {**case.facts(accelerator), "anchors": config.diagnostics.anchors, **metrics}
    draw_all(sweeps, case.folder)
    result["timing"]["seconds"] = time.perf_counter() - started
    write_atomically(case.folder / "subspace.json", to_json(result, indent=1) + "\n")
    rows = [[name, *(number(metrics[network][name]) for network in networks)] for name in metrics["trained"]]
    reporter.say(table(f"subspaces, {case.checkpoint}", ["metric", *networks], rows))
    reporter.say(f"{case.folder / 'subspace.json'} and figures; {result['timing']['seconds']:.0f} s")
    return result
