"""The whole config: one strict model, validated once. It does not import torch, so that `--help` is instant."""

from __future__ import annotations

from pydantic import model_validator

from ..configs.errors import InputError
from ..configs.section import Section
from ..loaders.config import ActionsConfig, DataConfig, SequenceConfig
from .analysis.config import DiagnosticsConfig
from .evaluation.config import EvalConfig, ProbesConfig
from .models.config import ModelConfig, TargetConfig
from .objectives.config import ObjectiveConfig, RateConfig, SIGRegConfig, VICRegConfig
from .reports.config import LONGEST, TrackingConfig
from .runs.config import CheckpointConfig
from .runtime.config import RunConfig
from .training.config import (
    AblationConfig,
    ControlConfig,
    EarlyStopConfig,
    GateRule,
    GatesConfig,
    OptimConfig,
)

__all__ = ["Config"]


class Config(Section):
    """Everything that defines a run."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    sequence: SequenceConfig = SequenceConfig()
    actions: ActionsConfig = ActionsConfig()
    model: ModelConfig = ModelConfig()
    target: TargetConfig = TargetConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rate: RateConfig = RateConfig()
    sigreg: SIGRegConfig = SIGRegConfig()
    vicreg: VICRegConfig = VICRegConfig()
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

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.gates.enforce and not self.active_rules:
            known = ", ".join(self.gates.rules) or "none"
            raise InputError(
                f"there are no rules for data.name = {self.data.name}; tasks with rules: {known}; "
                "false trains without gates",
                "gates.enforce",
            )
        if not self.control.enabled and any(rule.margin is not None for rule in self.active_rules):
            raise InputError("a gate asks for a margin over the control; only true is allowed", "control.enabled")
        if self.data.batch_size % self.optim.accumulate:
            raise InputError(f"does not divide data.batch_size = {self.data.batch_size}", "optim.accumulate")
        if self.data.batch_size // self.optim.accumulate < 2:
            raise InputError(
                "leaves one sequence per micro-batch, which batch norm cannot normalise", "optim.accumulate"
            )
        if self.data.train_subset is not None and self.data.batch_size > self.data.train_subset:
            raise InputError(f"is larger than data.train_subset = {self.data.train_subset}", "data.batch_size")
        if self.tracking.wandb != "disabled" and len(self.tracking.run_name or self.run.name) > LONGEST:
            ways = "set a shorter tracking.run_name, or tracking.wandb=disabled"
            raise InputError(f"is longer than the {LONGEST} characters that W&B takes; {ways}", "run.name")
        check_method(self)
        return self


def check_method(config: Config) -> None:
    """Refuse combinations of settings that cannot work.

    Raises:
        InputError: names the field, what it conflicts with, and what is allowed.
    """
    model, target, objective = config.model, config.target, config.objective
    features = 512 if model.encoder == "resnet18" else 4 * model.width
    width = features + model.action_dim * model.aggregator_action
    if width % model.num_heads:
        parts = "encoder features + model.action_dim" if model.aggregator_action else "encoder features"
        raise InputError(f"does not divide the token width {width} ({parts})", "model.num_heads")
    if model.aggregator_action and not model.predictor_action and config.sequence.num_observed == 1:
        raise InputError(
            "with one observed view no action would be used; set model.aggregator_action=false to train without "
            "actions, or sequence.num_observed to at least 2",
            "model.predictor_action",
        )
    if objective.prediction == "mse" and target.sharpening:
        raise InputError(
            "compares features, but target.sharpening=true makes the target a distribution; cosine or "
            "cross_entropy is allowed",
            "objective.prediction",
        )
    if objective.prediction == "cross_entropy" and not target.sharpening:
        raise InputError(
            "compares distributions, but target.sharpening is false; set it to true, or choose cosine or mse",
            "objective.prediction",
        )
    if objective.prediction_weight is not None and config.sigreg.weight:
        raise InputError(
            "with sigreg.weight set, the weight is 1 - sigreg.weight; only null is allowed",
            "objective.prediction_weight",
        )
    if model.projector_dim is not None:
        if target.kind == "ema":
            raise InputError(
                "an EMA teacher has no projector; set it to null, or target.kind to shared or stop_gradient",
                "model.projector_dim",
            )
        if target.batch_statistics == "own":
            raise InputError(
                "does not work with model.projector_dim, which projects the target too; only joint is allowed",
                "target.batch_statistics",
            )
    if model.projector_norm == "unit" and model.projector_dim is None:
        raise InputError("there is no projector; set it to none, or set model.projector_dim", "model.projector_norm")
    terms = {
        "sigreg.weight": config.sigreg.weight,
        "vicreg.variance": config.vicreg.variance,
        "vicreg.covariance": config.vicreg.covariance,
    }
    if model.projector_dim is not None and target.kind == "stop_gradient" and not any(terms.values()):
        raise InputError(
            f"no gradient would reach the projector; set it to null, or give {' or '.join(terms)} a weight",
            "model.projector_dim",
        )
    for field, weight in terms.items():
        if weight and model.projector_dim is None:
            raise InputError("needs projections; set model.projector_dim, as in configs/variant/sigreg.yaml", field)
        if weight and model.projector_norm == "unit":
            raise InputError(
                f"removes the scale that {field} = {weight:g} regularises; only none is allowed",
                "model.projector_norm",
            )
