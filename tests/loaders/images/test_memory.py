"""Reading copies no split as a whole, keeps only the chosen images, and says what helps when memory runs out."""

import contextlib
import hashlib
import resource
import shutil
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import read_images
from PIL import Image

from seqjepa.configs.errors import InputError
from seqjepa.loaders.config import AffineConfig, DataConfig
from seqjepa.loaders.images import base, find_dataset
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.images.resident import enough_memory
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.show import main as show
from seqjepa.loaders.write import main as write

CPU = torch.device("cpu")
FOLDER = find_dataset("imagefolder")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("part", [1, 700, 1 << 23])
def test_statistics_are_those_of_all_pixels_at_once(monkeypatch, part):
    monkeypatch.setattr(base, "PART", part)
    pixels = noise(50, 9, 7, 3) // np.array([1, 3, 50], np.uint8)
    images = Images(FOLDER, pixels, np.zeros(50, np.int64), ["a"])
    mean, std = images.statistics()
    rows = pixels.reshape(-1, 3)
    assert list(mean) == [float(Fraction(sum(column), 255 * len(rows))) for column in rows.T.tolist()]
    np.testing.assert_allclose(std, (rows / 255).std(0), rtol=1e-12)
    assert images.fingerprint() == hashlib.sha256(pixels.tobytes() + bytes(8 * 50)).hexdigest()


def test_constant_channels_have_the_smallest_deviation():
    pixels = np.full((3, 5, 5, 3), [0, 77, 255], np.uint8)
    mean, std = Images(FOLDER, pixels, np.zeros(3, np.int64), ["a"]).statistics()
    assert mean == (0, 77 / 255, 1)
    assert std == (1e-3,) * 3


@pytest.mark.parametrize("question", [Images.statistics, Images.fingerprint])
def test_pixels_are_not_copied_as_a_whole(question):
    pixels = np.zeros((4000, 96, 96, 3), np.uint8)
    tracemalloc.start()
    question(Images(FOLDER, pixels, np.zeros(4000, np.int64), ["a"]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 26e6  # a channel of 8 MiB of pixels, as NumPy counts it in int64; all pixels are 111 MB


@contextlib.contextmanager
def memory_left(size):
    """Within it, this process can take so many bytes more."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 30), ("test", 12)):
        for number, pixels in enumerate(noise(count, 16, 16, 3, seed=count)):
            path = tmp_path / "images" / split / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "images"


def build(root, **settings):
    data = DataConfig(dataset="imagefolder", root=str(root), batch_size=4, **settings)
    return build_loaders(data, AffineConfig(), seed=1, device=CPU)


def test_only_the_subset_is_kept_and_nothing_else_changes(folder):
    whole, part = build(folder), build(folder, train_subset=9, val_subset=5)
    assert part.fingerprint == whole.fingerprint
    assert torch.equal(part.train.mean, whole.train.mean)
    assert torch.equal(part.train.std, whole.train.std)
    assert (len(part.train.images.pixels), len(part.validation.images.pixels)) == (9, 5)
    pixels = read_images("imagefolder", folder).pixels
    seen = 0
    for batch in part.train.epoch(3):
        (theirs, labels, index) = next(whole.train.images.batches([batch.index.numpy()]))
        (ours, *_) = next(part.train.images.batches([batch.index.numpy()]))
        assert np.array_equal(ours.numpy(), pixels[index])
        assert torch.equal(ours, theirs)
        assert torch.equal(batch.labels, labels)
        seen += len(index)
    assert seen == 8


def test_images_larger_than_memory(tmp_path, tiny, refused):
    """Larger steps of accumulation would not help: the images themselves are too many."""
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(np.zeros((3000, 2000, 3), np.uint8)).save(tmp_path / split / "a" / "0.png")
        for number in range(1, 400):
            shutil.copy(tmp_path / split / "a" / "0.png", tmp_path / split / "a" / f"{number}.png")  # of 18 KB
    words = tiny("data.dataset=imagefolder", f"data.root={tmp_path}", "data.batch_size=4", "data.train_subset=null")
    words.append("data.loader=resident")
    with memory_left(4 << 30):
        told = (
            "data.root: 400 images of 2000x3000 pixels are 6.71 GiB, more memory than cpu has left; data.loader=mapped"
        )
        refused(words, told)


@pytest.fixture
def large(tmp_path):
    """A folder of images of 75 MB each, the first of which does not fit what a test leaves."""
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.zeros((5000, 5000, 3), np.uint8)).save(tmp_path / split / "a" / f"{number}.png")
    return tmp_path


def test_one_image_larger_than_memory(large, tiny, refused, capsys):
    folder = ("data.dataset=imagefolder", f"data.root={large}", "data.batch_size=2", "data.train_subset=null")
    told = "data.root: 2 images of 5000x5000 pixels are 0.14 GiB, more memory than cpu has left"
    with memory_left(48 << 20):
        refused(tiny(*folder), told)
        assert show(["configs/smoke.yaml", *folder, "--rows", "2", "--out", str(large / "sheet.png")]) == 2
    assert told in capsys.readouterr().err


def test_writing_betons_of_images_larger_than_memory(large, capsys):
    pytest.importorskip("ffcv")  # which takes some memory itself
    with memory_left(48 << 20):
        assert write([str(large), str(large / "out")]) == 4
    assert capsys.readouterr().err == "out of memory; use smaller images; finished betons are kept\n"
    assert not list((large / "out").iterdir())


def test_every_error_of_missing_memory_is_explained():
    for error in (
        *(MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), RuntimeError("x")),
        *(RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("can't start new thread")),
    ):
        with pytest.raises(RuntimeError if str(error) == "x" else InputError) as caught, enough_memory((8, 2, 2, 3)):
            raise error
        assert str(caught.value) == "x" or "8 images of 2x2 pixels are" in str(caught.value)
