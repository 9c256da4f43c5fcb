"""Config of the optimiser, the ablations, the untrained control, the gates and early stopping."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation, Section


class OptimConfig(Section):
    """Optimiser and learning-rate schedule (per step)."""

    free = frozenset({"accumulate"})

    kind: Literal["adamw_ema", "adamw"] = "adamw_ema"
    """adamw_ema: AdamW and the teacher's EMA in one pass (seqjepa.kernels); adamw: torch's AdamW, and then the EMA."""
    lr: float = Field(default=4e-4, ge=0)
    """Peak learning rate."""
    min_lr: float = Field(default=0.0, ge=0)
    """Learning rate at the end of the cosine."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_epochs: float = Field(default=0.0, ge=0, le=1e6)
    """Epochs of linear warm-up from 0."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Optimiser steps of the warm-up, in the place of warmup_epochs; null counts it in epochs."""
    weight_decay: float = Field(default=1e-3, ge=0)
    """AdamW's weight decay of weight matrices and kernels; biases, norms and the AGG token have none."""
    betas: list[float] = Field(default=[0.9, 0.999], min_length=2, max_length=2)
    """AdamW's decay rates of the first and second moment."""
    clip_norm: float | None = Field(default=None, gt=0)
    """Gradient norm above which gradients are clipped; null does not clip. The norm is logged either way."""
    accumulate: int = Field(default=1, ge=1)
    """Number of micro-batches into which the batch of a step is split."""

    def untrained(self) -> Self:
        """Batch norm sees micro-batches, also in a network that is not trained."""
        return type(self)(accumulate=self.accumulate)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise InputError(f"must be at most optim.lr = {self.lr:g}", "min_lr")
        if self.warmup_steps is not None and self.warmup_epochs:
            raise InputError(f"the warm-up lasts optim.warmup_epochs = {self.warmup_epochs:g} already", "warmup_steps")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError("each must be in [0, 1)", "betas")
        return self


class AblationConfig(Section):
    """Negative controls, which a meaningful gate must fail."""

    shuffle_actions: bool = False
    """Whether the model receives the actions of another sequence; the probes' targets stay correct."""
    freeze_encoder: bool = False
    """Whether the encoder keeps its initial weights."""

    def untrained(self) -> Self:
        return type(self)(shuffle_actions=self.shuffle_actions)


class ControlConfig(Operation):
    """The untrained control: the same probes on the frozen initial network."""

    enabled: bool = True
    """Whether the control is run (once, then cached) and reported as untrained_*."""
    max_epochs: int = Field(default=5, ge=1)
    """Largest number of epochs for which its probes are trained; a shorter run trains them as long as it lasts."""
    cache: str = "runs/.untrained"
    """Folder of the cached controls."""


class GateRule(Section):
    """One condition on a metric."""

    metric: str
    """Metric that is judged."""
    minus: str | None = None
    """Metric that is subtracted from it, so that the rule judges the gap."""
    min: float | None = None
    """Smallest value allowed."""
    max: float | None = None
    """Largest value allowed."""
    margin: float | None = None
    """Smallest excess over the untrained control that is allowed."""
    over: Literal["epoch", "least", "most", "range", "rise", "epochs"] = "epoch"
    """What is judged: the metric of an epoch (the final and the best one), or of all epochs its least or most value,
    their difference (range), the largest ratio of a value to the least before it (rise), or how many there were."""
    last: float = Field(default=1.0, gt=0, le=1)
    """Share of the epochs that count, the last ones, where all epochs are judged."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min is None and self.max is None and self.margin is None:
            raise InputError("needs min, max or margin", "metric")
        if self.over != "epoch" and (self.margin is not None or self.minus is not None):
            raise InputError("is judged by min and max alone, without minus", "over")
        return self


class GatesConfig(Operation):
    """Conditions that the final and the best epoch must meet."""

    enforce: bool = False
    """Whether a failed gate makes the exit code 1."""
    rules: dict[str, list[GateRule]] = {}
    """Rules by the name of the task (data.name)."""


class EarlyStopConfig(Operation):
    """When to end a run that no longer improves."""

    fixed = frozenset({"metric", "mode"})
    of_training = True

    metric: str | None = None
    """Validation metric that must improve; null never stops early."""
    mode: Literal["max", "min"] = "max"
    """Whether a higher or a lower value of it is better."""
    patience: int = Field(default=10, ge=1)
    """Validations without improvement after which the run ends."""
    min_delta: float = Field(default=0.0, ge=0)
    """Smallest change that counts as an improvement."""
