"""Distances of prediction and target."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.seq_jepa import Output
from ..runtime.distributed import joined_rows
from .config import CrossEntropyConfig, InfoNCEConfig, PredictionConfig
from .term import Term


class Prediction(Term):
    """A distance between prediction and target, averaged over both readings if there are two.

    Args:
        config: settings of the distance.
        width: E, of predictions.
    """

    def __init__(self, config: PredictionConfig, width: int):
        super().__init__(config)

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
    are negatives, and so are the latest Q targets of earlier steps, if there is a queue. Chance is ln(N + how many it
    holds). A learnt scale is put back within its limits after each step; a clamp in the loss would end its gradient.

    Source: van den Oord et al. 2018, arXiv 1807.03748, equation 4, with cosines; queue: MoCo, arXiv 1911.05722.
    """

    log_scale: Tensor
    past: Tensor  # [Q, E] of unit length, in order of arrival from `place` on
    place: Tensor  # 0-dim, where the next is written
    held: Tensor  # 0-dim, how many there are

    def __init__(self, config: InfoNCEConfig, width: int):
        super().__init__(config, width)
        log_scale = torch.tensor(math.log(config.scale))
        self.limits = config.scale_limits and [math.log(limit) for limit in config.scale_limits]
        if self.limits:
            self.log_scale = nn.Parameter(log_scale, requires_grad=bool(config.weight))
        else:
            self.register_buffer("log_scale", log_scale, persistent=False)
        self.queue = config.queue
        if self.queue:
            self.register_buffer("past", torch.zeros(self.queue, width))
            self.register_buffer("place", torch.zeros((), dtype=torch.long))
            self.register_buffer("held", torch.zeros((), dtype=torch.long))

    def forward(self, output: Output, step: Tensor) -> Tensor:
        sides = zip(*((r.prediction, r.target) for r in output.readings), strict=True)
        return self.distance(*(joined_rows(torch.cat(side), self.joined) for side in sides))

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        prediction, target = (F.normalize(x.float(), dim=-1) for x in (prediction, target))
        own = torch.arange(len(target), device=target.device)
        prediction = prediction / self.log_scale.exp()
        logits = prediction @ target.T
        if self.queue:
            free = torch.arange(self.queue, device=target.device) >= self.held
            logits = torch.cat([logits, (prediction @ self.past.T).masked_fill(free, -torch.inf)], dim=1)
        return F.cross_entropy(logits, own)

    @torch.no_grad()
    def after_step(self, outputs: list[Output]) -> None:
        if self.limits:
            self.log_scale.clamp_(*self.limits)
        for output in outputs if self.queue else ():
            rows = joined_rows(torch.cat([reading.target for reading in output.readings]), self.world)
            rows = F.normalize(rows.float(), dim=-1)[-self.queue :]
            places = self.place + torch.arange(len(rows), device=rows.device)
            self.past.index_copy_(0, places % self.queue, rows)
            self.place.add_(len(rows)).remainder_(self.queue)
            self.held.add_(len(rows)).clamp_(max=self.queue)

    def figures(self) -> dict[str, Tensor]:
        found = {"infonce_scale": self.log_scale.exp()} if self.limits else {}
        return found | ({"infonce_queue": self.held / self.queue} if self.queue else {})


class CrossEntropy(Prediction):
    """- Σ target log softmax(prediction / temperature) (DINO's loss).

    Its lower bound is the entropy of the target, which is not constant: the term may fall because targets sharpen.
    """

    def __init__(self, config: CrossEntropyConfig, width: int):
        super().__init__(config, width)
        self.temperature = config.temperature

    def distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        return -(target.float() * (prediction.float() / self.temperature).log_softmax(-1)).sum(-1).mean()

    def comparable(self, prediction: Tensor) -> Tensor:
        return (prediction.float() / self.temperature).softmax(-1)
