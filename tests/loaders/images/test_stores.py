"""Images on the device, in a memory-mapped file and in image files: the same batches, shared and bounded memory."""

import errno
import importlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from image_data import read_images, write_images
from PIL import ExifTags, Image, PngImagePlugin

from seqjepa.configs.errors import InputError
from seqjepa.engine.runtime.failures import explain
from seqjepa.loaders.config import AffineConfig, DataConfig
from seqjepa.loaders.images import find_dataset, stores
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.images.cache import Cache
from seqjepa.loaders.images.files import ImageFiles
from seqjepa.loaders.images.host import HostImages
from seqjepa.loaders.images.sources import find_layout, open_images
from seqjepa.loaders.loader import build_loaders

CPU = torch.device("cpu")
FOLDER = find_dataset("imagefolder")


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", count=15, size=(24, 32))


@pytest.fixture
def build(folder, tmp_path):
    def loaders(**settings):
        settings = {"root": str(folder), "size": 16, "batch_size": 8, "cache": str(tmp_path / "cache")} | settings
        return build_loaders(DataConfig(dataset="imagefolder", **settings), AffineConfig(), seed=3, device=CPU)

    return loaders


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("settings", [{}, {"train_subset": 11}, {"held_out": 9}, {"val_subset": 5}])
def test_each_store_yields_the_same_batches(build, settings):
    first, *others = (build(loader=kind, **settings) for kind in ("resident", "mapped", "files"))
    assert [loaders.kind for loaders in (first, *others)] == ["resident", "mapped", "files"]
    for other in others:
        assert other.fingerprint == first.fingerprint
        for split in ("train", "validation"):
            mine, theirs = getattr(first, split), getattr(other, split)
            assert same((mine.mean, mine.std), (theirs.mean, theirs.std))
            for epoch in (0, 2):
                pairs = zip(mine.epoch(epoch, 1), theirs.epoch(epoch, 1), strict=True)
                assert all(same(a, b) for a, b in pairs)
            assert all(same(a, b) for a, b in zip(mine.clean(), theirs.clean(), strict=True))


def test_an_epoch_can_be_left_and_begun_again(build):
    loader = build(loader="files").train
    whole = [batch.index for batch in loader.epoch(1)]
    epoch = loader.epoch(1)
    assert torch.equal(next(epoch).index, whole[0])
    epoch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]
    assert all(torch.equal(a.index, b) for a, b in zip(loader.epoch(1), whole, strict=True))


def test_the_mapped_file_is_written_once_and_again_after_changes(folder, build, tmp_path, monkeypatch):
    build(loader="mapped")
    decoded = []
    monkeypatch.setattr(ImageFiles, "decode", lambda self, positions, out: decoded.append(len(positions)))
    build(loader="mapped")
    assert not decoded
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    build(loader="mapped", cache=str(tmp_path / "elsewhere"))
    assert not decoded
    os.utime(folder / "train" / "cat" / "0.png", ns=(0, 10**18))  # as if another image had taken its place
    build(loader="mapped", cache=str(tmp_path / "elsewhere"))
    assert decoded == [30]
    build(loader="mapped", cache=str(tmp_path / "elsewhere"), size=20)
    assert decoded == [30, 30, 30]


def test_a_mapped_file_that_was_changed_is_not_believed(build, tmp_path):
    right = next(iter(build(loader="mapped").train.epoch(0)))
    for path in (tmp_path / "cache").glob("*.npy"):
        with path.open("r+b") as file:
            file.truncate(1000)
    assert same(next(iter(build(loader="mapped").train.epoch(0))), right)
    for path in (tmp_path / "cache").glob("*.json"):
        path.write_text(path.read_text()[:30])
    assert same(next(iter(build(loader="mapped").train.epoch(0))), right)


def test_a_killed_writer_leaves_nothing_that_is_believed(folder, tmp_path):
    """What a process leaves in the middle of a file; the lock went with it."""
    images = read_images("imagefolder", folder)
    path = Cache(str(tmp_path / "whole")).map(images)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / path.with_suffix(".partial").name).write_bytes(path.read_bytes()[:500])
    again = read_images("imagefolder", folder)
    assert Cache(str(tmp_path / "killed")).map(again).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "killed").glob("*.partial"))


def test_files_are_measured_once(build, monkeypatch):
    first = build(loader="files")
    monkeypatch.setattr(ImageFiles, "__getitem__", lambda *_: pytest.fail("an image was read"))
    assert build(loader="files").fingerprint == first.fingerprint


def test_a_broken_image_is_found_at_the_start_and_named(folder, build):
    (folder / "train" / "dog" / "7.png").write_bytes(b"not an image")
    for kind in ("files", "mapped"):
        with pytest.raises(InputError, match=r"dog/7\.png: not a readable image"):
            build(loader=kind)


def test_an_image_that_breaks_during_training_is_named(folder, build):
    loader = build(loader="files").train
    (folder / "train" / "dog" / "7.png").unlink()
    with pytest.raises(OSError, match=r"dog/7\.png: cannot be read \(No such file or directory\)") as caught:
        list(loader.epoch(0))
    assert explain(caught.value, 8, 1, 1).endswith("dog/7.png: cannot be read (No such file or directory)")


@pytest.mark.parametrize("full", [False, True])
def test_a_cache_that_cannot_be_written_is_one_line(build, tmp_path, monkeypatch, full):
    if full:
        usage = type(stores.math)("usage")
        usage.free = 100
        monkeypatch.setattr("seqjepa.loaders.images.cache.shutil.disk_usage", lambda path: usage)
    else:
        (tmp_path / "cache").write_text("in the way")
    with pytest.raises(InputError, match=r"No space left.*0 are free" if full else "File exists") as caught:
        build(loader="mapped")
    assert caught.value.field == "data.cache"
    assert "data.loader=files or resident needs none" in str(caught.value)


def test_what_a_store_does_not_take_is_refused():
    for kind, said in (("files", "digits has files of its own"), ("ffcv", "ffcv reads betons")):
        with pytest.raises(InputError, match=said):
            build_loaders(DataConfig(loader=kind), AffineConfig(), seed=0, device=CPU)


def test_auto_takes_the_largest_store_that_fits(folder, build, monkeypatch):
    """60 images of 16 x 16 pixels are 45 KiB; the train split of them is taken whole."""
    found = {}
    for available in (1 << 20, 150 << 10, 60 << 10):
        monkeypatch.setattr(stores, "memory", lambda available=available: available)
        found[available >> 10] = build().kind
    assert found == {1024: "resident", 150: "mapped", 60: "files"}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(stores, "memory", lambda: 1 << 20)
    assert build().kind == "mapped"  # eight processes would hold eight copies
    monkeypatch.setattr(stores, "memory", lambda: 1 << 30)
    assert build().kind == "resident"  # of 45 KiB
    monkeypatch.setattr(stores, "COPIES", 300 << 10)
    assert build().kind == "mapped"
    monkeypatch.setattr(stores, "memory", lambda: 1 << 20)
    monkeypatch.setattr(Cache, "room", lambda self: 1000)
    assert build().kind == "files"  # no disk for them


@pytest.mark.parametrize(
    ("there", "name", "said"),
    [
        ({"ffcv", "torchcodec"}, "1.JPG", "seqjepa write"),
        ({"torchcodec"}, "1.jpeg", "data.decoder=torchcodec"),
        ({"ffcv", "torchcodec"}, "1.png", None),
        (set(), "1.jpg", None),
    ],
)
def test_what_would_decode_faster_is_told_once(there, name, said, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: "found" if package in there else None)
    Image.new("RGB", (8, 8)).save(tmp_path / name)
    splits = [Images(FOLDER, ImageFiles([str(tmp_path / name)]), np.zeros(1, np.int64), ["a"]) for _ in range(2)]
    lines = stores.prepare("files", dict(zip(("train", "test"), splits, strict=True)), Cache(str(tmp_path)))
    assert len(lines) == (said is not None)
    assert said is None or said in lines[0]


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "GROUP", tmp_path)
    whole = stores.memory()
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert stores.memory() == 4_000_000 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert stores.memory() > 4_000_000


SHARED = """
import json, sys, torch
from pathlib import Path
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.images.cache import Cache
from seqjepa.loaders.images.host import HostImages
import numpy as np

path = next(Path(sys.argv[1]).glob("*.npy"))
images = Images(find_dataset("imagefolder"), np.load(path, mmap_mode="r"), np.zeros(6000, np.int64), ["a"])

def memory():  # bytes of the file that count for this process, and of memory that is its own
    inside, counts = False, [0, 0]
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if not first.endswith(":"):
            inside = line.endswith(path.name)
        elif first == ("Pss:" if inside else "Anonymous:"):
            counts[not inside] += 1024 * int(rest[0])
    return np.array(counts)

store = HostImages(images, torch.device("cpu"))

def read(positions):
    return sum(int(pixels.sum()) for pixels, _, _ in store.batches(np.split(positions, len(positions) // 40)))

read(np.arange(200))  # threads, buffers, and whatever else the first batches bring
before = memory()
print("ready", flush=True)
input()
total = read(np.arange(6000))
print("read", flush=True)
input()
print(json.dumps([total, memory().tolist(), (memory() - before).tolist()]), flush=True)
input()
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="Linux counts memory in shares")
def test_four_processes_have_one_copy(tmp_path):
    """The proportional set size counts a page that n processes map as 1/n of a page in each."""
    pixels = np.random.default_rng(0).integers(0, 256, (6000, 96, 96, 3), np.uint8)  # 166 MB
    images = Images(find_dataset("imagefolder"), pixels, np.zeros(6000, np.int64), ["a"])
    Cache(str(tmp_path)).map(images)
    command = [sys.executable, "-c", SHARED, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen(command, env=one_thread, **pipes) for _ in range(4)]
    try:

        def together(line):
            for process in processes:
                assert process.stdout.readline() == f"{line}\n"
            for process in processes:
                process.stdin.write("\n")
                process.stdin.flush()

        together("ready")
        together("read")
        answers = [json.loads(process.stdout.readline()) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert {total for total, _, _ in answers} == {int(pixels.sum(dtype=np.int64))}
    copies = sum(shared for _, (shared, _), _ in answers) / pixels.nbytes
    assert 0.95 < copies < 1.05
    for _, _, (_, other) in answers:  # what each has for itself grows by no copy
        assert other < 0.5 * pixels.nbytes


def test_batches_are_read_ahead(folder):
    """While the first batch is used, the next two are read, and no more, so that memory stays bounded."""
    images = read_images("imagefolder", folder)
    store = HostImages(images, CPU)
    read = []
    original = store._read

    def telling(positions, out):
        read.append(positions.tolist())
        original(positions, out)

    store._read = telling
    epoch = store.batches([np.array([number]) for number in range(9)])
    next(epoch)
    deadline = time.monotonic() + 30
    while len(read) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert read == [[0], [1], [2]]
    epoch.close()


def test_torchcodec_decodes_as_pillow_does(tmp_path):
    """The same JPEG to within rounding, and one that is turned by its metadata as it lies in the file."""
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, RuntimeError) as error:  # it is built for some versions of torch
        pytest.skip(f"torchcodec: {error}")
    waves = np.add.outer(np.sin(np.arange(60) / 7), np.cos(np.arange(90) / 11))
    pixels = np.stack([127 + 60 * waves, 127 - 60 * waves, 100 + 20 * waves], -1).astype(np.uint8)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    Image.fromarray(pixels).save(tmp_path / "0.jpg", quality=95)
    Image.fromarray(pixels).save(tmp_path / "1.jpg", quality=95, exif=turned)
    Image.fromarray(pixels).save(tmp_path / "2.png")
    paths = [str(tmp_path / name) for name in ("0.jpg", "1.jpg", "2.png")]
    for size in (None, 48):
        ours, theirs = (ImageFiles(paths, size, decoder)[:].astype(int) for decoder in ("pillow", "torchcodec"))
        assert ours.shape == theirs.shape
        assert abs(ours - theirs).max() <= 4
        assert abs(ours - theirs).mean() < 1


def test_a_decoder_that_is_missing_is_one_line(build, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(InputError, match="torchcodec cannot be imported") as caught:
        build(decoder="torchcodec")
    assert caught.value.field == "data.decoder"
    with pytest.raises(InputError, match="digits has none"):
        build_loaders(DataConfig(decoder="torchcodec"), AffineConfig(), seed=0, device=CPU)


def test_damaged_metadata_are_no_damaged_image(folder, build):
    """Pillow shows such files; torchcodec is not asked, because it would turn what it cannot know."""
    damaged = PngImagePlugin.PngInfo()
    damaged.add(b"eXIf", b"garbage!")
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(folder / "train" / "cat" / "0.png", pnginfo=damaged)
    assert build(loader="files").kind == "files"


def test_the_reading_thread_leaves_the_warnings_of_the_program_alone(build):
    loader = build(loader="files").train
    before = list(warnings.filters)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("error")
        during = list(warnings.filters)
        for _ in loader.epoch(0):
            assert warnings.filters == during
    assert warnings.filters == before
    assert not seen


def test_two_at_once_decode_once(folder, tmp_path, monkeypatch):
    """The second waits for the first, and then finds its file; both began before there was one."""
    decoded, begun = [], threading.Barrier(2)
    original = ImageFiles.decode

    def telling(self, positions, out):
        decoded.append(len(positions))
        time.sleep(0.1)
        original(self, positions, out)

    def work():
        found = open_images(FOLDER, find_layout(FOLDER, str(folder)), "train")
        begun.wait()
        Cache(str(tmp_path / "cache")).map(found)
        assert found.fingerprint() == read_images("imagefolder", folder).fingerprint()

    monkeypatch.setattr(ImageFiles, "decode", telling)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: work(), range(2)))
    assert decoded[0] == 30
    assert decoded.count(30) == 3  # and once for each comparison


@pytest.mark.parametrize("kind", ["mapped", "files"])
def test_what_another_user_has_kept_is_used(build, tmp_path, kind, monkeypatch):
    """The folder may be read and not written: a shared one, or a disk that is mounted so."""
    first = build(loader=kind)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "there")

    monkeypatch.setattr("seqjepa.loaders.images.cache.FileLock", refuse)
    assert build(loader=kind).fingerprint == first.fingerprint
    if kind == "files":  # which can do without
        assert "cannot keep images there (Permission denied)" in build(loader=kind, size=20).notice


def test_no_home_is_needed_where_nothing_is_kept(monkeypatch):
    def homeless(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", homeless)
    assert build_loaders(DataConfig(), AffineConfig(), seed=0, device=CPU).kind == "resident"
    with pytest.raises(InputError, match="FOLDER names a place"):
        build_loaders(DataConfig(loader="mapped"), AffineConfig(), seed=0, device=CPU)


@pytest.mark.gpu
def test_batches_on_a_gpu_survive_a_host_that_runs_ahead(folder):
    """The device is kept busy, so that the buffers would be written again before they were copied."""
    images = read_images("imagefolder", folder)
    parts = [np.random.default_rng(seed).permutation(30)[:8] for seed in range(20)]
    found = []
    for batch in HostImages(images, torch.device("cuda")).batches(parts):
        found.append(batch)
        torch.cuda._sleep(10_000_000)
    for (ours, labels, index), part in zip(found, parts, strict=True):
        assert torch.equal(ours.cpu(), torch.from_numpy(images.pixels[part]))
        assert np.array_equal(index.cpu(), part)
        assert np.array_equal(labels.cpu(), images.labels[part])
