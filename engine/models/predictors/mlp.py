"""The paper's predictor."""

from torch import Tensor, nn

from ..config import MLPPredictorConfig


class MLPPredictor(nn.Module):
    """Two-layer MLP with batch norm: aggregate and last action, [B, T + P] -> predictions [B, E]."""

    def __init__(self, config: MLPPredictorConfig, inputs: int, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, config.hidden, bias=False),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(inplace=True),
            nn.Linear(config.hidden, outputs),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)
