"""Write betons for FFCV: `python -m seqjepa.loaders.write SOURCE OUT`.

SOURCE is `digits`; or a folder with train/ and test/ of class folders; or `cifar10`, `cifar100`, `mnist` in
torchvision's own layout under --root. OUT receives train.beton and test.beton, each with a sidecar that describes it.
"""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..configs.cli import DONE, MACHINE_FAILED, command
from ..configs.errors import InputError
from ..configs.files import file_sha256

if TYPE_CHECKING:
    from .beton import Sidecar
    from .sources import Images

__all__ = ["main", "write_beton"]

PAGE = 1 << 23  # bytes: FFCV's files grow by pages, none of which an image may cross
LARGEST_SIDE = 2**16 - 1  # FFCV keeps it in 16 bits


def write_beton(
    images: Images, path: Path, *, split: str, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Sidecar:
    """Write a split as a beton with its sidecar; both appear whole or not at all.

    Args:
        images: the split, which is read part by part.
        path: NAME.beton.
        split: train or test.
        mean: of the training pixels, one a channel, in [0, 1]; None takes those of the split.
        std: likewise.

    Raises:
        InputError: the images are larger than FFCV can store.
    """
    from .beton import Sidecar, sidecar_path
    from .sources import Tally

    count, height, width, _ = images.shape
    if max(height, width) > LARGEST_SIDE:
        raise InputError(f"images are {width}x{height}, a beton takes at most {LARGEST_SIDE} pixels a side")
    frame = _frame(images.shape, images.labels)
    file_size = frame.end + len(frame.tail)
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < file_size:
        needed = f"{file_size >> 20} MiB are needed, {free >> 20} are free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed}", str(path))
    partial, tally = path.with_name(f".{path.name}.partial-{os.getpid()}"), Tally(images.dataset)
    try:
        with partial.open("wb") as file:
            file.write(frame.head)
            places = iter(frame.places.tolist())
            for part in images.parts():
                tally.add(part)
                for image in part:
                    file.write(bytes(next(places) - file.tell()))  # zeros, up to the image's place
                    file.write(np.ascontiguousarray(image))
            file.write(bytes(frame.end - file.tell()))
            file.write(frame.tail)
            file.flush()
            os.fsync(file.fileno())
        own_mean, own_std = tally.statistics()
        sidecar = Sidecar(
            source=images.dataset,
            split=split,
            count=count,
            image_size=[height, width],
            classes=[os.fsencode(name).decode(errors="backslashreplace") for name in images.classes],  # JSON is text
            mean=list(mean or own_mean),
            std=list(std or own_std),
            pixels_sha256=tally.fingerprint(images.labels),
            file_size=file_size,
            file_sha256=file_sha256(partial),
        )
        sidecar.write(sidecar_path(partial))
        # the old sidecar goes first: a beton without one is refused, one with another's would be believed
        sidecar_path(path).unlink(missing_ok=True)
        os.replace(partial, path)
        os.replace(sidecar_path(partial), sidecar_path(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        partial.unlink(missing_ok=True)
        sidecar_path(partial).unlink(missing_ok=True)
    return sidecar


class _Frame(NamedTuple):
    """What stands around the images in a file of FFCV, byte for byte as its own writer has it.

    That writer hands each image to a process of its own, which it would wait for in vain when a disk is full.
    """

    head: bytes
    places: np.ndarray  # of the images, int64 [N]
    end: int  # of the images' pages
    tail: bytes


def _frame(shape: tuple[int, ...], labels: np.ndarray) -> _Frame:
    """Header, fields, what is known of each sample; pages of images; table of where each image is."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )

    count, height, width, _ = shape
    size = height * width * 3
    page = max(PAGE, 1 << (size - 1).bit_length())
    header = np.zeros(1, HeaderType)
    fields = np.zeros(2, FieldDescType)
    samples = np.zeros(count, get_metadata_type([RGBImageField(), IntField()]))
    begin = -(-(header.nbytes + fields.nbytes + samples.nbytes) // page) * page
    pages, slots = np.divmod(np.arange(count), page // size)
    places, end = begin + pages * page + slots * size, begin + (int(pages[-1]) + 1) * page
    header["version"], header["num_fields"], header["num_samples"] = CURRENT_VERSION, len(fields), count
    header["page_size"], header["alloc_table_ptr"] = page, end
    numbers = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    for field, name, kind in zip(fields, (b"image", b"label"), (RGBImageField, IntField), strict=True):
        field["type_id"] = numbers[kind]
        field["name"][: len(name)] = list(name)
    image = samples["f0"]
    image["mode"], image["height"], image["width"], image["data_ptr"] = IMAGE_MODES["raw"], height, width, places
    samples["f1"] = labels
    table = np.zeros(count, ALLOC_TABLE_TYPE)
    table["sample_id"], table["ptr"], table["size"] = np.arange(count), places, size
    return _Frame(header.tobytes() + fields.tobytes() + samples.tobytes(), places, end, table.tobytes())


def _parse(argv: list[str]) -> argparse.Namespace:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(prog="python -m seqjepa.loaders.write", description=summary, epilog=details)
    parser.add_argument("source", help="digits, cifar10, cifar100, mnist, or a folder with train/ and test/")
    parser.add_argument("out", type=Path, help="folder for train.beton and test.beton")
    parser.add_argument("--root", help="folder of torchvision's files, for cifar10, cifar100 and mnist")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch what --root lacks")
    parser.add_argument("--dataset", help="what a folder holds (default: its name, if that is a known dataset)")
    return parser.parse_args(argv)


@command("what was finished is written, nothing by halves")
def main(argv: list[str]) -> int:
    """Command line; returns 0, 2 for bad input, or 4 for want of memory."""
    args = _parse(argv)
    # torch is imported from here on: --help answers at once
    from .beton import INSTALL_HINT, has_ffcv
    from .sources import SHAPES, SPLITS, check_alike, find_layout, lacks_memory, open_images

    try:
        if not has_ffcv():
            raise InputError(f"writing betons needs ffcv; {INSTALL_HINT}")
        if Path(args.source).is_dir():
            name = Path(args.source).resolve().name
            dataset, root = args.dataset or (name if name in SHAPES else "imagefolder"), args.source
        elif args.source in SHAPES:
            dataset, root = args.source, args.root
        else:
            raise InputError(f"{args.source}: neither a folder nor one of {', '.join(SHAPES)}")
        if dataset not in SHAPES and dataset != "imagefolder":
            raise InputError(f"--dataset {dataset}: one of {', '.join(SHAPES)}, imagefolder is allowed")
        layout = find_layout(dataset, root)
        if layout.kind == "beton":
            raise InputError(f"{root}: holds betons already")
        images = {split: open_images(dataset, layout, split, args.download) for split in SPLITS}
        check_alike(layout.root, images)
        mean = std = None
        for split, part in images.items():
            path = args.out / f"{split}.beton"
            sidecar = write_beton(part, path, split=split, mean=mean, std=std)
            mean, std = sidecar.mean, sidecar.std  # of the training images, which come first
            print(f"{path}: {sidecar.count} images of {dataset}, {sidecar.file_size / 1e6:.1f} MB")
    except (InputError, OSError) as error:
        raise InputError(str(error)) from None  # without the name of a setting, which this command has not
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        print("out of memory; smaller images need less; what was finished is written", file=sys.stderr)
        return MACHINE_FAILED
    return DONE


if __name__ == "__main__":
    sys.exit(main())
