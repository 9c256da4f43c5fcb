"""`seqjepa.configs.compose`, with the config of training for a schema."""

from __future__ import annotations

from typing import Any

from ..configs import compose as configs
from ..configs.compose import CONFIGS, Composed, describe, dump
from .config import Config

__all__ = ["CONFIGS", "Composed", "compose", "describe", "dump"]


def compose(words: list[str], base: tuple[str, dict[str, Any]] | None = None) -> Composed[Config]:
    """As `seqjepa.configs.compose.compose`."""
    return configs.compose(words, Config, base)
