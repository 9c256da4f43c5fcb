"""The config: one strict model, validated once. Imports no torch: `--help` must be instant."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from seqjepa.engine.config_method import (
    AblationConfig,
    ModelConfig,
    ObjectiveConfig,
    RateConfig,
    SIGRegConfig,
    TargetConfig,
    VICRegConfig,
    check_method,
)
from seqjepa.loaders import InputError
from seqjepa.loaders.config import ActionsConfig, DataConfig, Operation, Section, SequenceConfig

__all__ = ["Config"]

LONGEST = 128  # name, project, entity or group that W&B takes, in characters


class RunConfig(Operation):
    """Where the run lives, how long it lasts, and on what it runs."""

    fixed = frozenset({"seed", "batch_statistics"})

    name: str = "run"
    """Name of the run."""
    dir: str | None = None
    """Folder of the run; null is runs/<name>."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training images."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """Seed of the weights, of every draw and of the order."""
    resume: str = "none"
    """none, auto (the newest checkpoint in the run's folder, if any), or the path of a checkpoint or a run."""
    overwrite: bool = False
    """Whether a run that stands in the folder is replaced; otherwise it is resumed or refused."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; auto takes CUDA where it is there."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast; auto is bf16 on GPUs that have it and on CPUs whose oneDNN does, else fp32."""
    compile: Literal["auto", "none", "default", "max-autotune", "graph"] = "auto"
    """torch.compile of the losses and the views; graph also captures the whole step as a CUDA graph. auto is default on
    GPUs and none elsewhere."""
    compile_cache: str = "runs/.compiled"
    """Folder of compiled programs, kept between runs; the environment's TORCHINDUCTOR_CACHE_DIR comes first."""
    deterministic: bool = False
    """Bit-for-bit repeatable: deterministic algorithms, compile off."""
    threads: Literal["auto"] | int = "auto"
    """CPU threads of a process; auto is the cores over the local processes."""
    batch_statistics: Literal["global", "process"] = "global"
    """With several processes: batch norm, rate, SIGReg, variance, covariance and the center of the whole batch, as one
    process has them, or of each process's part, which talks less and makes results depend on their number."""
    log_every: int = Field(default=50, ge=1)
    """Steps between looks at the device (loss on the console and in the tracker, divergence)."""

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if isinstance(self.threads, int) and not 1 <= self.threads <= 1024:
            raise InputError("must be auto or 1 to 1024", "threads")
        if self.deterministic and self.compile not in ("auto", "none"):
            raise InputError("deterministic=true turns compile off; none or auto is allowed", "compile")
        return self


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


class ProbesConfig(Section):
    """The online probes, trained on detached features beside the model."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of their one Adam; constant."""
    hidden: int = Field(default=1024, ge=1)
    """Hidden width of the MLP heads."""


class EvalConfig(Operation):
    """Validation during training, and the frozen-probe evaluation of engine/evaluate.py."""

    fixed = frozenset({"best_metric", "best_mode"})

    every: int = Field(default=1, ge=1)
    """Epochs between validations; the last epoch always has one."""
    best_metric: str = "online_linacc_test"
    """Metric whose best epoch is kept and judged."""
    best_mode: Literal["max", "min"] = "max"
    """Whether more or less of it is better."""
    lengths: list[int] = [1, 2, 3, 4, 5, 6, 7, 8]
    """Numbers of observed views that the aggregate is evaluated at."""
    protocol: Literal["fast", "paper", "both"] = "fast"
    """paper: heads trained by Adam on views rendered afresh; fast: closed form and nearest neighbours; or both."""
    batch_size: int = Field(default=256, ge=2)
    """Sequences in a batch of the evaluation."""
    epochs: int = Field(default=300, ge=1)
    """Epochs of the classifiers and of the MLP heads (protocol=paper)."""
    linear_epochs: int = Field(default=50, ge=1)
    """Epochs of the linear heads, those of factors of one dimension (protocol=paper)."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of their Adam (protocol=paper)."""
    hidden: int = Field(default=1024, ge=1)
    """Hidden width of the MLP heads (protocol=paper)."""
    renderings: int = Field(default=2, ge=1)
    """How often each training image is rendered (protocol=fast)."""
    neighbours: int = Field(default=20, ge=1)
    """Nearest neighbours that vote (protocol=fast)."""
    subspace: bool = False
    """Whether engine/evaluate.py asks for subspaces, equivariance and their figures instead of the protocol."""
    out: str | None = None
    """Folder of the results; null is eval/<checkpoint>-<protocol> in each run, and runs/comparison for several."""

    @model_validator(mode="after")
    def _check(self) -> EvalConfig:
        if not self.lengths or sorted(set(self.lengths) & set(range(1, 17))) != self.lengths:
            raise InputError("must grow within 1 to 16, such as [1, 3, 5]", "lengths")
        return self


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


class DiagnosticsConfig(Operation):
    """Collapse warnings at each validation; factor sweeps, subspaces and their figures now and then."""

    every: int = Field(default=100, ge=0)
    """Epochs between sweeps, where there is a validation; the last epoch always has one; 0 makes none."""
    anchors: int = Field(default=32, ge=8, le=1024)
    """Test images that are swept."""
    min_rank: float = Field(default=1.5, ge=1)
    """Effective rank (participation ratio of the spectrum) of z or agg below which a collapse is told of."""
    max_cosine: float = Field(default=0.99, gt=0, le=1)
    """Mean cosine between the features of two images above which a collapse is told of."""


class CheckpointConfig(Operation):
    """What is saved, and how much of it is kept."""

    every: int = Field(default=1, ge=1)
    """Epochs between checkpoints; the last, the best and an interrupted one are always saved."""
    keep: int = Field(default=2, ge=1)
    """Newest checkpoints kept, besides the best."""


class TrackingConfig(Operation):
    """Trackers, through Accelerate; metrics.jsonl is always written. Of what is not set, W&B's environment (WANDB_MODE,
    WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP, WANDB_NAME, WANDB_INIT_TIMEOUT) comes before the defaults."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    """Mode of Weights & Biases."""
    tensorboard: bool = False
    """Whether TensorBoard files are written too."""
    project: str = "seqjepa"
    """W&B project."""
    entity: str | None = None
    """W&B entity."""
    group: str | None = None
    """W&B group."""
    run_name: str | None = None
    """Name of the run in W&B; null is run.name."""
    init_timeout: float = Field(default=20.0, gt=0)
    """Seconds that W&B has to answer before the run goes on offline."""

    @model_validator(mode="after")
    def _check(self) -> TrackingConfig:
        # offline W&B takes what its server refuses when the run is uploaded
        for field, forbidden in {"project": "/\\#?%:", "entity": "/\\#?%: ", "group": "", "run_name": ""}.items():
            value = getattr(self, field)
            if value is None or (
                1 <= len(value) <= LONGEST and value.isprintable() and not set(value) & set(forbidden)
            ):
                continue
            without = f", none of them one of {' '.join(forbidden.strip())}" if forbidden else ""
            without += " or a space" if " " in forbidden else ""
            raise InputError(f"must be one line of 1 to {LONGEST} characters{without}", field)
        return self


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
                f"there are no rules for data.name = {self.data.name}; tasks with rules: {known}",
                "gates.enforce",
            )
        if not self.control.enabled and any(rule.margin is not None for rule in self.active_rules):
            raise InputError("a gate asks for a margin over the control; true is allowed", "control.enabled")
        if self.data.batch_size % self.optim.accumulate:
            raise InputError(f"does not divide data.batch_size = {self.data.batch_size}", "optim.accumulate")
        if self.data.batch_size // self.optim.accumulate < 2:
            raise InputError("leaves one sequence, which batch norm cannot normalise", "optim.accumulate")
        if self.data.train_subset is not None and self.data.batch_size > self.data.train_subset:
            raise InputError(f"is larger than data.train_subset = {self.data.train_subset}", "data.batch_size")
        if self.tracking.wandb != "disabled" and len(self.tracking.run_name or self.run.name) > LONGEST:
            ways = "tracking.run_name names the run there, tracking.wandb=disabled does without"
            raise InputError(f"is longer than the {LONGEST} characters that W&B takes; {ways}", "run.name")
        check_method(self)
        return self
