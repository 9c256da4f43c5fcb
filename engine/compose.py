"""`seqjepa.configs.compose`, with the schema `Config`."""

from typing import Any

from ..configs import compose as configs
from ..configs.compose import Composed
from .config import Config


def compose(words: list[str], base: tuple[str, dict[str, Any]] | None = None) -> Composed[Config]:
    """As `seqjepa.configs.compose.compose`."""
    return configs.compose(words, Config, base)
