"""Where images are kept during training: on the device, in a memory-mapped file, in image files, or in betons."""

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import torch

from ...configs.errors import InputError, shown
from .base import Images
from .beton import BetonImages
from .cache import Cache
from .files import ImageFiles
from .host import HostImages
from .resident import ResidentImages

GROUP = Path("/sys/fs/cgroup")  # as a container sees its own
Store = ResidentImages | HostImages | BetonImages


def suited(taken: list[tuple[Images, int]], device: torch.device, cache: Cache) -> str:
    """The store that `data.loader=auto` takes for images that are in no beton.

    Args:
        taken: the splits, and the number of images that is used of each.
        device: where batches go.
        cache: where decoded images would be kept.
    """
    size = sum(count * math.prod(images.size) * images.channels for images, count in taken)
    host = memory()
    if device.type == "cuda":
        fits = size <= torch.cuda.mem_get_info(device)[0] / 2
    else:
        fits = size * int(os.environ.get("LOCAL_WORLD_SIZE") or 1) <= host / 4
    if fits:
        return "resident"
    whole = sum(math.prod(images.pixels.shape) for images in {id(images): images for images, _ in taken}.values())
    in_files = all(isinstance(images.pixels, ImageFiles) for images, _ in taken)
    return "files" if in_files and (whole > host / 2 or whole > cache.room()) else "mapped"


def memory() -> int:
    """Bytes of memory that are left to this process, by the machine or by the limit of its control group."""
    left = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # there is no limit, which is "max", or no such group
        limit, used = ((GROUP / name).read_text() for name in ("memory.max", "memory.current"))
        left = min(left, int(limit) - int(used))
    return left


def prepare(kind: str, images: Mapping[str, Images | BetonImages], cache: Cache) -> list[str]:
    """Decode or measure the images of both splits if their store needs it.

    Returns:
        Lines that the user should read.

    Raises:
        InputError: the images cannot be in such a store, or one cannot be read.
    """
    lines = []
    for split in {id(split): split for split in images.values()}.values():
        if isinstance(split, BetonImages):
            if kind not in ("ffcv", "resident"):
                raise InputError(f"{kind} reads images; betons are read by ffcv or resident", "data.loader")
        elif kind == "mapped":
            path = cache.map(split)
            lines.append(f"{shown(path)}: {math.prod(split.pixels.shape) / 2**30:.3g} GiB of decoded images")
        elif kind == "files":
            if not isinstance(split.pixels, ImageFiles):
                problem = f"files reads folders of image files; {split.dataset.name} has files of its own"
                raise InputError(f"{problem}: resident or mapped", "data.loader")
            if problem := cache.measure(split):
                lines.append(problem)
    return lines


def open_store(kind: str, images: Images | BetonImages, device: torch.device, chosen: np.ndarray) -> Store:
    """The store of a split.

    Args:
        kind: resident, mapped, files or ffcv.
        images: the split, after `prepare`.
        device: where batches go.
        chosen: positions of the images that are used, int64.

    Raises:
        InputError: memory does not suffice, or an image cannot be read.
    """
    if kind == "resident":
        return ResidentImages(images, device, chosen)
    return images if isinstance(images, BetonImages) else HostImages(images, device)
