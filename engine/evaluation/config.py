"""Config of the online probes and of the frozen-probe evaluation."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.errors import InputError
from ...configs.section import Operation, Section


class ProbesConfig(Section):
    """The online probes, trained on detached features beside the model."""

    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of their Adam, which is constant."""
    hidden: int = Field(default=1024, ge=1)
    """Hidden width of the MLP heads."""
    standardize: bool = True
    """Whether each dimension of the features is standardised, by the moments of the batch in training and by running
    moments in validation. Without it, as in the reference code, probes of features that hardly vary see nothing."""


class EvalConfig(Operation):
    """Validation during training, and the frozen-probe evaluation of `seqjepa eval`."""

    fixed = frozenset({"best_metric", "best_mode"})
    of_training = True

    every: int = Field(default=1, ge=1)
    """Epochs between validations; the last epoch always has one."""
    best_metric: str = "online_linacc_test"
    """Metric whose best epoch is kept and judged by the gates."""
    best_mode: Literal["max", "min"] = "max"
    """Whether higher or lower values of eval.best_metric are better."""
    lengths: list[int] = [1, 2, 3, 4, 5, 6, 7, 8]
    """Numbers of observed views at which the aggregate is evaluated."""
    protocol: Literal["ridge", "fast", "paper", "both"] = "fast"
    """ridge: ridge regressions, in closed form; fast: logistic and ridge regressions and nearest neighbours; paper:
    heads trained with Adam on views rendered anew; both: fast and paper."""
    batch_size: int = Field(default=256, ge=2)
    """Number of sequences in a batch of the evaluation."""
    epochs: int = Field(default=300, ge=1)
    """Epochs for which classifiers and MLP heads are trained (protocol=paper)."""
    linear_epochs: int = Field(default=50, ge=1)
    """Epochs for which the linear heads of one-dimensional factors are trained (protocol=paper)."""
    lr: float = Field(default=1e-3, gt=0)
    """Learning rate of the heads' Adam (protocol=paper)."""
    hidden: int = Field(default=1024, ge=1)
    """Hidden width of the MLP heads (protocol=paper)."""
    renderings: int = Field(default=2, ge=1)
    """How often each training image is rendered (protocol=fast)."""
    neighbours: int = Field(default=20, ge=1)
    """Number of nearest neighbours that vote (protocol=fast)."""
    subspace: bool = False
    """Whether `seqjepa eval` measures subspaces and equivariance instead of running the protocol."""
    arc: str | None = None
    """Folder of ARC tasks in JSON files, by which `seqjepa eval` judges an encoder of grids instead."""
    arc_side: int = Field(default=14, ge=1, le=30)
    """Largest number of rows or columns of the grids of a task that counts, and side of the canvas."""
    out: str | None = None
    """Folder for the results; null is eval/<checkpoint>-<protocol> (or -subspace, -arc) in each run, and
    runs/comparison for comparisons."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.lengths or sorted(set(self.lengths) & set(range(1, 65))) != self.lengths:
            raise InputError("must grow within 1 to 64, such as [1, 3, 5]", "lengths")
        if self.arc is not None and self.subspace:
            raise InputError("is another evaluation than eval.subspace; only one of them is allowed", "arc")
        return self
