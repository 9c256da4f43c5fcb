"""Config of the optimiser, and of what watches, judges and ends a training."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation, Section

__all__ = ["AblationConfig", "ControlConfig", "EarlyStopConfig", "GateRule", "GatesConfig", "OptimConfig"]


class OptimConfig(Section):
    """Optimiser and learning-rate schedule (per step)."""

    free = frozenset({"accumulate"})

    kind: Literal["adamw_ema", "adamw"] = "adamw_ema"
    """adamw_ema: AdamW and the teacher's average in one pass (seqjepa.kernels); adamw: torch's, then target.update."""
    lr: float = Field(default=4e-4, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate after the warm-up."""
    warmup_epochs: float = Field(default=0.0, ge=0, le=1e6)
    """Epochs of linear warm-up from 0."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """AdamW's, on weight matrices and kernels; never on biases, norms and the AGG token."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; null does not clip. The norm is logged either way."""
    accumulate: int = Field(default=1, ge=1)
    """Micro-batches that a step's batch is cut into."""

    @model_validator(mode="after")
    def _check(self) -> OptimConfig:
        if self.min_lr > self.lr:
            raise InputError(f"must be at most optim.lr = {self.lr:g}", "min_lr")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError("each must be in [0, 1)", "betas")
        return self


class AblationConfig(Section):
    """Controls that must fail a gate which means something."""

    shuffle_actions: bool = False
    """Whether the model sees the actions of another sequence; the probes' targets stay true."""
    freeze_encoder: bool = False
    """Whether the encoder keeps its initial weights."""


class ControlConfig(Operation):
    """The untrained control: the same probes on the frozen initial network."""

    enabled: bool = True
    """Whether it is run (once; then cached) and reported as untrained_*."""
    max_epochs: int = Field(default=5, ge=1)
    """Most epochs that its probes get; fewer if the run is shorter."""
    cache: str = "runs/.untrained"
    """Folder of the cached controls."""


class GateRule(Section):
    """One condition on a metric."""

    metric: str
    """Metric that is judged."""
    minus: str | None = None
    """Metric subtracted from it: the rule judges the gap."""
    min: float | None = None
    """Least value allowed."""
    max: float | None = None
    """Largest value allowed."""
    margin: float | None = None
    """Least excess over the untrained control."""

    @model_validator(mode="after")
    def _check(self) -> GateRule:
        if self.min is None and self.max is None and self.margin is None:
            raise InputError("needs min, max or margin", "metric")
        return self


class GatesConfig(Operation):
    """Conditions that the final and the best epoch must meet."""

    enforce: bool = False
    """Whether a failed gate makes the exit code 1."""
    rules: dict[str, list[GateRule]] = {}
    """Rules by the name of the task (data.name)."""


class EarlyStopConfig(Operation):
    """When a run that no longer improves is ended."""

    fixed = frozenset({"metric", "mode"})

    metric: str | None = None
    """Metric of the validation that must improve; null never stops early."""
    mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    patience: int = Field(default=10, ge=1)
    """Validations without improvement after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """Least change that counts as an improvement."""
