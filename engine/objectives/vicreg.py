"""The regularisers of VICReg (arXiv 2105.04906) as terms; its invariance is the prediction's distance."""

import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from ..runtime.distributed import joined_rows
from .config import VICRegConfig
from .group import coordinates_of
from .term import Term

VARIANCE_EPS = 1e-4  # VICReg's


class VICRegTerm(Term):
    """Base class: a term of the features that the config chooses."""

    def __init__(self, config: VICRegConfig):
        super().__init__(config)
        self.of_rest = config.features == "rest"

    def rows(self, output: Output) -> Tensor:
        """The features, [B, V, E], of all processes."""
        return joined_rows(coordinates_of(output).rest if self.of_rest else output.projected, self.joined)


class Variance(VICRegTerm):
    """Mean of max(0, 1 - standard deviation) over dimensions and view positions of the features (VICReg, eq. 1)."""

    def forward(self, output: Output, step: Tensor) -> Tensor:
        return F.relu(1 - (self.rows(output).var(0) + VARIANCE_EPS).sqrt()).mean()


class Covariance(VICRegTerm):
    """Sum of squared covariances between dimensions / number of dimensions, mean over views (VICReg, eq. 4)."""

    def forward(self, output: Output, step: Tensor) -> Tensor:
        centred = self.rows(output).transpose(0, 1)  # [V, B, E]
        centred = centred - centred.mean(1, keepdim=True)
        covariance = centred.mT @ centred / (centred.shape[1] - 1)
        squares = covariance.square()
        return (squares.sum() - squares.diagonal(dim1=-2, dim2=-1).sum()) / (centred.shape[0] * centred.shape[2])
