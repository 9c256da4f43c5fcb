"""The invariance of projections as a term."""

import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from .config import InvarianceConfig
from .term import Term


class Invariance(Term):
    """Mean distance of each projection from the mean over the views of its image, through which gradients pass too.

    The cosine is EMP-SSL's (arXiv 2304.03977, equation 4). For two views, the squared error is a quarter of VICReg's
    (arXiv 2105.04906, equation 5), divided by the number of dimensions.
    """

    def __init__(self, config: InvarianceConfig):
        super().__init__(config)
        self.cosine = config.distance == "cosine"

    def forward(self, output: Output, step: Tensor) -> Tensor:
        projections = output.projected  # [B, V, E]
        mean = projections.mean(1, keepdim=True)
        if self.cosine:
            return 1 - F.cosine_similarity(projections, mean, dim=-1).mean()
        return (projections - mean).square().mean()
