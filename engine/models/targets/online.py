"""The encoder as its own teacher."""

import torch
from torch import Tensor, nn

from ....loaders.batch import Views
from .base import Target
from .config import OnlineTargetConfig


class OnlineTarget(Target):
    """The target is the encoder's own feature, without gradient (`stop_gradient`) or with it (`shared`).

    With `batch_statistics=joint` all views are encoded together, so that target and observed views share batch
    statistics; with `own` the target views are a batch of their own, as in the reference code.
    """

    def __init__(self, config: OnlineTargetConfig, encoder: nn.Module, projector: nn.Module | None = None):
        super().__init__()
        self.joint = config.joint
        self.detached = config.detached

    def features(self, encoder: nn.Module, views: Views) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detached):
            return encoder(views)
