"""Distances of prediction and target."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from .config import CrossEntropyConfig
from .term import Term


class Prediction(Term):
    """A distance between prediction and target, averaged over both readings if there are two."""

    def forward(self, output: Output, step: Tensor) -> Tensor:
        return torch.stack([self.distance(r.prediction, r.target) for r in output.readings]).mean()

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch, for [B, E] each."""
        raise NotImplementedError

    def comparable(self, prediction: Tensor) -> Tensor:
        """Predictions [B, E] in the form that is compared with targets, in float32."""
        return prediction.float()


class Cosine(Prediction):
    """1 - cosine (the loss of seq-JEPA).

    Features after a ReLU are non-negative, so a constant that points at their mean scores low as well: a small
    value is no evidence against collapse.
    """

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


class MSE(Prediction):
    """Mean squared error."""

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction.float(), target.float())


class CrossEntropy(Prediction):
    """- Σ target log softmax(prediction / temperature) (DINO's loss).

    Its lower bound is the entropy of the target, which is not constant: the term may fall because targets sharpen.
    """

    def __init__(self, config: CrossEntropyConfig):
        super().__init__(config)
        self.temperature = config.temperature

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return -(target.float() * (prediction.float() / self.temperature).log_softmax(-1)).sum(-1).mean()

    def comparable(self, prediction: Tensor) -> Tensor:
        return (prediction.float() / self.temperature).softmax(-1)
