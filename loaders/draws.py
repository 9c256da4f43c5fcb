"""Counter-based random draws: each number is a pure function of what it is drawn for.

A draw is addressed by (seed, stream, epoch, index, view, draw), so an image gets the same views from any loader and
device, in batches of any size, on any number of processes, and after a restart. All arithmetic is exact (integers,
and multiplications by powers of two), so neither the batch size nor the compiler changes a bit of it.
"""

import numpy as np
import torch
from torch import Tensor

from ..kernels.philox import philox

TRAIN_STREAM, VALIDATION_STREAM, ORDER_STREAM, STATISTICS_STREAM = range(4)
TASK_STREAM, ARRIVAL_STREAM, REPLAY_STREAM, PICK_STREAM, ROWS_STREAM = range(4, 9)  # of loaders.streams
GRID_STREAM, COUNTERFACTUAL_STREAM = 9, 10  # of generated grids, and of what they could have become
CODEBOOK_STREAM = 11  # of the tokens that become codes
ALTERED_STREAM = 12  # of what terms of the objective alter in grids

FIXED_POINT_BITS = 16  # |value| < 256 then has at most 24 significant bits: exact in float32


def words(seed: int, stream: int, epoch: Tensor | int, index: Tensor, num_views: int, num_draws: int) -> Tensor:
    """Random words for a batch of samples.

    Args:
        seed: seed of the run, in [0, 2**32).
        stream: what the draws are used for (`TRAIN_STREAM` and so on).
        epoch: number of the epoch, an int or an int64 0-dim tensor, or of each sample's visit, int64 [B, 1, 1];
            validation always passes 0.
        index: positions in the dataset, int64 [B].
        num_views: number V of views.
        num_draws: D numbers for each view.

    Returns:
        int64 [B, V, D], uniform in [0, 2**32).
    """
    index = index[:, None, None]  # [B, 1, 1]
    view = torch.arange(num_views, device=index.device)[None, :, None]  # [1, V, 1]
    block = torch.arange((num_draws + 3) // 4, device=index.device)[None, None, :]  # four words a block
    lanes = philox((seed, stream), (index, view, block, epoch))  # four times [B, V, blocks]
    return torch.stack(lanes, dim=-1).flatten(-2)[..., :num_draws]


def keys(seed: int, stream: int, index: np.ndarray, epoch: int = 0, turn: int = 0) -> np.ndarray:
    """A random number of 63 bits for each position, int64 [N]; sorting by it draws an order, in which ties are rare."""
    first, second, *_ = philox((seed, stream), (torch.from_numpy(index), turn, torch.tensor(0), epoch))
    return ((first << 31) ^ second).numpy()


def integers(word: Tensor, low: int, high: int | Tensor) -> Tensor:
    """Map words to whole numbers, uniform on low..high inclusive; float32 of the same shape, exact."""
    return (low + (word * (high - low + 1) >> 32)).to(torch.float32)


def uniform(word: Tensor, low: float, high: float) -> Tensor:
    """Map words to float32 of the same shape, uniform on [low, high) in steps of 2**-16, exact."""
    scale = 1 << FIXED_POINT_BITS
    fixed_low, fixed_high = round(low * scale), round(high * scale)
    fixed = fixed_low + (word * (fixed_high - fixed_low) >> 32)
    return fixed.to(torch.float32) * (1.0 / scale)


def chance(word: Tensor, probability: float) -> Tensor:
    """Map words to 1 with a probability, else 0; float32 of the same shape."""
    return (word < round(probability * 2**32)).to(torch.float32)
