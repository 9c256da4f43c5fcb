"""CRATE as a predictor."""

import torch
from torch import Tensor, nn

from ..white_box.layers import CrateLayer, WhiteBox
from .config import CratePredictorConfig


class CratePredictor(nn.Module):
    """White-box layers on two tokens: aggregate [B, T] and last action [B, P] -> predictions [B, E].

    Each token has a learnt vector that says what it is. Without the action there is one token.
    """

    no_decay = ("kinds",)

    def __init__(self, config: CratePredictorConfig, width: int, action_width: int, outputs: int):
        super().__init__()
        self.agg = nn.Linear(width, config.dim)
        self.action = nn.Linear(action_width, config.dim) if action_width else None
        self.kinds = nn.Parameter(torch.empty(2 if action_width else 1, config.dim).normal_(std=0.02))
        self.layers = WhiteBox(*(CrateLayer(config, config.dim) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(config.dim)
        self.out = nn.Linear(config.dim, outputs)

    def forward(self, agg: Tensor, action: Tensor | None) -> Tensor:
        tokens = [self.agg(agg)]
        if self.action is not None:
            tokens.append(self.action(action))
        return self.out(self.norm(self.layers(torch.stack(tokens, dim=1) + self.kinds)[:, 0]))
