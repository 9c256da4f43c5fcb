"""The paper's predictor."""

import torch
from torch import Tensor, nn

from .config import MLPPredictorConfig


class MLPPredictor(nn.Module):
    """Two-layer MLP with batch norm: aggregate [B, T] and last action [B, P], if there is one -> predictions [B, E]."""

    def __init__(self, config: MLPPredictorConfig, width: int, action_width: int, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width + action_width, config.hidden, bias=False),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, outputs),
        )

    def forward(self, agg: Tensor, action: Tensor | None) -> Tensor:
        return self.layers(agg if action is None else torch.cat([agg, action.to(agg.dtype)], dim=-1))
