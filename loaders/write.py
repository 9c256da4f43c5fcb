"""Write betons, the files of FFCV: `seqjepa write SOURCE OUT`.

SOURCE is a folder with train/ and test/ (or val/), each with a folder for each class; or the name of a dataset, with
its own files in --root. OUT receives train.beton and test.beton, each with a sidecar that describes it.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..configs.cli import DONE, MACHINE_FAILED, command, parser_of
from ..configs.errors import InputError, out_of_memory
from ..configs.files import file_sha256
from .images import DATASETS, find_dataset

if TYPE_CHECKING:
    from .images.base import Images
    from .images.beton import Sidecar

PAGE = 1 << 23  # bytes; a beton consists of pages, and no image crosses the end of one
LARGEST_SIDE = 2**16 - 1  # FFCV keeps it in 16 bits


def write_beton(
    images: Images, path: Path, *, split: str, train: Images | None = None, jpeg: int | None = None
) -> Sidecar:
    """Write a split as a beton with its sidecar; both appear whole or not at all.

    The bytes are those of FFCV's own writer, which hands each image to another process, for which it waits forever when
    the disk is full.

    Args:
        images: the split, which is read part by part.
        path: the beton, NAME.beton.
        split: train or test.
        train: the training images, whose mean and standard deviation the sidecar gets; None takes `images`.
        jpeg: quality, 1 to 100, of the JPEGs that are stored; None stores the pixels.

    Raises:
        InputError: the images are larger than FFCV can store.
    """
    from .images.beton import Sidecar, sidecar_path

    height, width = images.size
    if max(height, width) > LARGEST_SIDE:
        raise InputError(f"images are {width}x{height}, a beton takes at most {LARGEST_SIDE} pixels a side")
    size = height * width * 3  # that of an image's pixels
    page = max(PAGE, 1 << (size - 1).bit_length())
    begin = _begin(len(images.labels), page)
    path.parent.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(path.parent).free, begin + page * -(-len(images.labels) // (page // size))
    if jpeg is None and free < needed:
        missing = f"{needed >> 20} MiB are needed, {free >> 20} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {missing}", str(path))
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with partial.open("wb") as file:
            places, sizes, place = [], [], begin
            for image in _encoded(images.parts(), jpeg):
                if place // page != (place + len(image) - 1) // page:  # no image crosses the end of a page
                    place = -(-place // page) * page
                file.seek(place)
                file.write(image)
                places.append(place)
                sizes.append(len(image))
                place += len(image)
            end = -(-place // page) * page
            head, tail = _frame(images, page, np.array(places), np.array(sizes), end, jpeg)
            file.seek(end)
            file.write(tail)
            file.seek(0)
            file.write(head)
            file.flush()
            os.fsync(file.fileno())
        mean, std = (train or images).statistics()
        pixels = images.fingerprint()
        sidecar = Sidecar(
            source=images.dataset.name,
            split=split,
            count=len(images.labels),
            image_size=[height, width],
            classes=[os.fsencode(name).decode(errors="backslashreplace") for name in images.classes],  # JSON is text
            mean=list(mean),
            std=list(std),
            # JPEGs are other images than the ones that they were made of
            pixels_sha256=pixels if jpeg is None else hashlib.sha256(f"{pixels} jpeg {jpeg}".encode()).hexdigest(),
            file_size=end + len(tail),
            file_sha256=file_sha256(partial),
        )
        sidecar.write(sidecar_path(partial))
        # the old sidecar goes first: a beton without a sidecar is refused, one with another's would be trusted
        sidecar_path(path).unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(sidecar_path(partial), sidecar_path(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
        sidecar_path(partial).unlink(missing_ok=True)
    return sidecar


def _encoded(parts: Iterable[np.ndarray], jpeg: int | None) -> Iterator[bytes | memoryview]:
    """The bytes of each image: its pixels, or a JPEG."""
    from PIL import Image

    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "JPEG", quality=jpeg)
        return buffer.getvalue()

    if jpeg is None:
        for part in parts:
            yield from (np.ascontiguousarray(image).data.cast("B") for image in part)
        return
    pool = ThreadPoolExecutor()
    try:
        for part in parts:
            yield from pool.map(encode, part)
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(count: int, page: int) -> int:
    """The place of the first image in a beton: the first page after what describes the images."""
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField

    bytes_of_each = types.get_metadata_type([RGBImageField(), IntField()]).itemsize
    head = types.HeaderType.itemsize + 2 * types.FieldDescType.itemsize + count * bytes_of_each
    return -(-head // page) * page


def _frame(
    images: Images, page: int, places: np.ndarray, sizes: np.ndarray, end: int, jpeg: int | None
) -> tuple[bytes, bytes]:
    """What stands in a beton before the images, and after them.

    Args:
        images: the split.
        page: bytes of a page.
        places: of each image in the file, int64 [N].
        sizes: bytes of each image, int64 [N].
        end: the place where the images end.
        jpeg: quality of the JPEGs; None if pixels are stored.
    """
    from ffcv import types
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES

    count, (height, width) = len(images.labels), images.size
    header = np.zeros(1, types.HeaderType)
    fields = np.zeros(2, types.FieldDescType)
    samples = np.zeros(count, types.get_metadata_type([RGBImageField(), IntField()]))
    header["version"], header["num_fields"], header["num_samples"] = types.CURRENT_VERSION, len(fields), count
    header["page_size"], header["alloc_table_ptr"] = page, end
    numbers = {kind: number for number, kind in types.TYPE_ID_HANDLER.items()}
    for field, name, kind in zip(fields, (b"image", b"label"), (RGBImageField, IntField), strict=True):
        field["type_id"] = numbers[kind]
        field["name"][: len(name)] = list(name)
    image = samples["f0"]
    image["mode"] = IMAGE_MODES["raw" if jpeg is None else "jpg"]
    image["height"], image["width"], image["data_ptr"] = height, width, places
    samples["f1"] = images.labels
    table = np.zeros(count, types.ALLOC_TABLE_TYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), places, sizes
    return header.tobytes() + fields.tobytes() + samples.tobytes(), table.tobytes()


@command("finished betons are kept, and no beton is half-written")
def main(argv: list[str]) -> int:
    """Run the command line and return 0, 2 for bad input, or 4 if memory runs out."""
    parser = parser_of("write", __doc__)
    add_words(parser)
    args = parser.parse_args(argv)
    # torch is imported only here, so that --help is instant
    from .images.base import SPLITS
    from .images.beton import INSTALL_HINT, has_ffcv
    from .images.sources import check_alike, find_layout, open_images

    try:
        if Path(args.source).is_dir():
            name = Path(args.source).resolve().name
            name, root = args.dataset or (name if name in DATASETS else "imagefolder"), args.source
        elif args.source in DATASETS:
            name, root = args.source, args.root
        else:
            raise InputError(f"{args.source}: neither a folder nor one of {', '.join(DATASETS)}")
        if args.jpeg is not None and not 1 <= args.jpeg <= 100:
            raise InputError(f"--jpeg {args.jpeg}: a quality of 1 to 100 is allowed")
        if args.size is not None and not 8 <= args.size <= 1024:
            raise InputError(f"--size {args.size}: 8 to 1024 pixels are allowed")
        if name not in DATASETS:
            raise InputError(f"--dataset {name}: one of {', '.join(DATASETS)} is allowed")
        dataset = find_dataset(name)
        if dataset.views != "images":
            raise InputError(f"{name}: betons hold images, not {dataset.views}")
        layout = find_layout(dataset, root)
        if layout.betons:
            raise InputError(f"{root}: holds betons already")
        if layout.alone:
            raise InputError(f"{root}: needs train/ and test/ (or val/)")
        if not has_ffcv():
            raise InputError(f"writing betons needs ffcv; {INSTALL_HINT}")
        images = {split: open_images(dataset, layout, split, args.download, args.size) for split in SPLITS}
        check_alike(layout, images)
        if not images["train"].classes:
            raise InputError(f"{root}: has no folders of classes, which betons need")
        for split in SPLITS:
            path = args.out / f"{split}.beton"
            sidecar = write_beton(images[split], path, split=split, train=images["train"], jpeg=args.jpeg)
            print(f"{path}: {sidecar.count} images of {name}, {sidecar.file_size / 1e6:.1f} MB")
    except (InputError, OSError) as error:
        raise InputError(str(error)) from None  # without the name of a setting, since this command has none
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print("out of memory; use smaller images; finished betons are kept", file=sys.stderr)
        return MACHINE_FAILED
    return DONE


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes."""
    parser.add_argument("source", help=f"a folder with train/ and test/ (or val/), or one of {', '.join(DATASETS)}")
    parser.add_argument("out", type=Path, help="folder for train.beton and test.beton")
    parser.add_argument("--root", help="folder of the dataset's own files, if SOURCE is its name")
    parser.add_argument("--download", action="store_true", help="let torchvision download what --root lacks")
    parser.add_argument(
        "--size", type=int, metavar="PIXELS", help="bring image files to this height and width, as data.size does"
    )
    parser.add_argument(
        "--jpeg", type=int, metavar="QUALITY", help="store JPEGs instead of pixels, in a fraction of the size"
    )
    parser.add_argument("--dataset", help="dataset in the folder (default: the folder's name, or else imagefolder)")


if __name__ == "__main__":
    sys.exit(main())
