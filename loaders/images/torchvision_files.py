"""Datasets in the files that torchvision downloads and reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...configs.errors import InputError
from .base import Dataset, Images

__all__ = ["TorchvisionDataset"]


class TorchvisionDataset(Dataset):
    """A dataset that a class of torchvision reads.

    Attributes:
        reader: name of that class in `torchvision.datasets`.
    """

    reader: str

    def read(self, root: Path | None, split: str, download: bool) -> Images:
        from torchvision import datasets

        try:
            stored = getattr(datasets, self.reader)(str(root), train=split == "train", download=download)
        except (RuntimeError, OSError, ValueError, EOFError, AssertionError) as error:
            missing = f"no {self.name} there: neither train/ and test/, nor a .beton, nor torchvision's own files"
            reason = f"the download failed ({error})" if download else "data.download=true fetches it"
            raise InputError(f"{root}: {missing}; {reason}", "data.root") from None
        pixels = np.asarray(stored.data)
        if pixels.ndim == 3:  # gray: three equal channels
            pixels = np.repeat(pixels[..., None], 3, axis=-1)
        return Images(self, pixels, np.asarray(stored.targets, np.int64), list(stored.classes))
