"""The coding rate as a term."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import coding_rate
from ..models.seq_jepa import Output
from .config import RateConfig
from .term import Term


class Rate(Term):
    """Negative coding rate of the aggregate, of z, of both, or of projections; mean over views (MCR², equation 6)."""

    def __init__(self, config: RateConfig):
        super().__init__(config)
        self.config, self.scaling = config, config.scaling  # looked up once: a compiler does not trace pydantic

    def forward(self, output: Output, step: Tensor) -> Tensor:
        rates = []
        if self.config.features in ("agg", "both"):
            rates.append(torch.stack([self._rate(reading.agg) for reading in output.readings]).mean())
        if self.config.features in ("z", "both"):
            rates.append(self._rate(output.z.transpose(0, 1)).mean())  # [M, B, D]
        if self.config.features == "projections":
            rates.append(self._rate(output.projected.transpose(0, 1)).mean())  # [V, B, E]
        return -torch.stack(rates).sum()

    def _rate(self, features: Tensor) -> Tensor:
        return coding_rate(normalized(features, self.config), **self.scaling, group=self.joined)


def normalized(features: Tensor, config: RateConfig) -> Tensor:
    """Features [..., D] in float32, with rows normalised as `config.normalize` says."""
    features = features.float()
    if config.normalize == "unit":
        return F.normalize(features, dim=-1)
    return F.layer_norm(features, features.shape[-1:]) if config.normalize == "fixed_gain" else features
