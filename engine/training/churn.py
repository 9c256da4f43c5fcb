"""How many codes of the objects of some grids change while a network learns."""

import torch
from torch import Tensor

from ...loaders.loader import SequenceLoader
from ..models.encoders.base import ImageEncoder
from ..models.seq_jepa import SeqJEPA
from ..models.targets.ema import EMATeacher

GRIDS = 256  # whose objects are looked at


class Churn:
    """Looks at the codes of the same objects again and again.

    Args:
        model: whose encoder gives objects codes; a teacher has codes of its own.
        loader: the first of its grids are looked at, unchanged.

    Attributes:
        encoders: those that are looked at, by the name of their metric.
        seen: codes at the last look, int64 [N, 1, O, G], by the same names; none before the first.
    """

    def __init__(self, model: SeqJEPA, loader: SequenceLoader):
        self.encoders: dict[str, ImageEncoder] = {"codes_churn": model.encoder}
        if isinstance(model.target, EMATeacher):
            self.encoders["codes_churn_target"] = model.target.teacher
        grids = loader.pixels(GRIDS)  # [N, S, S, 1]
        self.grids = grids.permute(0, 3, 1, 2)[:, None].float()
        self.seen: dict[str, Tensor] = {}

    @torch.no_grad()
    def look(self) -> dict[str, Tensor]:
        """Percent of codes in eval mode that have changed since the last look, 0-dim; nothing at the first look."""
        found = {}
        for name, encoder in self.encoders.items():
            training = encoder.training
            codes = encoder.eval().with_tokens(self.grids)[1].codes
            encoder.train(training)
            assert codes is not None
            before = self.seen.get(name)
            if before is not None and before.shape == codes.shape:
                there = codes >= 0
                found[name] = 100 * ((codes != before) & there).sum() / there.sum().clamp(min=1)
            self.seen[name] = codes
        return found
