"""What every aggregator offers."""

from typing import ClassVar

from torch import nn


class Aggregator(nn.Module):
    """What the rest of the code may ask of any aggregator, besides calling it with tokens [B, M, T].

    Attributes:
        no_decay: names of its own parameters that weight decay leaves alone, although they are no vectors.
        figure_names: of what `figures` returns.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()

    def figures(self) -> dict[str, float]:
        """Numbers about its weights that each validation reports; none by default."""
        return {}
