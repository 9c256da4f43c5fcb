"""The objective: a weighted sum of named terms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..models.seq_jepa import Output
from .config import ObjectiveConfig
from .prediction import Prediction


class Objective(nn.Module):
    """The weighted sum of the terms that the config gives a weight.

    Attributes:
        names: `loss_<term>` of each term, in the order in which they are logged.
        terms: an `nn.ModuleDict` of `Term`, by name.
    """

    terms: Any

    def __init__(self, config: ObjectiveConfig):
        super().__init__()
        self.prediction: Prediction = config.prediction.build()  # also without a weight, to compare by
        self.terms = nn.ModuleDict({name: term.build() for name, term in config.terms.items()})
        self.names = tuple(f"loss_{name}" for name in self.terms)

    def comparable(self, prediction: Tensor) -> Tensor:
        """Predictions [B, E] in the form that is compared with targets, in float32."""
        return self.prediction.comparable(prediction)

    def join(self, group: ProcessGroup | None) -> None:
        """Treat the batches of these processes as one, in the terms that use statistics of a batch."""
        for term in (self.prediction, *self.terms.values()):
            term.group = group

    def forward(self, output: Output, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term without its weight as `loss_<term>`, all 0-dim float32.

        Args:
            output: output of the model.
            step: training step (int64, 0-dim, on the device), which seeds the random draws of a term.
        """
        values = {name: term(output, step) for name, term in self.terms.items()}
        total = torch.stack([self.terms[name].weight * value for name, value in values.items()]).sum()
        return total, {f"loss_{name}": value for name, value in values.items()}

    def backward(self, total: Tensor, terms: dict[str, Tensor], send: Callable[[Tensor], None]) -> None:
        """Do the backward pass, here of the sum. Override it to weight or restrict the gradients of single terms.

        Args:
            total: 0-dim, the weighted sum of the terms and the losses of the probes.
            terms: 0-dim, each without its weight, as `forward` returns them.
            send: backward pass from a 0-dim loss; it also divides by the number of micro-batches.
        """
        send(total)
