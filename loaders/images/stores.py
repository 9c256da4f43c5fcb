"""Where images are kept during training: on the device, in a memory-mapped file, in image files, or in betons."""

import contextlib
import importlib.util
import math
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import psutil
import torch

from ...configs.errors import InputError, shown
from .base import Images
from .beton import BetonImages, has_ffcv
from .cache import Cache
from .files import ImageFiles
from .host import HostImages
from .resident import ResidentImages

GROUP = Path("/sys/fs/cgroup")  # as a container sees its own
COPIES = 2**28  # bytes that processes on a CPU may hold together in copies of the images: a third of what one takes
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
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        fits = size * processes <= (host / 4 if processes == 1 else min(host / 4, COPIES))
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
            lines += filter(None, (cache.measure(split), _faster(split.pixels)))
    return list(dict.fromkeys(lines))


def _faster(images: ImageFiles) -> str | None:
    """A line on what is installed and decodes these files faster."""
    if not images.paths[0].lower().endswith((".jpg", ".jpeg")):
        return None
    if has_ffcv():
        size = f" --size {images.size}" if images.size else ""
        return f"FFCV would decode faster: `seqjepa write FOLDER OUT{size} --jpeg 90`, then data.root=OUT"
    if images.decoder == "pillow" and importlib.util.find_spec("torchcodec"):
        return "data.decoder=torchcodec would decode JPEGs faster, most of all where they are less than twice data.size"
    return None


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
