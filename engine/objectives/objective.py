"""The objective: a weighted sum of named terms."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ..models.seq_jepa import Output
from .altered import Alteration
from .balance import GradNorm
from .config import ObjectiveConfig
from .prediction import Prediction
from .term import Term


class Objective(nn.Module):
    """The weighted sum of the terms that the config gives a weight.

    Args:
        config: settings of the terms.
        width: E, of predictions.

    Attributes:
        names: `loss_<term>` of each term, in the order in which they are logged.
        prediction: the term of this name, which is there without a weight too, to compare by.
    """

    def __init__(self, config: ObjectiveConfig, width: int):
        super().__init__()
        self.prediction: Prediction = config.prediction.build(width)
        self.others = nn.ModuleDict({name: t.build() for name, t in config.terms.items() if name != "prediction"})
        self.names = tuple(f"loss_{name}" for name in config.terms)
        self.balanced = tuple(config.balanced)
        self.balance: GradNorm | None = config.balance.build(len(self.balanced))

    @property
    def terms(self) -> dict[str, Term]:
        """The terms by name."""
        found: dict[str, Any] = {"prediction": self.prediction, **dict(self.others.items())}
        return {name: found[name] for name in (name.removeprefix("loss_") for name in self.names)}

    @property
    def alterations(self) -> list[Alteration]:
        """The terms for which views are encoded once more."""
        return [term for term in self.others.values() if isinstance(term, Alteration)]

    def weights(self) -> dict[str, Tensor | float]:
        """The present weight of each term, by name; those of balanced terms are 0-dim tensors."""
        found: dict[str, Tensor | float] = {name: term.weight for name, term in self.terms.items()}
        if self.balance is not None:
            for name, factor in zip(self.balanced, self.balance.factors, strict=True):
                found[name] = found[name] * factor
        return found

    def join(self, group: ProcessGroup | None, world: ProcessGroup | None) -> None:
        """Treat the batches of `group` as one, in terms that use statistics of a batch; `world` are all processes."""
        for term in (self.prediction, *self.terms.values()):
            term.group, term.world = group, world

    def forward(self, output: Output, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term without its weight as `loss_<term>`, all 0-dim float32.

        Args:
            output: output of the model.
            step: training step (int64, 0-dim, on the device), which seeds the random draws of a term.
        """
        values, weights = {name: term(output, step) for name, term in self.terms.items()}, self.weights()
        total = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        return total, {f"loss_{name}": value for name, value in values.items()}

    def backward(self, total: Tensor, terms: dict[str, Tensor], send: Callable[[Tensor], None]) -> None:
        """Do the backward pass, here of the sum. Override it to weight or restrict the gradients of single terms.

        Args:
            total: 0-dim, the weighted sum of the terms and the losses of the probes.
            terms: 0-dim, each without its weight, as `forward` returns them.
            send: backward pass from a 0-dim loss; it also divides by the number of micro-batches.
        """
        send(total)

    def after_step(self, outputs: list[Output]) -> None:
        """Let the terms change their own tensors after an optimiser step, as `Term.after_step` says."""
        for term in self.terms.values():
            term.after_step(outputs)

    def figures(self) -> dict[str, Tensor]:
        """What the terms tell of themselves beside their values, 0-dim, by the name of the metric."""
        found = {name: value for term in self.terms.values() for name, value in term.figures().items()}
        factors = () if self.balance is None else self.balance.factors
        return found | {f"factor_{name}": factor for name, factor in zip(self.balanced, factors, strict=True)}
