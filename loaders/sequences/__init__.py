"""How are views drawn and rendered from an image, and the actions between them encoded?"""

import torch

from ..config import ActionsConfig, SequenceConfig
from .base import ActionSpace, Factor, Group, Sequence, Sweeps

__all__ = ["ActionSpace", "Factor", "Group", "Sequence", "Sweeps", "build_sequence"]

CPU = torch.device("cpu")
DEFAULT_ACTIONS = ActionsConfig()


def build_sequence(
    config: SequenceConfig,
    image_size: tuple[int, int],
    actions: ActionsConfig = DEFAULT_ACTIONS,
    device: torch.device = CPU,
) -> Sequence:
    """The sequence that `config` describes.

    Args:
        config: settings of the sequence.
        image_size: (H, W).
        actions: how actions are encoded.
        device: where views are rendered.

    Raises:
        InputError: the sequence does not support the images' size.
    """
    return config.build(actions, image_size, device)
