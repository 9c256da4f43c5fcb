"""Images that stay on the host: memory-mapped, or in files that are decoded when they are needed."""

import errno
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...configs.errors import InputError
from .base import Images
from .files import ImageFiles

AHEAD = 2  # batches that are read while one is used


class HostImages:
    """The images of a split on the host; batches are read ahead by a thread, and copied to the device.

    Args:
        images: the split; its pixels are an array, such as a memory-mapped one, or files.
        device: where batches go.
    """

    def __init__(self, images: Images, device: torch.device):
        self.device = device
        self.labels = torch.from_numpy(images.labels).to(device)  # [N]
        self.pixels = images.pixels

    def batches(self, parts: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield (pixels uint8 [b, H, W, C], labels [b], index [b]) for each array of positions."""
        if not parts:
            return
        order = torch.from_numpy(np.concatenate(parts)).to(self.device)
        pinned = self.device.type == "cuda"
        largest = max(map(len, parts))
        # the thread only fills these; what concerns the device is done here, where a CUDA graph may be captured
        buffers = [
            torch.empty((largest, *self.pixels.shape[1:]), dtype=torch.uint8, pin_memory=pinned)
            for _ in range(AHEAD + 1)
        ]
        copied: list[Any] = [None] * len(buffers)  # event after the last copy out of each
        turns = cycle(range(len(buffers)))
        reader = ThreadPoolExecutor(1, "reader")
        waiting: list[tuple[int, Future[None]]] = []
        later = iter(parts)

        def read_on() -> None:
            if (part := next(later, None)) is not None:
                turn = next(turns)
                if copied[turn] is not None:
                    copied[turn].synchronize()
                waiting.append((turn, reader.submit(self._read, part, buffers[turn][: len(part)])))

        try:
            for _ in range(AHEAD):
                read_on()
            for index in order.split([len(part) for part in parts]):
                turn, done = waiting.pop(0)
                read_on()
                try:
                    done.result()
                except InputError as error:  # it could be read at the start: the machine is to blame, not the input
                    raise OSError(errno.EIO, str(error)) from None
                pixels = buffers[turn][: len(index)].to(self.device, non_blocking=True, copy=True)
                if pinned:
                    copied[turn] = torch.cuda.Event()
                    copied[turn].record(torch.cuda.current_stream(self.device))
                yield pixels, self.labels[index], index
        finally:
            reader.shutdown(cancel_futures=True)

    def _read(self, positions: np.ndarray, out: Tensor) -> None:
        if isinstance(self.pixels, ImageFiles):
            self.pixels.decode(positions.tolist(), out.numpy())
        else:
            np.take(self.pixels, positions, 0, out.numpy(), mode="clip")  # other modes copy once more
