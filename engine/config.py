"""The whole config: one strict model, validated once. It does not import torch, so that `--help` is instant."""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any, Self

from pydantic import model_validator

from ..configs.compose import Composed
from ..configs.compose import compose as compose_as
from ..configs.errors import InputError
from ..configs.section import Schema, Section, leaves
from ..loaders.config import ActionsConfig, AffineConfig, AnySequence, DataConfig
from ..loaders.streams.config import AnyStream, NoStreamConfig
from .analysis.config import DiagnosticsConfig
from .evaluation.config import EvalConfig, ProbesConfig
from .models.config import ModelConfig
from .models.targets.config import AnyTarget, EMATargetConfig
from .objectives.config import NearestScopeConfig, ObjectiveConfig
from .reports.config import LONGEST, TrackingConfig
from .runtime.config import CheckpointConfig, RunConfig
from .training.config import AblationConfig, ControlConfig, EarlyStopConfig, GateRule, GatesConfig, OptimConfig

# a resumed run may change these fields, but runs that differ in them are not seeds of one experiment
ALSO_COMPARED = ("run.epochs", "run.precision", "optim.accumulate", "early_stop.")


class Config(Schema):
    """Everything that defines a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    sequence: AnySequence = AffineConfig()
    actions: ActionsConfig = ActionsConfig()
    stream: AnyStream = NoStreamConfig()
    model: ModelConfig = ModelConfig()
    target: AnyTarget = EMATargetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optim: OptimConfig = OptimConfig()
    probes: ProbesConfig = ProbesConfig()
    ablation: AblationConfig = AblationConfig()
    eval: EvalConfig = EvalConfig()
    control: ControlConfig = ControlConfig()
    gates: GatesConfig = GatesConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    diagnostics: DiagnosticsConfig = DiagnosticsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def active_rules(self) -> list[GateRule]:
        """Gate rules of this task."""
        return self.gates.rules.get(self.data.name, [])

    def named(self) -> Self:
        """This config, with a name for its run if that is to be found: the same one for the same experiment."""
        if self.run.name != "auto":
            return self
        fields = leaves(self.model_dump(mode="json"))
        deciding = {
            name: value
            for name, value in fields.items()
            if not self.is_free(name) or name.startswith((*ALSO_COMPARED, "data.root"))
        }
        checksum = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()
        run = self.run.model_copy(update={"name": f"{self.data.name}-{checksum[:10]}"})
        return self.model_copy(update={"run": run})

    @property
    def method_numbers(self) -> dict[str, float]:
        """The numbers that a user of the method has to choose, by their dotted names.

        They are those of the terms that have a weight, of the reading, the target, the codes and early stopping, but
        not of the network or of the optimiser, which any method has.
        """
        parts: dict[str, Section] = {f"objective.{name}": term for name, term in self.objective.terms.items()}
        parts |= {"objective.reading": self.objective.reading, "target": self.target}
        parts |= {"model.encoder.quantiser": self.model.encoder.codes, "data.curriculum": self.data.curriculum}
        if self.early_stop.metric is not None:
            parts["early_stop"] = self.early_stop
        return {name: value for place, part in parts.items() for name, value in _numbers(part.model_dump(), place)}

    @property
    def beside_lejepa(self) -> list[tuple[str, str, bool]]:
        """What LeJEPA (arXiv 2511.08544) insists on or does without: a name, what is here, and whether it is alike."""
        terms, queue = self.objective.terms, getattr(self.objective.prediction, "queue", 0)
        codes = self.model.encoder.codes
        helps = {
            "no gradient through the target": self.target.detached,
            "sharpened targets": self.target.sharpening.kind != "none",
            "a queue": queue > 0,
            "a learnt scale": bool(getattr(self.objective.prediction, "scale_limits", None)),
            "codes in the path": getattr(codes, "place", "side") == "path",
            "weights that are set by gradients": self.objective.balance.kind != "none",
            "clipped gradients": self.optim.clip_norm is not None,
            "early stopping": self.early_stop.metric is not None,
            "a curriculum": self.data.curriculum.kind != "none",
        }
        used = [name for name, there in helps.items() if there]
        two = set(terms) == {"prediction", "sigreg"}
        one = two and math.isclose(sum(term.weight for term in terms.values()), 1)
        precision = self.run.precision
        mse, teacher = self.objective.prediction.kind == "mse", isinstance(self.target, EMATargetConfig)
        return [
            ("terms", ", ".join(terms), two),
            ("weights", f"λ = {self.objective.sigreg.weight:g}" if one else f"one for each of {len(terms)} terms", one),
            ("prediction", self.objective.prediction.kind, mse),
            ("teacher", "EMA" if teacher else "none", not teacher),
            ("heuristics", ", ".join(used) or "none", not used),
            ("precision", {"auto": "bf16 where the device has it"}.get(precision, precision), precision != "fp32"),
        ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gates.enforce and not self.active_rules:
            known = ", ".join(self.gates.rules) or "none"
            raise InputError(
                f"there are no rules for data.name = {self.data.name}; tasks with rules: {known}; "
                "false trains without gates",
                "gates.enforce",
            )
        if not self.control.enabled and any(rule.margin is not None for rule in self.active_rules):
            raise InputError("a gate requires a margin over the control; only true is allowed", "control.enabled")
        if self.data.batch_size % self.optim.accumulate:
            raise InputError(f"does not divide data.batch_size = {self.data.batch_size}", "optim.accumulate")
        if self.data.batch_size // self.optim.accumulate < 2:
            raise InputError("leaves one sequence per micro-batch; batch norm needs at least two", "optim.accumulate")
        if self.data.train_subset is not None and self.data.batch_size > self.data.train_subset:
            raise InputError(f"is larger than data.train_subset = {self.data.train_subset}", "data.batch_size")
        if self.data.curriculum.kind != "none" and not self.sequence.graded:
            problem = f"sequence.kind={self.sequence.kind} does not tell hard views from easy ones"
            raise InputError(f"{problem}; only none is allowed", "data.curriculum.kind")
        if self.stream.has_tasks:
            self._check_stream()
        if self.tracking.wandb != "disabled" and len(self.tracking.run_name or self.run.name) > LONGEST:
            ways = "set a shorter tracking.run_name, or tracking.wandb=disabled"
            raise InputError(f"is longer than the {LONGEST} characters that W&B takes; {ways}", "run.name")
        check_method(self)
        return self

    def _check_stream(self) -> None:
        """Refuse what makes no sense where images arrive task by task."""
        if self.optim.schedule != "constant":
            raise InputError("would leave the last tasks no learning rate; only constant is allowed", "optim.schedule")
        if self.data.fixed_views:
            raise InputError(
                "images of a stream have new views at each visit; only false is allowed", "data.fixed_views"
            )
        if self.early_stop.metric is not None:
            raise InputError("would leave out the last tasks; only null is allowed", "early_stop.metric")
        if self.eval.every != 1:
            raise InputError("every task is followed by a measurement of all tasks; only 1 is allowed", "eval.every")


def _numbers(value: Any, place: str) -> Iterator[tuple[str, float]]:
    """Numbers in a value, and in what it holds, by dotted names below `place`."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _numbers(inner, f"{place}.{name}")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield place, value


def compose(words: list[str], base: tuple[str, dict[str, Any]] | None = None) -> Composed[Config]:
    """`seqjepa.configs.compose.compose` for this config."""
    return compose_as(words, Config, base)


def check_method(config: Config) -> None:
    """Refuse combinations of settings that cannot work.

    Raises:
        InputError: names the field, what it conflicts with, and what is allowed.
    """
    model, target, sequence = config.model, config.target, config.sequence
    terms, every_term = config.objective.terms, config.objective.every_term
    if model.encoder.sees != sequence.views:
        raise InputError(
            f"{model.encoder.kind} sees {model.encoder.sees}, but sequence.kind={sequence.kind} makes {sequence.views}",
            "model.encoder.kind",
        )
    spans = config.objective.reading.spans(sequence.num_observed)
    if not sequence.reversible and any(span.backwards for span in spans):
        raise InputError(
            f"reads backwards, but the moves of sequence.kind={sequence.kind} cannot be taken back",
            "objective.reading.kind",
        )
    try:
        model.aggregator.check_width(model.token_width)
    except InputError as error:
        parts = "encoder features + model.action_dim" if model.aggregator_action else "encoder features"
        raise InputError(f"{error} ({parts})", f"model.aggregator.{error.field}") from None
    if model.aggregator_action and not model.predictor_action and config.sequence.num_observed == 1:
        raise InputError(
            "with one observed view no action would be used; set model.aggregator_action=false to train without "
            "actions, or sequence.num_observed to at least 2",
            "model.predictor_action",
        )
    prediction, sharpened = config.objective.prediction, target.sharpening.makes_distributions
    if sharpened and prediction.of_distributions is False:
        raise InputError(
            f"compares features, but target.sharpening.kind={target.sharpening.kind} makes the target a distribution; "
            "cosine or cross_entropy is allowed",
            "objective.prediction.kind",
        )
    if not sharpened and prediction.of_distributions:
        raise InputError(
            "compares distributions, but target.sharpening.kind is none; set it to softmax, or choose cosine or mse",
            "objective.prediction.kind",
        )
    reads = config.objective.reads
    if not reads:
        raise InputError("every term has weight 0; give one a weight", "objective.prediction.weight")
    if "inferred_actions" in reads and not model.inverse.infers:
        raise InputError("needs a network that infers actions; set model.inverse.kind=mlp", "objective.inverse.weight")
    if model.inverse.infers and "inferred_actions" not in reads:
        raise InputError(
            "nothing would train it; set it to none, or set objective.inverse.weight", "model.inverse.kind"
        )
    if "recalled" in reads and not model.memory.remembers:
        raise InputError("needs a memory; set model.memory.kind=encoder", "objective.distillation.weight")
    if model.memory.remembers and "recalled" not in reads:
        raise InputError(
            "nothing would read it; set it to none, or set objective.distillation.weight", "model.memory.kind"
        )
    if model.memory.remembers and not config.stream.has_tasks:
        raise InputError("remembers the end of a task, and there are none; set stream.kind", "model.memory.kind")
    if config.objective.balance.kind != "none":
        if "rate" in terms:
            raise InputError("is negative, which has no share that is left; only 0 is allowed", "objective.rate.weight")
        if len(config.objective.balanced) < 2:
            raise InputError("needs two terms of features that have a weight", "objective.balance.kind")
    if "altered" in reads and sequence.views != "grids":
        name = next(name for name, term in terms.items() if "altered" in term.reads)
        raise InputError("only grids are altered; set sequence.kind=program", f"objective.{name}.weight")
    if "coordinates" in reads:
        _check_groups(config)
    _check_tokens(config)
    if model.subspaces.splits and "equivariance" not in terms:
        raise InputError(
            "nothing would say where they lie; set it to none, or set objective.equivariance.weight",
            "model.subspaces.kind",
        )
    compares = bool({"coordinates", "inferred_actions"} & reads) or "invariance" in terms
    if compares and not target.joint and config.sequence.num_observed == 1:
        raise InputError(
            "leaves one view for the terms that compare views; set it to at least 2",
            "sequence.num_observed",
        )
    if not spans:
        raise InputError(
            f"is longer than the {config.sequence.num_observed} observed views (sequence.num_observed)",
            "objective.reading.length",
        )
    most = model.aggregator.most_views
    if most is not None and config.sequence.num_observed > most:
        raise InputError(
            f"is less than the {config.sequence.num_observed} observed views (sequence.num_observed)",
            f"model.aggregator.{model.aggregator.limited_by}",
        )
    rate = config.objective.rate
    rows = config.data.batch_size // config.optim.accumulate
    if rate.weight and isinstance(rate.scope, NearestScopeConfig) and rate.scope.count > rows:
        raise InputError(f"is more than the {rows} sequences of a batch", "objective.rate.scope.count")
    if rate.weight and rate.scope.kind == "images":
        if rate.features in ("agg", "both"):
            raise InputError(
                "an image has one aggregate; set objective.rate.features to z or projections",
                "objective.rate.scope.kind",
            )
        if rate.features == "z" and config.sequence.num_observed == 1:
            raise InputError("needs two observed views; one has no rate", "objective.rate.scope.kind")
    projector = model.projector
    if model.local.stops:
        _check_blocks(config)
        return
    if not projector.projects:
        if name := next((name for name, term in terms.items() if "projections" in term.reads), None):
            raise InputError(
                "needs projections; set model.projector.kind=mlp, as in configs/variant/sigreg.yaml",
                f"objective.{name}.weight",
            )
        return
    if "projections" not in reads and (target.detached or "prediction" not in reads):
        needed = [f"objective.{name}.weight" for name, term in every_term.items() if "projections" in term.reads]
        raise InputError(
            f"no gradient would reach the projector; set it to none, or set {' or '.join(needed)}",
            "model.projector.kind",
        )
    of_scale = (name for name, term in terms.items() if term.of_scale and "projections" in term.reads)
    if projector.fixes_scale and (name := next(of_scale, None)):
        raise InputError(
            f"removes the scale that objective.{name} regularises; only false is allowed", "model.projector.unit"
        )


def _check_tokens(config: Config) -> None:
    """Refuse terms of tokens and of codes where there are none, and codes that nothing would train.

    Raises:
        InputError: names the field, and what is allowed.
    """
    terms, codes, encoder = config.objective.terms, config.model.encoder.codes, config.model.encoder
    name = next((name for name, term in terms.items() if "tokens" in term.reads), None)
    if name and not encoder.has_tokens:
        raise InputError(
            f"needs tokens; model.encoder.kind={encoder.kind} has none, grid_objects has", f"objective.{name}.weight"
        )
    if terms and not config.objective.of_features:
        raise InputError(
            "leaves terms of tokens alone, and z untrained; give it a weight", "objective.prediction.weight"
        )
    if "commitment" in terms and not codes.quantises:
        raise InputError("needs codes; set model.encoder.quantiser.kind", "objective.commitment.weight")
    if "usage" in terms and not codes.draws:
        raise InputError(
            "needs codes that are drawn; set model.encoder.quantiser.kind=gumbel", "objective.usage.weight"
        )
    if "commitment" in terms and codes.follows and codes.beside:
        raise InputError(
            "codes beside the path follow the tokens without a loss; only 0 is allowed, or "
            "model.encoder.quantiser.place=path",
            "objective.commitment.weight",
        )
    if "commitment" not in terms and codes.quantises and codes.beside and not codes.follows:
        raise InputError(
            "nothing would train codes beside the path; set objective.commitment.weight, or choose ema",
            "model.encoder.quantiser.kind",
        )
    if "relational" in terms and not config.target.joint and config.sequence.num_observed == 1:
        raise InputError("leaves one view for objective.relational; set it to at least 2", "sequence.num_observed")


def _check_blocks(config: Config) -> None:
    """Refuse what an encoder cannot have whose blocks learn by heads of their own.

    Raises:
        InputError: names the field, and what is allowed.
    """
    model, target = config.model, config.target
    if not model.encoder.block_widths:
        raise InputError(
            f"model.encoder.kind={model.encoder.kind} names no blocks; convnet and resnet18 do", "model.local.kind"
        )
    parts = ("neck", "projector", "inverse", "subspaces", "memory")
    if name := next((name for name in parts if getattr(model, name).kind != "none"), None):
        raise InputError("a block learns by its head alone; only none is allowed", f"model.{name}.kind")
    if target.detached or not target.joint:
        raise InputError(
            "a head's targets are views of the same batch, with a gradient; only shared is allowed", "target.kind"
        )
    if not model.predictor_action:
        raise InputError("heads predict with the action; only true is allowed", "model.predictor_action")
    if "agg" in config.objective.reads:
        raise InputError("a block has no aggregate; z or projections is allowed", "objective.rate.features")
    if target.sharpening.makes_distributions:
        raise InputError("heads compare projections; only none is allowed", "target.sharpening.kind")
    if config.objective.balance.kind != "none":
        raise InputError("no gradient passes through all of z; only none is allowed", "objective.balance.kind")
    if getattr(config.objective.prediction, "queue", 0):
        raise InputError("blocks have predictions of their own widths; only 0 is allowed", "objective.prediction.queue")
    if "prediction" not in config.objective.reads:
        raise InputError("is what the aggregator learns by; give it a weight", "objective.prediction.weight")


def _check_groups(config: Config) -> None:
    """Refuse terms of the factors' subspaces where there are none.

    Raises:
        InputError: names the field, and what is allowed.
    """
    name = next(name for name, term in config.objective.terms.items() if "coordinates" in term.reads)
    if not config.model.subspaces.splits:
        raise InputError("needs subspaces; set model.subspaces.kind=group", f"objective.{name}.weight")
    groups = config.sequence.groups
    if not groups:
        raise InputError(
            f"needs a factor in which a group acts; sequence.kind={config.sequence.kind} has none here, affine and "
            "rotation have some, if their ranges are not single values",
            "model.subspaces.kind",
        )
    if config.actions.normalization == "view_l2":
        raise InputError(
            "moves cannot be read from such actions, as model.subspaces.kind=group does; standard or none is allowed",
            "actions.normalization",
        )
    taken, neck = sum(2 if group == "circle" else 1 for group in groups.values()), config.model.neck
    if taken >= config.model.num_features:
        raise InputError(
            f"leaves z no room: it has {config.model.num_features} numbers, and the factors take {taken}; "
            f"model.neck.kind=linear with model.neck.dim of at least {taken + 1} is allowed",
            "model.neck.kind" if neck.kind == "none" else "model.neck.dim",
        )
