"""Where images are kept during training: on the device, in a memory-mapped file, in image files, or in betons."""

import math
import os
from collections.abc import Mapping

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

Store = ResidentImages | HostImages | BetonImages


def suited(taken: list[tuple[Images, int]], device: torch.device) -> str:
    """The store that `data.loader=auto` takes for images that are in no beton.

    Args:
        taken: the splits, and the number of images that is used of each.
        device: where batches go.
    """
    size = sum(count * math.prod(images.size) * images.channels for images, count in taken)
    host = psutil.virtual_memory().available
    if device.type == "cuda":
        fits = size <= torch.cuda.mem_get_info(device)[0] / 2
    else:
        fits = size * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) <= host / 4
    if fits:
        return "resident"
    whole = sum(math.prod(images.pixels.shape) for images in {id(images): images for images, _ in taken}.values())
    in_files = all(isinstance(images.pixels, ImageFiles) for images, _ in taken)
    return "files" if in_files and whole > host / 2 else "mapped"


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
            cache.measure(split)
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
