"""Base class of the terms of the objective."""

from abc import ABC, abstractmethod

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..models.seq_jepa import Output
from .config import TermConfig


class Term(nn.Module, ABC):
    """A named summand of the objective.

    Attributes:
        weight: factor of the term in the sum.
        group: processes whose rows form one batch in training; None if each process has its own batch.
    """

    def __init__(self, config: TermConfig):
        super().__init__()
        self.weight = config.weight
        self.group: ProcessGroup | None = None

    @property
    def joined(self) -> ProcessGroup | None:
        """`group` in training, else None: in validation each process has the rows of all."""
        return self.group if self.training else None

    @abstractmethod
    def forward(self, output: Output, step: Tensor) -> Tensor:
        """Unweighted value (0-dim float32) for an output at a training step (int64, 0-dim)."""
