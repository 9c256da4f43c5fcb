"""Whatever a folder of images contains is read, passed over with a message, or refused by the file's name."""

import os
import shutil
import struct
import warnings
import zlib

import numpy as np
import pytest
from image_data import read_images, write_images
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from seqjepa.configs.compose import dump
from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.engine.train import main
from seqjepa.loaders.images.beton import Sidecar
from seqjepa.loaders.images.folder import EXTENSIONS, list_images


def read(root, split="train"):
    return read_images("imagefolder", root, split)


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(folder, mode):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (16, 16, 3), np.uint8)).convert("RGB")
    suffix = {"CMYK": "tif", "YCbCr": "tif"}.get(mode, "png")
    image = image.convert(mode)
    (folder / "train" / "cat" / "0.png").unlink()
    image.save(path := folder / "train" / "cat" / f"0.{suffix}")
    try:
        with Image.open(path) as back:
            back.load()
    except OSError as error:  # Pillow 12.3 with a YCbCr TIFF of its own
        pytest.skip(f"Pillow cannot read what it wrote: {error}")
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
    assert f"{folder / 'train'}: 6 images; 4 other file(s) passed over: " in (said := capsys.readouterr().err)
    assert said.count("\n") == 1
    read(folder, "test")
    assert capsys.readouterr().err == ""


def test_ordinary_folders_are_listed_as_torchvision_does(tmp_path):
    """Names whose order depends on how it is defined: by bytes, by folder, with or without the separator."""
    for path in (
        *("b/2.png", "b/10.png", "b/1.PNG", "b/sub/0.JPeG", "b/sub-2/0.webp", "b/sub/deep/0.tiff", "b/Z.pgm"),
        *("B/x.bmp", "B/.kept/../y.jpg", "a-1/0.png", "a/0.png", "ä/0.png", "a b/0.tif", "10/0.ppm", "9/0.png"),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"")
    os.rmdir(tmp_path / "B" / ".kept")
    os.rename(tmp_path / "9", os.fsencode(tmp_path) + b"/\xff")
    elsewhere = tmp_path.parent / "elsewhere"
    (elsewhere / "more").mkdir(parents=True)
    for name in ("0.png", "more/0.png"):
        (elsewhere / name).write_bytes(b"")
    (tmp_path / "linked").symlink_to(elsewhere)
    (tmp_path.parent / "lone.png").write_bytes(b"")
    (tmp_path / "b" / "single.png").symlink_to(tmp_path.parent / "lone.png")
    theirs = ImageFolder(tmp_path)
    classes, paths, labels = list_images(tmp_path)
    assert classes == theirs.classes
    assert list(zip(paths, labels.tolist(), strict=True)) == theirs.samples
    assert EXTENSIONS == IMG_EXTENSIONS


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", ".thumbnails", "#recycle", "lost+found"])
def test_copies_kept_by_programs_are_passed_over_and_counted(folder, capsys, name):
    """As folders within a class, within a folder of it, and beside the classes."""
    expected = read(folder).fingerprint()
    for place in ("train/cat", "train/dog/more", "train", "test"):
        (folder / place / name / "deep").mkdir(parents=True)
        for number in range(2):
            shutil.copy(folder / "test" / "cat" / "0.png", folder / place / name / "deep" / f"{number}.png")
    shutil.move(folder / "train" / "dog" / "2.png", folder / "train" / "dog" / "more")
    for sidecar in ("cat/._0.png", "cat/.DS_Store", "dog/more/Thumbs.db", "._3.png"):
        (folder / "train" / sidecar).write_bytes(b"\0\5\x16\7")
    capsys.readouterr()
    images = read(folder)
    assert images.classes == ["cat", "dog"]
    assert images.fingerprint() == expected
    said = capsys.readouterr().err
    assert said.startswith(f"{folder / 'train'}: 6 images; 10 other file(s) passed over: ")
    assert said.count("\n") == 1
    assert read(folder, "test").classes == ["cat", "dog"]
    assert f"{name}/deep/0.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/cat/self", "."),
        ("train/cat/up", ".."),
        ("train/cat/root", "../.."),
        ("train/dog/disk", "/"),
        ("train/cat/more/back", "../../cat"),
        ("train/dog/one", "more"),
    ],
)
def test_links_that_lead_back_are_passed_over_and_counted(folder, capsys, link, target):
    for name in ("cat", "dog"):
        (folder / "train" / name / "more").mkdir()
        shutil.copy(folder / "test" / name / "0.png", folder / "train" / name / "more")
    expected = sorted(read(folder).labels.tolist())
    assert expected == [0] * 4 + [1] * 4
    assert capsys.readouterr().err == ""
    (folder / link).symlink_to(target)
    assert sorted(read(folder).labels.tolist()) == expected
    said = capsys.readouterr().err
    assert "8 images; 1 other file(s) passed over: " in said
    assert str(folder / "train") in said
    assert " (again " in said


def test_a_folder_in_two_classes_is_refused(folder):
    """Two links that lead to each other's classes would give every image both labels."""
    (folder / "train" / "cat" / "x").symlink_to("../dog")
    (folder / "train" / "dog" / "y").symlink_to("../cat")
    with pytest.raises(InputError, match=r"cat.* one folder in two classes, by a link") as caught:
        read(folder)
    assert "dog" in str(caught.value)
    (folder / "train" / "cat" / "x").unlink()
    (folder / "train" / "dog" / "y").unlink()
    (folder / "train" / "bird").symlink_to("cat")
    with pytest.raises(InputError, match=r"cat and .*bird: one folder in two classes"):
        read(folder)


def test_images_that_links_repeat_are_counted(folder, capsys):
    """Some repeat images on purpose, to balance classes: they are trained on, and it is said."""
    (folder / "train" / "cat" / "again.png").symlink_to("0.png")
    os.link(folder / "train" / "dog" / "1.png", folder / "train" / "dog" / "hard.png")
    assert len(read(folder).labels) == 8
    assert capsys.readouterr().err == f"{folder / 'train'}: 8 images; 2 of them repeat another by a link\n"


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_an_image_in_two_classes_is_refused(folder, link):
    link(folder / "train" / "dog" / "1.png", folder / "train" / "cat" / "x.png")
    with pytest.raises(InputError, match=r"dog/1\.png and .*cat/x\.png: one image in two classes, by a link"):
        read(folder)


@pytest.mark.parametrize(
    ("link", "target", "shared", "first"),
    [
        ("test", "train", 6, "test/cat/0.png"),
        ("test/cat", "../train/cat", 3, "test/cat/0.png"),
        ("train/cat/test", "../../test/cat", 3, "test/cat/0.png"),
        ("train/dog/x.png", "../../test/dog/2.png", 1, "test/dog/2.png"),
        ("test/dog/x.png", "../../train/dog/0.png", 1, "test/dog/x.png"),
    ],
)
def test_test_images_that_are_training_images_are_refused(folder, tiny, refused, link, target, shared, first):
    """Numbers on images that were trained on would say nothing of others."""
    if (folder / link).is_dir():
        shutil.rmtree(folder / link)
    (folder / link).symlink_to(target)
    words = tiny("data.dataset=imagefolder", f"data.root={folder}", "data.train_subset=null", "data.batch_size=4")
    refused(words, f"data.root: {folder}/{first}: {shared} test images are training images, by a link")


def test_copies_in_both_splits_are_not_taken_for_links(folder, tmp_path, capsys):
    """Data sets of a few pixels have equal images; hard links are one, and betons of them are not written."""
    pytest.importorskip("ffcv")
    from seqjepa.loaders.write import main as write

    image, out = folder / "test" / "cat" / "x.png", tmp_path / "out"
    shutil.copy(folder / "train" / "cat" / "0.png", image)
    assert write([str(folder), str(out / "copies")]) == 0
    image.unlink()
    os.link(folder / "train" / "cat" / "0.png", image)
    capsys.readouterr()
    assert write([str(folder), str(out / "links")]) == 2
    assert capsys.readouterr().err == f"error: {image}: 1 test images are training images, by a link\n"
    assert not (out / "links").exists()


UNPRIVILEGED = """
import os, sys
from PIL import PngImagePlugin
from seqjepa.configs.errors import InputError
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.sources import find_layout, open_images
dataset = find_dataset("imagefolder")
os.chdir(sys.argv[1])
if os.getuid() == 0:
    os.setuid(65534)
for root in sys.argv[2:]:
    try:
        print(len(open_images(dataset, find_layout(dataset, root), "train").pixels[:]), "images")
    except InputError as error:
        print(error)
"""


def test_unreadable_files_and_folders_are_refused_by_name(folder, run_process, python):
    """Read by another user, because root may read everything."""
    names = ["0/train/cat/more", "1/train/dog", "2/train", "3/train/cat/0.png", "4"]
    for number, name in enumerate(names):
        copy = shutil.copytree(folder, folder.parent / str(number))
        (copy / "train" / "cat" / "more").mkdir()
        os.chmod(folder.parent / name, 0)
    os.chmod(folder.parent, 0o755)
    result = run_process(python, "-c", UNPRIVILEGED, str(folder.parent), *map(str, range(len(names))))
    for name in names:
        os.chmod(folder.parent / name, 0o755)
    lines = result.stdout.splitlines()
    assert len(lines) == len(names), result.stderr
    for name, line in zip(names, lines, strict=True):
        assert line.startswith(f"{name}: "), line
        assert line.endswith(": cannot be read (Permission denied)")


def test_links_to_nothing_and_what_is_no_file_are_refused_by_name(folder):
    strange = folder / "train" / "cat" / "x.png"

    for make in (lambda path: path.symlink_to("nowhere"), os.mkfifo, lambda path: path.symlink_to("x.png")):
        make(strange)
        with pytest.raises(InputError, match=r"cat/x\.png: (neither a file nor a folder|cannot be read)"):
            read(folder)
        strange.unlink()
    (folder / "train" / "bird").symlink_to("nowhere")  # a whole class, on a disk that is not there
    with pytest.raises(InputError, match=r"train/bird: neither a file nor a folder, or a link that leads nowhere"):
        read(folder)


def test_classes_without_images_and_splits_that_differ_are_refused(folder, tiny, refused):
    def words():
        return tiny("data.dataset=imagefolder", f"data.root={folder}", "data.train_subset=null", "data.batch_size=4")

    (folder / "train" / "bird").mkdir()
    refused(words(), f"{folder}/train/bird: holds no image; .jpg, .jpeg, .png")
    shutil.copy(folder / "test" / "cat" / "0.png", folder / "train" / "bird")
    refused(words(), f"{folder}: train and test differ in classes: train alone has bird")
    shutil.rmtree(folder / "train" / "bird")
    shutil.rmtree(folder / "train" / "cat")
    refused(words(), f"{folder}: train and test differ in classes: test alone has cat")
    shutil.rmtree(folder / "train" / "dog")
    refused(words(), f"{folder}/train: holds neither folders of classes nor images")


def test_betons_are_written_of_the_same_images_or_refused_in_the_same_words(folder, tmp_path, capsys):
    pytest.importorskip("ffcv")
    from seqjepa.loaders.write import main as write

    hidden = folder / "train" / "cat" / ".ipynb_checkpoints"
    hidden.mkdir()
    shutil.copy(folder / "train" / "cat" / "0.png", hidden)
    for split in ("train", "test"):
        os.rename(folder / split / "dog", os.fsencode(folder / split) + b"/dog\xff")
    expected = read(folder)
    told = capsys.readouterr().err
    assert "6 images; 1 other file(s) passed over: " in told
    assert write([str(folder), str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == told
    sidecar = Sidecar.read(tmp_path / "out" / "train.beton.json")
    assert sidecar.pixels_sha256 == expected.fingerprint()
    assert sidecar.classes == ["cat", r"dog\xff"]
    (folder / "test" / "bird").symlink_to("cat")
    with pytest.raises(InputError) as caught:
        read(folder, "test")
    assert write([str(folder), str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err == f"{told}error: {caught.value}\n"
    assert not (tmp_path / "other").exists()


def test_unicode_deep_and_undecodable_paths(tmp_path):
    deep = tmp_path.joinpath(*["ordner"] * 30, "bilder 🐈 ü")
    write_images(deep, count=2, classes=("猫", "собака"))
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
    root = write_images(tmp_path / "images", count=20, classes=("cat",))
    words = ("data.dataset=imagefolder", f"data.root={root}", "data.train_subset=null", "data.batch_size=8")
    assert main(tiny(*words)) == 0


def test_images_of_one_pixel(tiny, tmp_path, refused, capsys):
    root = write_images(tmp_path / "images", count=4, size=(1, 1))
    words = ("data.dataset=imagefolder", f"data.root={root}", "data.train_subset=null", "data.batch_size=4")
    refused(tiny(*words), "data.root: images are 1x1, sequence.kind=affine needs two rows and columns")
    assert main(tiny(*words, "sequence.kind=augment", "run.epochs=1", "diagnostics.every=1")) == 0
    assert "no sweeps" not in capsys.readouterr().out
    assert (tmp_path / "run" / "figures" / "sweep_traj_brightness.png").exists()


def test_fewer_images_than_a_batch(tiny, tmp_path, refused):
    root = write_images(tmp_path / "images")
    words = ("data.dataset=imagefolder", f"data.root={root}", "data.train_subset=null", "data.val_subset=null")
    refused(tiny(*words), "data.batch_size: 32 is larger than the 6 training images")


def test_gates_of_a_data_set_do_not_judge_a_folder(tmp_path):
    """The name of a task comes from the file that says what its views are; the images may be one's own."""
    words = ["configs/data/cifar100_aug.yaml", "configs/tier/quick.yaml"]
    assert compose(words).config.active_rules
    for dataset in ("imagefolder", "cifar10", "mnist"):
        config = compose([*words, f"data.dataset={dataset}"]).config
        assert config.data.name == f"{dataset}_aug"
        assert config.active_rules == []
        (tmp_path / "config.yaml").write_text(dump(config))
        assert compose([str(tmp_path / "config.yaml")]).config == config
    own = compose([*words, "data.dataset=imagefolder", "data.name=birds", "gates.rules.birds=[{metric: a, min: 1}]"])
    assert own.config.data.name == "birds"
    assert len(own.config.active_rules) == 1
