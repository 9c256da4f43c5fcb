"""Action sequences: how views are drawn and rendered from an image, and how the moves between them are encoded.

A sequence is one class in a file of its own and one line in `SEQUENCES`.
"""

from __future__ import annotations

import torch

from ...configs.errors import InputError
from ..config import ActionsConfig, SequenceConfig
from .affine import Affine
from .augment import Augment
from .base import Sequence
from .rotation import Rotation

__all__ = ["SEQUENCES", "Sequence", "build_sequence"]

SEQUENCES: dict[str, type[Sequence]] = {"rotation": Rotation, "affine": Affine, "augment": Augment}
CPU = torch.device("cpu")
TOLD = ActionsConfig()


def build_sequence(
    config: SequenceConfig,
    image_size: tuple[int, int],
    actions: ActionsConfig = TOLD,
    device: torch.device = CPU,
) -> Sequence:
    """The sequence that `config.kind` names.

    Args:
        config: of the sequence.
        image_size: (H, W).
        actions: how actions are encoded.
        device: where views are rendered.

    Raises:
        InputError: the images are not what the sequence needs, or its actions have nothing to add.
    """
    if actions.full and config.kind != "augment":
        raise InputError(f"sequence.kind={config.kind} has nothing to add; false is allowed", "actions.full")
    return SEQUENCES[config.kind](config, actions, image_size, device)
