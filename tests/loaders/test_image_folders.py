"""What a folder of images may hold: handled, or refused by the file's name; nothing passed over in silence."""

import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from seqjepa.engine.train import main
from seqjepa.loaders import InputError
from seqjepa.loaders.sources import find_layout, read_images


def write(root, count=20, classes=("cat", "dog"), size=(16, 16)):
    pixels = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(pixels.integers(0, 256, (*size, 3), np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


def read(root, split="train"):
    return read_images("imagefolder", find_layout("imagefolder", str(root)), split)


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "images", count=3)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(folder, mode):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)).convert("RGB")
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    image = image.convert(mode)
    (folder / "train" / "cat" / "0.png").unlink()
    image.save(folder / "train" / "cat" / f"0.{suffix}")
    assert np.array_equal(read(folder).pixels[0], np.asarray(image.convert("RGB")))


def test_zero_bytes_and_rubbish_are_refused_by_name(folder):
    for content in (b"", b"no image", (folder / "train" / "dog" / "0.png").read_bytes()[:60]):
        (folder / "train" / "dog" / "1.png").write_bytes(content)
        with pytest.raises(InputError, match=r"dog/1\.png: not a readable image"):
            read(folder)


def png(width, height, rows=b"", bits=8, colour=2):
    """A PNG that says it is of this size."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [10_000, 60_000])
def test_huge_images_are_refused_before_they_are_unpacked(folder, side, capsys):
    (folder / "train" / "cat" / "0.png").write_bytes(png(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(InputError, match=r"cat/0\.png: .*up to 89 million pixels are read"):
            read(folder)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_are_refused_by_name(folder, colour, channels):
    """Pillow would cut those of colours to eight without a word."""
    (folder / "train" / "cat" / "0.png").write_bytes(
        png(16, 16, (b"\0" + b"\x12\x34" * 16 * channels) * 16, 16, colour)
    )
    with pytest.raises(InputError, match=r"cat/0\.png: \S+ pixels; 8 bits a channel are allowed"):
        read(folder)
    (folder / "train" / "cat" / "0.png").write_bytes(b"P6 16 16 65535\n" + b"\x12\x34" * 3 * 256)
    with pytest.raises(InputError, match=r"cat/0\.png: RGB pixels; 8 bits a channel are allowed"):
        read(folder)


def test_no_program_is_started_for_an_image(folder, tmp_path, monkeypatch):
    """PostScript under another name: Pillow would call Ghostscript."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"
    (folder / "train" / "cat" / "0.png").write_bytes(page)
    with pytest.raises(InputError, match=r"cat/0\.png: not a readable image"):
        read(folder)
    assert not (tmp_path / "called").exists()


def test_other_files_are_counted(folder, capsys):
    for name in ("notes.txt", "cat/.DS_Store", "cat/film.mp4", "list.csv"):
        (folder / "train" / name).write_text("x")
    assert len(read(folder).labels) == 6
    assert f"{folder / 'train'}: 6 images; 4 other files passed over: " in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    read(folder, "test")
    assert capsys.readouterr().err == ""


def test_unicode_deep_and_undecodable_paths(tmp_path):
    deep = tmp_path.joinpath(*["ordner"] * 30, "bilder 🐈 ü")
    write(deep, count=2, classes=("猫", "собака"))
    images = read(deep)
    assert images.classes == sorted(["猫", "собака"])
    os.rename(deep / "train" / "猫" / "0.png", os.fsencode(deep / "train" / "猫") + b"/\xff\xfe.png")
    assert len(read(deep).labels) == 4


def test_a_broken_file_with_an_undecodable_name_is_one_line(tiny, tmp_path, folder, capfd):
    with open(os.fsencode(folder / "train" / "cat") + b"/\xff.png", "wb"):
        pass
    words = tiny("data.dataset=imagefolder", f"data.root={folder}", "data.train_subset=null", "data.batch_size=4")
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "\\udcff.png': not a readable image" in error


def test_one_class_only(tiny, tmp_path):
    root = write(tmp_path / "images", classes=("cat",))
    words = ("data.dataset=imagefolder", f"data.root={root}", "data.train_subset=null", "data.batch_size=8")
    assert main(tiny(*words, "gates.rules.digits_affine=[]")) == 0


def test_fewer_images_than_a_batch(tiny, tmp_path, refused):
    root = write(tmp_path / "images", count=3)
    words = ("data.dataset=imagefolder", f"data.root={root}", "data.train_subset=null", "data.val_subset=null")
    refused(tiny(*words), "data.batch_size: 32 is larger than the 6 training images")
