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
        world: all processes; None if there is one.
    """

    def __init__(self, config: TermConfig):
        super().__init__()
        self.weight = config.weight
        self.group: ProcessGroup | None = None
        self.world: ProcessGroup | None = None

    @property
    def joined(self) -> ProcessGroup | None:
        """`group` in training, else None: in validation each process has the rows of all."""
        return self.group if self.training else None

    @abstractmethod
    def forward(self, output: Output, step: Tensor) -> Tensor:
        """Unweighted value (0-dim float32) for an output at a training step (int64, 0-dim).

        It leaves the term's own tensors as they are: a step may evaluate it several times.
        """

    def after_step(self, outputs: list[Output]) -> None:
        """Change the term's own tensors after an optimiser step, given the outputs of its micro-batches in order.

        Nothing waits for the device. With several processes it leaves the same tensors on each.
        """

    def figures(self) -> dict[str, Tensor]:
        """What the term tells of itself beside its value, 0-dim, by the name of the metric."""
        return {}
