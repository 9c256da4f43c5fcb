"""The coding rate as a term."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import coding_rate, local_coding_rate
from ..models.seq_jepa import Output
from ..runtime.distributed import joined_rows
from .config import NearestScopeConfig, RateConfig
from .term import Term


class Rate(Term):
    """Negative coding rate of the aggregate, of z, of both, or of projections; mean over views (MCR², equation 6).

    With `scope.kind=nearest` it is the rate of the neighbourhood of a row, with `images` that of the views of an image.
    """

    def __init__(self, config: RateConfig):
        super().__init__(config)
        self.config, self.scaling = config, config.scaling  # looked up once: a compiler does not trace pydantic
        self.count = config.scope.count if isinstance(config.scope, NearestScopeConfig) else None

    def forward(self, output: Output, step: Tensor) -> Tensor:
        rates = []
        if self.config.features in ("agg", "both"):
            rates.append(torch.stack([self._rate(reading.agg) for reading in output.readings]).mean())
        if self.config.features in ("z", "both"):
            rates.append(self._rate_of_views(output.z))
        if self.config.features == "projections":
            rates.append(self._rate_of_views(output.projected))
        return -torch.stack(rates).sum()

    def _rate_of_views(self, features: Tensor) -> Tensor:
        """Mean rate of features [B, N, D]: over views of the rates of batches, or over the batch of those of views."""
        if self.config.scope.kind == "images":
            return coding_rate(normalized(features, self.config), **self.scaling).mean()
        return self._rate(features.transpose(0, 1)).mean()

    def _rate(self, features: Tensor) -> Tensor:
        """Rates of features [..., B, D]."""
        features = normalized(features, self.config)
        if self.count is None:
            return coding_rate(features, **self.scaling, group=self.joined)
        if self.joined is not None:
            features = joined_rows(features.movedim(-2, 0), self.joined).movedim(0, -2)
        count = min(self.count, features.shape[-2])  # the last batch of a validation may be smaller
        return local_coding_rate(features, count, **self.scaling)


def normalized(features: Tensor, config: RateConfig) -> Tensor:
    """Features [..., D] in float32, with rows normalised as `config.normalize` says."""
    features = features.float()
    if config.normalize == "unit":
        return F.normalize(features, dim=-1)
    return F.layer_norm(features, features.shape[-1:]) if config.normalize == "fixed_gain" else features
