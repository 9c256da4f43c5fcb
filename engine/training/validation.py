"""Validation: all metrics of the model and of its probes on the test sequences."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast
from torch import Tensor

from ...kernels import coding_rate_stats
from ...kernels.precision import widest
from ...loaders.batch import Batch, each
from ...loaders.loader import SequenceLoader
from ...loaders.streams.config import FactorsConfig, TasksConfig
from ..analysis.accumulators import Mean, MetricBank, centred_cosine
from ..analysis.groups import GroupReadings
from ..analysis.metrics import expand
from ..analysis.spectra import Moments, spectrum_metrics
from ..config import Config
from ..evaluation.grids import FITTED, NEGATIVES, grid_scores
from ..models.seq_jepa import Output
from ..models.targets.config import EMATargetConfig
from ..models.white_box.layers import CrateLayer
from ..objectives.rate import normalized
from ..runtime.distributed import of_main, uneven_rows
from ..runtime.failures import VALIDATION, during
from .forward import StepInputs, StepOutputs
from .step import TrainingStep


class Validation(NamedTuple):
    """Results of a validation."""

    metrics: dict[str, float]
    moments: MetricBank  # of z and agg, on the CPU


@during(VALIDATION)
@torch.no_grad()
def validate(training: TrainingStep, loader: SequenceLoader, check: Callable[[], None] = lambda: None) -> Validation:
    """Measure model and probes in eval mode on test sequences; after each batch `check` may raise, which ends it."""
    training.losses.eval()
    training.share_buffers()
    device, model = training.accelerator.device, training.model
    bank = training.probes.metric_bank().to(device)
    names = [f"val_{name}" for name in ("loss", *training.objective.names)]
    names += ["pred_cosine_test", "rate_agg", "rate_fraction_agg", "rate_z", "rate_fraction_z"]
    means = MetricBank({name: Mean() for name in names}).to(device)
    moments = MetricBank({"z": Moments(model.num_features), "agg": Moments(model.token_width)}).to(device)
    size = loader.sampler.local_batch_size
    split = model.subspaces
    groups = GroupReadings(split, training.config.objective.equivariance.extent) if split is not None else None
    predictions, targets = [], []
    for number, batch in enumerate(loader.epoch(0)):
        measured, given = _measure(training, batch, size)
        check()
        if not training.accelerator.is_main_process:  # it has the rows of all processes, and counts each once
            continue
        output, features, count = measured.output, measured.features, len(given.labels)
        if count > 1:  # the last batch may be a single row, which has no variance
            for name, value in {"loss": measured.loss, **measured.terms}.items():
                means[f"val_{name}"].update(value * count, count)
        training.probes.update(bank, measured.probe_outputs, given.labels, given.moves)
        moments["z"].update(features["first"])
        moments["agg"].update(features["agg"])
        if groups is not None and output.coordinates is not None:
            groups.update(output.coordinates, given.moves)
        if number == 0:  # a rate depends on the number of rows, which is that of training here
            for feature, rows in (("agg", output.agg), ("z", output.z.transpose(0, 1))):  # z: [M, B, D]
                rate = training.config.objective.rate
                stats = coding_rate_stats(normalized(rows, rate), **rate.scaling)
                means[f"rate_{feature}"].update(stats.rate.mean(), 1)
                means[f"rate_fraction_{feature}"].update(stats.rate_fraction.mean(), 1)
        prediction, target = training.objective.prediction.comparable(output.prediction), output.target
        means["pred_cosine_test"].update(torch.cosine_similarity(prediction, target, dim=-1).sum(), count)
        predictions.append(prediction)
        targets.append(target)
    metrics = means.collect(training.accelerator).compute()
    metrics |= training.probes.values(bank.collect(training.accelerator), "test")
    empty = [torch.empty(0, model.prediction_width, device=device)]
    metrics["pred_cosine_centred_test"] = centred_cosine(
        torch.cat(predictions or empty), torch.cat(targets or empty), training.accelerator
    )
    moments = moments.collect(training.accelerator)
    metrics |= spectrum_metrics(moments) | model.aggregator.figures()
    if groups is not None:
        metrics |= {f"group_r2_{name}_test": value for name, value in groups.r2().items()}
    for name in training.config.model.crate_parts:
        steps = [layer.step_length() for layer in getattr(model, name).modules() if isinstance(layer, CrateLayer)]
        metrics[f"dictionary_step_{name}"] = torch.stack(steps).max().item()
    if training.config.sequence.views == "grids":
        alone = check if training.world is None else lambda: None  # one process must not stop alone
        metrics |= of_main(training.accelerator, lambda: _grid_scores(training, loader, alone))
    if training.world is not None:
        # all processes decide by the same numbers: eigenvalues may differ between machines
        values: Any = broadcast(torch.tensor(list(metrics.values()), dtype=widest(device), device=device))
        metrics = dict(zip(metrics, values.tolist(), strict=True))
    return Validation(metrics, moments)


def _grid_scores(training: TrainingStep, loader: SequenceLoader, check: Callable[[], None]) -> dict[str, float]:
    shuffled = training.config.ablation.shuffle_actions
    train = training.train_loader
    given = training.model, training.objective, training.losses.spans, train, loader
    return grid_scores(*given, shuffled=shuffled, progress=check)


def _measure(training: TrainingStep, batch: Batch, size: int) -> tuple[StepOutputs, StepInputs]:
    """Outputs and inputs of a batch, of the parts of all processes together.

    Each process gives its part of `size` sequences; that of the last batch may be smaller, or empty.
    """
    step, count = torch.zeros_like(training.device_step), len(batch.labels)
    (given,) = training.step_inputs(batch).split(1)  # as in a step: no two fields are the same tensor
    if training.world is None and (count == size or not training.compiled):
        return training.losses(given, step), given

    def joined(x: Tensor) -> Tensor:
        return x if training.world is None else uneven_rows(x, training.world)

    def keep(output: Output) -> Output:
        return each(output.first(count), joined)

    whole = given.padded(size if training.compiled else max(count, 1))
    if training.model.local is None:
        output, blocks = keep(training.losses(whole, step).output), None
    else:
        with training.accelerator.autocast():
            output, blocks = training.losses.by_blocks(whole, step, keep)
    given = given._replace(labels=joined(given.labels), moves=joined(given.moves))
    return training.losses.losses_of(output, given.labels, given.moves, step, blocks), given


def metric_names(config: Config, num_classes: int | None, factors: dict[str, slice]) -> set[str]:
    """Names of all metrics of a validated epoch; probes whose targets the task does not have are left out."""
    targets = [target for target, known in (("class", num_classes), ("action", factors)) if known]
    groups = config.sequence.groups if config.model.subspaces.splits else ()
    fields = {"term": config.objective.terms, "factor": factors, "group": groups, "crate": config.model.crate_parts}
    fields["task"] = list(map(str, range(1, config.stream.count + 1)))
    fields["ended"] = fields["task"][:-1]
    fields["grids"] = ["program"] if config.sequence.views == "grids" else []
    train = min(config.data.train_subset or FITTED, FITTED)
    few = {"val_nce"} if train * (config.sequence.num_observed + 1) < NEGATIVES else set()
    fields["codes"] = ["tokens"] if fields["grids"] and config.model.encoder.codes.quantises else []
    names = expand(targets, feature=("z", "agg"), **fields)
    if not isinstance(config.target, EMATargetConfig):  # no codes but the encoder's
        names = {name for name in names if not re.fullmatch("codes_.*_target", name)}
    if config.model.local.stops:  # no term sends a gradient through all of z
        names = {name for name in names if not name.startswith("z_grad_norm")}
    names -= {f"z_grad_norm_{name}" for name in set(config.objective.terms) - set(config.objective.of_features)}
    traced = isinstance(config.stream, TasksConfig) and config.stream.trace_every
    if not (traced and "prediction" in config.objective.reads):
        names -= {"stream_cosine_drop", "stream_cosine_recovery"}
    if isinstance(config.stream, FactorsConfig):  # tasks share their classes
        names = {name for name in names if "own_class" not in name}
    moving = config.stream.factors if isinstance(config.stream, FactorsConfig) else [list(factors)]
    if config.sequence.num_observed == 1 or not all(set(of_task) & set(factors) for of_task in moving):
        names = {name for name in names if not name.startswith(("task_r2", "stream_r2"))}
    figures = [f"factor_{name}" for name in config.objective.balanced]
    figures += (name for term in config.objective.terms.values() for name in term.figure_names)
    return (names - few) | {*config.model.aggregator.implementation().figure_names, *figures}
