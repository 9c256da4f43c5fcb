"""Distances of prediction and target."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from ..runtime.distributed import joined_rows
from .config import CrossEntropyConfig, InfoNCEConfig
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

    def similarity(self, prediction: Tensor, targets: Tensor) -> Tensor:
        """How near predictions [..., E] are to targets [..., E], both `comparable`; larger is nearer."""
        return F.cosine_similarity(prediction, targets, dim=-1)

    def resolution(self, targets: Tensor) -> float:
        """Differences of `similarity` to targets of this scale that are no more than roundings in single precision."""
        return 1e-5


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

    def similarity(self, prediction: Tensor, targets: Tensor) -> Tensor:
        return -(prediction - targets).square().mean(-1)

    def resolution(self, targets: Tensor) -> float:
        return 1e-5 * targets.square().mean(-1).amax().item()


class InfoNCE(Prediction):
    """Cross-entropy of the softmax of cosines over a scale, between each prediction and all targets of the batch.

    All readings of all processes are one batch of N rows: the targets of the other readings, also of the same sequence,
    are negatives. Chance is ln N.

    Source: van den Oord et al. 2018, arXiv 1807.03748, equation 4, with cosines.
    """

    def __init__(self, config: InfoNCEConfig):
        super().__init__(config)
        self.scale = config.scale

    def forward(self, output: Output, step: Tensor) -> Tensor:
        sides = zip(*((r.prediction, r.target) for r in output.readings), strict=True)
        return self.distance(*(joined_rows(torch.cat(side), self.joined) for side in sides))

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        prediction, target = (F.normalize(x.float(), dim=-1) for x in (prediction, target))
        own = torch.arange(len(target), device=target.device)
        return F.cross_entropy(prediction @ target.T / self.scale, own)


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
