"""Checksum, mean and standard deviation of pixels that are read part by part."""

from __future__ import annotations

import hashlib
import math

import numpy as np

__all__ = ["Statistics", "Tally"]

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, in [0, 1]


class Tally:
    """Counts how often each value occurs in each channel, so that nothing is rounded before the end."""

    def __init__(self):
        self.digest = hashlib.sha256()
        self.counts = np.zeros((3, 256), np.int64)

    def add(self, pixels: np.ndarray) -> None:
        """Take in the next images, uint8 [n, H, W, 3]."""
        self.digest.update(np.ascontiguousarray(pixels).data)
        for counts, channel in zip(self.counts, np.moveaxis(pixels, -1, 0), strict=True):
            counts += np.bincount(channel.ravel(), minlength=256)

    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, in [0, 1]; a deviation is at least 0.001."""
        mean, std = [], []
        for counts in self.counts.tolist():
            number, total = sum(counts), sum(value * count for value, count in enumerate(counts))
            squares = sum(value**2 * count for value, count in enumerate(counts))
            mean.append(total / (255 * number))
            std.append(max(math.sqrt(number * squares - total**2) / (255 * number), 1e-3))
        return tuple(mean), tuple(std)

    def fingerprint(self, labels: np.ndarray) -> str:
        """SHA-256 of the pixels, followed by their labels."""
        digest = self.digest.copy()
        digest.update(np.ascontiguousarray(labels, dtype="<i8").data)
        return digest.hexdigest()
