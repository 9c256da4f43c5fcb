"""Action sequences: how views are drawn and rendered from an image, and how the moves between them are encoded.

A sequence is one class in a file of its own and one line in `SEQUENCES`.
"""

from __future__ import annotations

from seqjepa.loaders.config import SequenceConfig
from seqjepa.loaders.sequences.affine import Affine
from seqjepa.loaders.sequences.base import Sequence
from seqjepa.loaders.sequences.rotation import Rotation

__all__ = ["SEQUENCES", "Sequence", "build_sequence"]

SEQUENCES: dict[str, type[Sequence]] = {"rotation": Rotation, "affine": Affine}


def build_sequence(config: SequenceConfig) -> Sequence:
    """The sequence that `config.kind` names."""
    return SEQUENCES[config.kind](config)
