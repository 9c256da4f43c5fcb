"""Base class of aggregators."""

from typing import ClassVar

from torch import nn


class Aggregator(nn.Module):
    """A network from tokens [B, M, T] to an aggregate [B, T], built with its section and the token width T.

    Attributes:
        no_decay: names of parameters without weight decay, besides vectors such as biases, which never have it.
        figure_names: keys of what `figures` returns.
    """

    no_decay: ClassVar[tuple[str, ...]] = ()
    figure_names: ClassVar[tuple[str, ...]] = ()

    def figures(self) -> dict[str, float]:
        """Numbers about its weights that each validation reports; none by default."""
        return {}
