"""The inference of actions as a term."""

import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from .term import Term


class Inverse(Term):
    """Mean squared error of the actions that are inferred from the features of two successive views.

    The features must then hold what the action changes. Source: the augmentation-aware loss of AugSelf (arXiv
    2111.09613, section 3.2), which world models call inverse dynamics.
    """

    def forward(self, output: Output, step: Tensor) -> Tensor:
        assert output.inferred_actions is not None
        assert output.actions is not None
        return F.mse_loss(output.inferred_actions.float(), output.actions.float())
