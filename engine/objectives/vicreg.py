"""The regularisers of VICReg (arXiv 2105.04906) as terms; its invariance is the prediction's distance."""

import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from ..runtime.distributed import joined_rows
from .term import Term

VARIANCE_EPS = 1e-4  # VICReg's


class Variance(Term):
    """Mean of max(0, 1 - standard deviation) over dimensions and view positions of projections (VICReg, eq. 1)."""

    def forward(self, output: Output, step: Tensor) -> Tensor:
        projections = joined_rows(output.projected, self.joined)
        return F.relu(1 - (projections.var(0) + VARIANCE_EPS).sqrt()).mean()


class Covariance(Term):
    """Sum of squared covariances between dimensions / number of dimensions, mean over views (VICReg, eq. 4)."""

    def forward(self, output: Output, step: Tensor) -> Tensor:
        centred = joined_rows(output.projected, self.joined).transpose(0, 1)  # [V, B, E]
        centred = centred - centred.mean(1, keepdim=True)
        covariance = centred.mT @ centred / (centred.shape[1] - 1)
        squares = covariance.square()
        return (squares.sum() - squares.diagonal(dim1=-2, dim2=-1).sum()) / (centred.shape[0] * centred.shape[2])
