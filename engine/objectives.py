"""What training minimises: a weighted sum of named terms, each logged by its name."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqjepa.engine.config import ObjectiveConfig
from seqjepa.engine.model import Output

__all__ = ["PREDICTION_LOSSES", "TERMS", "Objective", "cosine_distance"]

TERMS = ("prediction",)  # in the order in which they are logged


def cosine_distance(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean of 1 - cosine over the batch, for [B, D] each (seq-JEPA, equation of the loss).

    Features after a ReLU are non-negative: a constant that points at their mean scores low as well, so a small
    value is no evidence against collapse.
    """
    return 1 - F.cosine_similarity(prediction.float(), target.float(), dim=-1).mean()


PREDICTION_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cosine": cosine_distance}


class Objective(nn.Module):
    """The weighted sum of the terms of an output."""

    def __init__(self, config: ObjectiveConfig):
        super().__init__()
        self.weights = {"prediction": config.prediction_weight}
        self.prediction = PREDICTION_LOSSES[config.prediction]

    def forward(self, output: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum, and each term without its weight as `loss_<term>`, all 0-dim float32."""
        terms = {"prediction": self.prediction(output.prediction, output.target)}
        total = torch.stack([self.weights[name] * term for name, term in terms.items()]).sum()
        return total, {f"loss_{name}": term for name, term in terms.items()}
