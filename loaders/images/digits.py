"""scikit-learn's handwritten digits, which come with the package: 1,797 gray images of 8x8 pixels."""

import functools
import random
from pathlib import Path

import numpy as np

from ...configs.errors import InputError
from .base import Dataset, Images

TEST = 359  # images of the test split: a fifth


class Digits(Dataset):
    """The digits doubled in size, in the middle of a black image of 24x24 pixels."""

    side, num_classes = 24, 10
    needs_root = False

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        if root is not None:
            raise InputError(f"{root}: digits come with scikit-learn, or from betons; there is no .beton", "data.root")
        pixels, labels = _doubled()
        # images are ordered by writer and repeat 0 to 9: a permutation puts classes and writers in both splits
        order = list(range(len(pixels)))
        random.Random(0).shuffle(order)
        chosen = sorted(order[:TEST] if split == "test" else order[TEST:])
        return Images(self, pixels[chosen], labels[chosen], [str(d) for d in range(10)])


@functools.cache  # both splits are made of them
def _doubled() -> tuple[np.ndarray, np.ndarray]:
    """All digits as uint8 [N, 24, 24, 3], and their labels, int64 [N]."""
    from PIL import Image
    from sklearn.datasets import load_digits

    flat, labels = load_digits(return_X_y=True)  # [N, 64] in 0..16, [N]
    small = np.round(np.asarray(flat) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    pixels = np.zeros((len(small), 24, 24, 3), np.uint8)
    for canvas, digit in zip(pixels, small, strict=True):
        doubled = Image.fromarray(digit).resize((16, 16), Image.Resampling.BILINEAR)
        canvas[4:20, 4:20] = np.asarray(doubled)[..., None]
    return pixels, np.asarray(labels).astype(np.int64)
