"""The loss: a weighted sum of named terms. A new term is one class and one line in `TERMS`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ...kernels import coding_rate, sigreg
from ..models.seq_jepa import Output
from ..runtime.distributed import joined_rows
from .config import ObjectiveConfig, RateConfig, SIGRegConfig, VICRegConfig

__all__ = ["TERMS", "Described", "Objective", "Term", "cosine_distance", "cross_entropy", "normalized"]

VARIANCE_EPS = 1e-4  # VICReg's


class Described(Protocol):
    """What an objective is built from: the config of a run, or any object with these sections."""

    @property
    def objective(self) -> ObjectiveConfig: ...

    @property
    def rate(self) -> RateConfig: ...

    @property
    def sigreg(self) -> SIGRegConfig: ...

    @property
    def vicreg(self) -> VICRegConfig: ...


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over the batch, for [B, E] each (the loss of seq-JEPA).

    Features after a ReLU are non-negative, so a constant that points at their mean scores low as well: a small
    value is no evidence against collapse.
    """
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


def cross_entropy(prediction: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of - Σ target log softmax(prediction / temperature), for [B, E] each (DINO's loss).

    Its lower bound is the entropy of the target, which is not constant: the term may fall because targets sharpen.
    """
    return -(target.float() * (prediction.float() / temperature).log_softmax(-1)).sum(-1).mean()


class Term(nn.Module, ABC):
    """A named summand of the objective.

    Attributes:
        weight: factor of the term in the sum; a term of weight 0 is left out.
        group: processes whose rows form one batch in training; None if each process has its own batch.
    """

    def __init__(self, weight: float):
        super().__init__()
        self.weight = weight
        self.group: ProcessGroup | None = None

    @property
    def joined(self) -> ProcessGroup | None:
        """`group` in training, else None: in validation each process has the rows of all."""
        return self.group if self.training else None

    @abstractmethod
    def forward(self, output: Output, step: Tensor) -> Tensor:
        """Unweighted value (0-dim float32) for an output at a training step (int64, 0-dim)."""


class Prediction(Term):
    """Distance between prediction and target, averaged over both readings if there are two."""

    def __init__(self, config: Described):
        weight = config.objective.prediction_weight
        super().__init__(1 - config.sigreg.weight if weight is None else weight)
        self.kind, self.temperature = config.objective.prediction, config.objective.temperature

    def forward(self, output: Output, step: Tensor) -> Tensor:
        return torch.stack([self._distance(r.prediction, r.target) for r in output.readings]).mean()

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        if self.kind == "cosine":
            return cosine_distance(prediction, target)
        if self.kind == "mse":
            return F.mse_loss(prediction.float(), target.float())
        return cross_entropy(prediction, target, self.temperature)


class Rate(Term):
    """Negative coding rate of the aggregate, of z (mean over the observed views), or of both (MCR², equation 6)."""

    def __init__(self, config: Described):
        super().__init__(config.rate.weight)
        self.config = config.rate

    def forward(self, output: Output, step: Tensor) -> Tensor:
        rates = []
        if self.config.target in ("agg", "both"):
            rates.append(torch.stack([self._rate(reading.agg) for reading in output.readings]).mean())
        if self.config.target in ("z", "both"):
            rates.append(self._rate(output.z.transpose(0, 1)).mean())  # [M, B, D]
        return -torch.stack(rates).sum()

    def _rate(self, features: Tensor) -> Tensor:
        return coding_rate(normalized(features, self.config), **self.config.scale, group=self.joined)


def normalized(features: Tensor, config: RateConfig) -> Tensor:
    """Features [..., D] in float32, with rows normalised as `config.normalize` says."""
    features = features.float()
    if config.normalize == "unit":
        return F.normalize(features, dim=-1)
    return F.layer_norm(features, features.shape[-1:]) if config.normalize == "fixed_gain" else features


class SIGReg(Term):
    """SIGReg of the projections, separately for each view position, as views of one image are not independent.

    Source: LeJEPA (arXiv 2511.08544). It includes the factor B, and is about 1 for a Gaussian.
    """

    def __init__(self, config: Described):
        super().__init__(config.sigreg.weight)
        self.num_slices = config.sigreg.num_slices

    def forward(self, output: Output, step: Tensor) -> Tensor:
        projections = output.projections.float().transpose(0, 1)  # [V, B, E]
        return sigreg(projections, num_slices=self.num_slices, seed=step, group=self.joined).mean()


class Variance(Term):
    """Mean of max(0, 1 - standard deviation) over dimensions and view positions of projections (VICReg, eq. 1)."""

    def __init__(self, config: Described):
        super().__init__(config.vicreg.variance)

    def forward(self, output: Output, step: Tensor) -> Tensor:
        projections = joined_rows(output.projections.float(), self.joined)
        return F.relu(1 - (projections.var(0) + VARIANCE_EPS).sqrt()).mean()


class Covariance(Term):
    """Sum of squared covariances between dimensions / number of dimensions, mean over views (VICReg, eq. 4)."""

    def __init__(self, config: Described):
        super().__init__(config.vicreg.covariance)

    def forward(self, output: Output, step: Tensor) -> Tensor:
        centred = joined_rows(output.projections.float(), self.joined).transpose(0, 1)  # [V, B, E]
        centred = centred - centred.mean(1, keepdim=True)
        covariance = centred.mT @ centred / (centred.shape[1] - 1)
        squares = covariance.square()
        return (squares.sum() - squares.diagonal(dim1=-2, dim2=-1).sum()) / (centred.shape[0] * centred.shape[2])


TERMS: dict[str, Callable[[Described], Term]] = {
    "prediction": Prediction,
    "rate": Rate,
    "sigreg": SIGReg,
    "variance": Variance,
    "covariance": Covariance,
}


class Objective(nn.Module):
    """The weighted sum of all terms whose weight is not 0.

    Attributes:
        names: `loss_<term>` of each term, in the order in which they are logged.
    """

    def __init__(self, config: Described):
        super().__init__()
        self.prediction, self.temperature = config.objective.prediction, config.objective.temperature
        terms = {name: build(config) for name, build in TERMS.items()}
        self.terms = nn.ModuleDict({name: term for name, term in terms.items() if term.weight})
        self.names = tuple(f"loss_{name}" for name in self.terms)

    def join(self, group: ProcessGroup | None) -> None:
        """Treat the batches of these processes as one, in the terms that use statistics of a batch."""
        for term in self.terms.values():
            term.group = group

    def comparable(self, prediction: Tensor) -> Tensor:
        """Predictions [B, E] as compared with targets, in float32: distributions for cross_entropy, else unchanged."""
        if self.prediction == "cross_entropy":
            return (prediction.float() / self.temperature).softmax(-1)
        return prediction.float()

    def forward(self, output: Output, step: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term without its weight as `loss_<term>`, all 0-dim float32.

        Args:
            output: output of the model.
            step: training step (int64, 0-dim, on the device), which seeds the random draws of a term.
        """
        values = {name: term(output, step) for name, term in self.terms.items()}
        total = torch.stack([self.terms[name].weight * value for name, value in values.items()]).sum()
        return total, {f"loss_{name}": value for name, value in values.items()}
