"""Betons: FFCV gives the images that the resident loader gives, and damaged files are refused before it opens them."""

import filecmp
import io
import json
import warnings

import numpy as np
import pytest
import torch
from image_data import read_images
from PIL import Image

from seqjepa.configs.errors import InputError
from seqjepa.loaders.config import AffineConfig, DataConfig, RotationConfig
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.images.beton import BetonImages, has_ffcv, open_beton
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.write import main, write_beton

pytestmark = pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
CPU = torch.device("cpu")
FOLDER = find_dataset("imagefolder")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    out = tmp_path_factory.mktemp("betons")
    assert main(["digits", str(out)]) == 0
    return out


@pytest.fixture
def copied(digits, tmp_path):
    for path in digits.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def loaders(root, loader="auto", batch=64, **settings):
    data = DataConfig(dataset="digits", root=root and str(root), loader=loader, batch_size=batch, val_subset=71)
    return build_loaders(data, AffineConfig(), seed=3, device=CPU, threads=2, **settings)


def same(ours, theirs):
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs) > 0
    for one, other in zip(ours, theirs, strict=True):
        for mine, yours in zip(one, other, strict=True):
            assert mine.dtype == yours.dtype
            assert torch.equal(mine, yours)


@pytest.mark.parametrize("batch", [2, 7, 512])  # 71 test images: the last batch of seven has one
def test_ffcv_and_resident_yield_the_same_batches(digits, batch):
    ffcv, resident = loaders(digits, batch=batch), loaders(None, batch=batch)
    assert (ffcv.kind, resident.kind) == ("ffcv", "resident")
    assert ffcv.fingerprint == resident.fingerprint
    for epoch in (0, 3):
        # kept in lists: a batch that FFCV overwrote would show
        ours = [b for b, _ in zip(ffcv.train.epoch(epoch), range(40), strict=False)]
        theirs = [b for b, _ in zip(resident.train.epoch(epoch), range(40), strict=False)]
        same(ours, theirs)
        same(ffcv.validation.epoch(epoch), resident.validation.epoch(0))


def test_two_processes_and_a_restart(digits):
    ffcv, resident = (loaders(root, rank=1, num_processes=2) for root in (digits, None))
    same(ffcv.train.epoch(1), resident.train.epoch(1))
    for remaining in range(5):  # with three batches left, the reader waits for room to say that it has ended
        left = ffcv.train.epoch(2)
        for _ in range(len(ffcv.train) - remaining):
            next(left)
        left.close()  # an interrupted epoch must neither hang nor disturb the next
    same(ffcv.train.epoch(2, start=5), resident.train.epoch(2, start=5))
    same(ffcv.validation.epoch(0), resident.validation.epoch(0))
    # alone, it reads whole batches, and then its part of them again
    alone = [found.train.restricted(found.train.sampler.indices) for found in (ffcv, resident)]
    same(*(loader.epoch(0) for loader in alone))
    same(*(loader.clean() for loader in alone))
    same(ffcv.train.epoch(1), resident.train.epoch(1))


def test_resident_loader_reads_betons(digits):
    resident = loaders(digits, loader="resident")
    assert resident.kind == "resident"
    same(resident.train.epoch(0), loaders(None).train.epoch(0))


def test_writing_twice_gives_the_same_file(digits, tmp_path):
    assert main(["digits", str(tmp_path)]) == 0
    for name in ("train.beton", "test.beton", "train.beton.json"):
        assert (tmp_path / name).read_bytes() == (digits / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "test.beton",
        "test.beton.json",
        "train.beton",
        "train.beton.json",
    ]


class Samples:
    def __init__(self, pixels, labels):
        self.pixels, self.labels = pixels, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, position):
        return self.pixels[position], int(self.labels[position])


# one image, several pages, pages that are full to the last byte, images larger than FFCV's usual page
@pytest.mark.parametrize("shape", [(1, 1, 1), (700, 90, 70), (6, 1024, 1365), (4, 1024, 2048), (3, 1700, 1701)])
def test_files_equal_those_of_the_writer_in_ffcv(shape, tmp_path):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    labels = np.arange(len(pixels)) % 3
    ours, theirs = tmp_path / "train.beton", tmp_path / "theirs.beton"
    sidecar = write_beton(Images(FOLDER, pixels, labels, ["a", "b", "c"]), ours, split="train")
    fields = {"image": RGBImageField(write_mode="raw"), "label": IntField()}
    page_size = 1 << 23 if pixels[0].nbytes <= 1 << 23 else 1 << 24
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it forks a process that has threads
        writer = DatasetWriter(str(theirs), fields, page_size=page_size, num_workers=1)
        writer.from_indexed_dataset(Samples(pixels, labels))
    assert filecmp.cmp(ours, theirs, shallow=False)
    assert sidecar.file_size == ours.stat().st_size
    store = BetonImages(ours, sidecar, batch_size=2, threads=1, device=CPU)
    order = np.random.default_rng(1).permutation(len(pixels))
    parts = np.split(order, range(2, len(order), 2))
    for (read, classes, _), part in zip(store.batches(parts), parts, strict=True):
        assert np.array_equal(read.numpy(), pixels[part])
        assert np.array_equal(classes.numpy(), labels[part])


def test_betons_of_jpegs_are_read_as_pillow_reads_them(tmp_path, monkeypatch):
    """Smooth images, which JPEGs keep to a few gray levels, on many small pages; FFCV's decoder rounds otherwise."""
    monkeypatch.setattr("seqjepa.loaders.write.PAGE", 1)  # so that a page takes as much as an image's pixels
    rows, columns = np.mgrid[0:90, 0:70]
    waves = [np.sin(rows / (7 + n)) + np.cos(columns / (5 + n)) for n in range(900)]
    pixels = np.stack([np.stack([127 + 60 * w, 127 - 60 * w, 90 + 30 * w], -1).astype(np.uint8) for w in waves])
    images = Images(FOLDER, pixels, np.arange(900) % 3, ["a", "b", "c"])
    plain = write_beton(images, tmp_path / "plain.beton", split="train")
    sidecar = write_beton(images, path := tmp_path / "train.beton", split="train", jpeg=90)
    assert sidecar.file_size < plain.file_size / 4
    assert sidecar.pixels_sha256 != plain.pixels_sha256
    store = BetonImages(path, sidecar, batch_size=64, threads=1, device=CPU)
    parts = np.split(np.random.default_rng(1).permutation(900), range(64, 900, 64))
    for (read, classes, _), part in zip(store.batches(parts), parts, strict=True):
        assert np.array_equal(classes.numpy(), images.labels[part])
        for ours, position in zip(read.numpy().astype(int), part, strict=True):
            buffer = io.BytesIO()
            Image.fromarray(pixels[position]).save(buffer, "JPEG", quality=90)
            assert abs(ours - np.asarray(Image.open(buffer)).astype(int)).max() <= 8
            assert abs(ours - pixels[position].astype(int)).mean() < 3


def test_images_that_ffcv_cannot_describe_are_refused_before_anything_is_written(tmp_path):
    pixels = np.broadcast_to(np.uint8(0), (2, 1, 2**16, 3))
    with pytest.raises(InputError, match="images are 65536x1, a beton takes at most 65535 pixels a side"):
        write_beton(Images(FOLDER, pixels, np.zeros(2, int), ["a"]), tmp_path / "out/train.beton", split="train")
    assert not (tmp_path / "out").exists()


def test_sidecar_describes_the_file(digits):
    _, sidecar = open_beton(digits, find_dataset("digits"), "test")
    images = read_images("digits", None, "test")
    assert sidecar.count == len(images.labels) == 359
    assert sidecar.image_size == [24, 24]
    assert sidecar.file_size == (digits / "test.beton").stat().st_size
    assert sidecar.pixels_sha256 == images.fingerprint()


def refuse(root, match):
    with pytest.raises(InputError, match=match) as caught:
        loaders(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lie", "match"),
    [
        ({"count": 10**6}, "holds 1438 images, its sidecar says 1000000"),
        ({"count": 1000}, "holds 1438 images, its sidecar says 1000"),
        ({"split": "test"}, "says that it is the test split"),
        ({"version": 99}, "has version 99; only 1 can be read"),
        ({"image_size": []}, "no image size"),
        ({"mean": [0.5] * 7}, "not three numbers each"),
        ({"std": [0.5, 0.5, 0.0]}, "a std is not above 0"),
    ],
)
def test_a_sidecar_that_contradicts_its_beton_is_refused(copied, lie, match):
    path = copied / "train.beton.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | lie))
    refuse(copied, match)


def test_test_images_do_not_pass_for_training_images(copied):
    for name in ("beton", "beton.json"):
        (copied / f"train.{name}").write_bytes((copied / f"test.{name}").read_bytes())
    refuse(copied, "says that it is the test split")


def test_a_beton_of_another_name_is_refused(copied):
    (copied / "mine.beton").write_bytes(b"rubbish")
    refuse(copied / "mine.beton", r"mine\.beton: betons are read as a pair")


def test_truncated_and_damaged_betons_are_refused(copied):
    whole = (copied / "train.beton").read_bytes()
    (copied / "train.beton").write_bytes(whole[:-4096])
    refuse(copied, "bytes, its sidecar says")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    (copied / "train.beton").write_bytes(flipped)
    refuse(copied, "damaged, its checksum differs")


def test_missing_betons_and_those_of_other_datasets_are_refused(copied):
    sidecar = copied / "train.beton.json"
    text = sidecar.read_text()
    sidecar.write_text(json.dumps(json.loads(text) | {"source": "mnist"}))
    refuse(copied, "holds mnist, data.dataset is digits")
    sidecar.write_text("{}")
    refuse(copied, "not a sidecar")
    sidecar.unlink()
    refuse(copied, "train.beton.json: missing")
    sidecar.write_text(text)
    (copied / "test.beton").unlink()
    refuse(copied, "test.beton: missing")


@pytest.mark.parametrize("name", ["train.beton", "train.beton.json", "test.beton"])
def test_unreadable_files_are_refused_by_name(copied, name, monkeypatch, powerless):
    monkeypatch.chdir(copied)
    copied.chmod(0o755)
    (copied / name).chmod(0)
    with powerless(), pytest.raises(InputError) as caught:
        loaders(".")
    assert str(caught.value) == f"{name}: cannot be read (Permission denied)"
    assert caught.value.field == "data.root"


def test_a_file_that_shrinks_under_a_run_is_noticed_at_the_next_epoch(copied):
    train = loaders(copied).train
    same(train.epoch(0), loaders(None).train.epoch(0))
    path = copied / "train.beton"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(InputError, match="100000 bytes"):
        next(train.epoch(1))


def test_asking_for_ffcv_without_betons():
    with pytest.raises(InputError, match=r"data\.root holds none") as caught:
        loaders(None, loader="ffcv")
    assert caught.value.field == "data.loader"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "neither a folder nor one of digits"),
        (["cifar10", "--root", "nowhere"], "no cifar10 there"),
        (["mnist"], "mnist needs a folder"),
        (["digits", "--jpeg", "101"], "--jpeg 101: a quality of 1 to 100 is allowed"),
        (["digits", "--size", "7"], "--size 7: 8 to 1024 pixels are allowed"),
        (["digits", "--size", "32"], "digits is read as it is"),
    ],
)
def test_writer_refuses_in_one_line(words, message, tmp_path, capsys):
    assert main([words[0], str(tmp_path / "out"), *words[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.realdata
def test_real_cifar_through_both_loaders(data_root, tmp_path):
    source = data_root / "cifar10"
    assert main([str(source), str(tmp_path)]) == 0

    def build(root):
        data = DataConfig(dataset="cifar10", root=str(root), batch_size=50, train_subset=500)
        return build_loaders(data, RotationConfig(), seed=1, device=CPU, threads=2)

    ffcv, resident = build(tmp_path), build(source)
    assert (ffcv.kind, resident.kind) == ("ffcv", "resident")
    same(ffcv.train.epoch(0), resident.train.epoch(0))
    same(ffcv.validation.epoch(0), resident.validation.epoch(0))
    assert np.concatenate([b.labels for b in ffcv.train.epoch(0)]).std() > 1


@pytest.mark.gpu
def test_gpu_batches_survive_a_busy_stream(digits):
    """The host runs ahead of the device: FFCV must not overwrite what is still to be copied."""
    data = DataConfig(dataset="digits", root=str(digits), batch_size=16)
    ffcv = build_loaders(data, AffineConfig(), seed=3, device=torch.device("cuda"), threads=2).train.images
    parts = np.split(np.arange(1280), 80)
    torch.cuda._sleep(1_000_000_000)
    ours = list(ffcv.batches(parts))
    expected = read_images("digits", None).pixels
    for (pixels, _, index), part in zip(ours, parts, strict=True):
        assert np.array_equal(index.cpu().numpy(), part)
        assert np.array_equal(pixels.cpu().numpy(), expected[part])
