"""SIGReg as a term."""

from torch import Tensor

from ...kernels import sigreg
from ..models.seq_jepa import Output
from .config import SIGRegConfig
from .term import Term


class SIGReg(Term):
    """SIGReg of the projections, separately for each view position, as views of one image are not independent.

    Source: LeJEPA (arXiv 2511.08544). It includes the factor B, and is about 1 for a Gaussian.
    """

    def __init__(self, config: SIGRegConfig):
        super().__init__(config)
        self.num_slices = config.num_slices

    def forward(self, output: Output, step: Tensor) -> Tensor:
        projections = output.projected.transpose(0, 1)  # [V, B, E]
        return sigreg(projections, num_slices=self.num_slices, seed=step, group=self.joined).mean()
