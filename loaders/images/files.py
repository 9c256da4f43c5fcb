"""Image files that are decoded when they are indexed."""

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from ...configs.errors import InputError, first_line, readable, shown

FORMATS = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")  # others could start programs, as PostScript does
VERSION = 1  # of how pixels are made of a file; another one has decoded images made again
MOST_PIXELS = 2**30 // 12  # Pillow's default bound, against files that unpack to gigabytes
TOO_LARGE = "images of up to 89 million pixels are read"


class ImageFiles:
    """Image files as an array of shape (N, H, W, 3) that decodes a slice when it is indexed.

    Args:
        paths: of the files.
        size: height and width to which each is brought: the largest square in its middle, resized with antialiasing.
            None takes files of one size as they are.
        decoder: pillow, or torchcodec for JPEG files.
        threads: number of threads that decode; None takes a few more than the machine has cores.

    Raises:
        InputError: a file is not an image with 8 bits per channel, or differs in size from the first; or torchcodec
            is not installed.
    """

    def __init__(self, paths: list[str], size: int | None = None, decoder: str = "pillow", threads: int | None = None):
        self.paths = paths
        self.size = size
        self.decoder = decoder
        self.threads = threads
        if decoder == "torchcodec":
            try:
                importlib.import_module("torchcodec.decoders")
            except (ImportError, OSError, RuntimeError) as error:  # it is built for some versions of torch
                how = "pip install 'seqjepa[torchcodec]', in a clone '.[torchcodec]'"
                problem = f"torchcodec cannot be imported ({first_line(error)}); {how}"
                raise InputError(problem, "data.decoder") from None
        with _bombs_ignored():
            try:
                height, width, _ = self._decode(paths[0]).shape
            except MemoryError:  # the header has the size; reading all pixels raises the error for users
                with _opened(paths[0]) as image:
                    width, height = (size, size) if size else image.size
        self.shape = (len(paths), height, width, 3)

    def identities(self) -> list[tuple[int, int]]:
        """Device and inode of each file: equal for links to one file."""
        return [identity(os.stat(path)) for path in self.paths]

    def recipe(self) -> tuple[int | str | None, ...]:
        """What decides the pixels, besides the files: size, decoder, and versions."""
        libraries = dict.fromkeys(["pillow", self.decoder])
        return VERSION, self.size, *(f"{name} {metadata.version(name)}" for name in libraries)

    def __getitem__(self, part: slice) -> np.ndarray:
        """Pixels of some of the images, uint8 [n, H, W, 3]."""
        positions = range(len(self.paths))[part]
        pixels = np.empty((len(positions), *self.shape[1:]), np.uint8)
        with _bombs_ignored():
            self.decode(positions, pixels)
        return pixels

    def decode(self, positions: Sequence[int], out: np.ndarray) -> None:
        """Write the pixels of the images at n positions to `out`, uint8 [n, H, W, 3]."""

        def place(row: int, position: int) -> None:
            image = self._decode(self.paths[position])
            if image.shape != out.shape[1:]:
                given, expected = (f"{width}x{height}" for height, width, _ in (image.shape, out.shape[1:]))
                problem = f"{given} pixels, the others have {expected}; data.size=64 would bring all to 64x64"
                raise InputError(f"{shown(self.paths[position])}: {problem}", "data.root")
            out[row] = image

        pool = ThreadPoolExecutor(self.threads)
        try:
            for _ in pool.map(place, range(len(positions)), positions):
                pass
        finally:  # an interrupt waits for the images that are being decoded, not for all
            pool.shutdown(cancel_futures=True)

    def _decode(self, path: str) -> np.ndarray:
        """Pixels of an image file, uint8 [H, W, 3], brought to the size if there is one."""
        with _opened(path) as image:
            if self.decoder == "torchcodec" and image.format == "JPEG" and _is_upright(image):
                return _by_torchcodec(path, self.size)
            if self.size is None:
                return np.asarray(image.convert("RGB"))
            size = self.size, self.size
            image.draft("RGB", size)  # a JPEG is decoded at a half, a quarter or an eighth, but not below the size
            return np.asarray(ImageOps.fit(image.convert("RGB"), size, Image.Resampling.BICUBIC))


def _is_upright(image: Image.Image) -> bool:
    """Whether an image is shown as it lies in its file, by its metadata; torchcodec would turn the others."""
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    except Exception:  # damaged metadata raise errors of any kind
        return False


def _by_torchcodec(path: str, size: int | None) -> np.ndarray:
    """Pixels of a JPEG, uint8 [H, W, 3]: decoded at its full size, then cut and resized."""
    import torch.nn.functional as F
    from torchcodec.decoders import decode_jpeg  # pyright: ignore[reportMissingImports, reportPrivateImportUsage]

    pixels: Any = decode_jpeg(path)  # [3, H, W]
    if size is not None:
        height, width = pixels.shape[1:]
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels[None, :, top : top + side, left : left + side]
        pixels = F.interpolate(square, (size, size), mode="bicubic", antialias=True)[0]
    return pixels.permute(1, 2, 0).numpy()


def identity(status: os.stat_result) -> tuple[int, int]:
    """Device and inode of a file or folder."""
    return status.st_dev, status.st_ino


def _bombs_ignored() -> warnings.catch_warnings:
    """Silences Pillow's warning of large images, for which `_opened` has an error of one line."""
    return warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """An image file whose header has been read; whatever its decoder raises becomes an error of one line."""
    try:
        with readable(path, "data.root"), Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise InputError(f"{shown(path)}: {image.width}x{image.height} pixels; {TOO_LARGE}", "data.root")
            if image.mode.startswith(("I", "F")) or _is_deep(image):
                raise InputError(f"{shown(path)}: {image.mode} pixels; 8 bits a channel are allowed", "data.root")
            yield image
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise InputError(f"{shown(path)}: {TOO_LARGE}", "data.root") from None
    except Exception as error:  # Pillow's plugins raise errors of any kind
        reason = first_line(error)
        if "out of memory" in reason:  # from a decoder in C
            raise MemoryError from None
        raise InputError(f"{shown(path)}: not a readable image ({reason})", "data.root") from None


def _is_deep(image: Any) -> bool:
    """Whether an image has 16 bits a channel although its mode has 8, to which Pillow would cut them."""
    for codec, _, _, args in image.tile:
        mode, *rest = args if isinstance(args, tuple) else (args,)
        if ";16" in str(mode) or (codec == "ppm" and rest and rest[0] > 255):  # of PPM, the largest value
            return True
    return False
