"""Distillation from the encoder of the last task as a term."""

import torch.nn.functional as F
from torch import Tensor

from ..models.seq_jepa import Output
from .term import Term


class Distillation(Term):
    """Mean of 1 - cosine between the features of the past and what is mapped to them; 0 before a task has ended.

    Source: PFR (arXiv 2112.08913), equation 4.
    """

    def forward(self, output: Output, step: Tensor) -> Tensor:
        assert output.recalled is not None
        mapped, past, known = output.recalled
        return (known * (1 - F.cosine_similarity(mapped.float(), past.float(), dim=-1).mean(1))).mean()
