"""Datasets: which images are read, and which are refused."""

import numpy as np
import pytest
import torch
from image_data import read_images, write_images
from PIL import Image
from sklearn.datasets import load_digits

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.loaders.config import AffineConfig, DataConfig
from seqjepa.loaders.images import DATASETS, find_dataset
from seqjepa.loaders.images.base import Images
from seqjepa.loaders.loader import build_loaders


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path, size=(12, 12))


def test_digits_are_those_of_scikit_learn():
    train, test = (read_images("digits", None, split) for split in ("train", "test"))
    assert len(train.labels) + len(test.labels) == 1797
    assert sorted(np.concatenate([train.labels, test.labels])) == sorted(load_digits().target)
    assert train.pixels.shape[1:] == (24, 24, 3)
    for part in (train, test):
        assert np.bincount(part.labels).min() > 25  # every class in both splits
        assert not part.pixels[:, :4].any()  # the border is the background
    # doubling keeps the ink: each doubled digit correlates with one of scikit-learn's images, of its own class
    small, target = load_digits().images.reshape(1797, 64), load_digits().target
    halved = test.pixels[:, 4:20, 4:20, 0].reshape(-1, 8, 2, 8, 2).mean((2, 4)).reshape(-1, 64)
    scores = np.corrcoef(halved, small)[: len(halved), len(halved) :]
    assert scores.max(1).min() > 0.95
    assert (target[scores.argmax(1)] == test.labels).all()
    assert len(set(scores.argmax(1))) > 0.99 * len(test.labels)


def test_imagefolder_is_read_exactly(folder):
    images = read_images("imagefolder", folder)
    assert images.classes == ["cat", "dog"]
    assert images.labels.tolist() == [0] * 3 + [1] * 3
    assert np.array_equal(images.pixels[4], np.asarray(Image.open(folder / "train" / "dog" / "1.png")))
    mean, std = images.statistics()
    scaled = images.pixels.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, scaled.std(0), rtol=1e-12)


def test_fingerprint_sees_pixels_labels_and_order():
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    folder, digits = find_dataset("imagefolder"), find_dataset("digits")
    base = Images(folder, pixels, np.array([0, 1]), ["a", "b"])
    others = [
        Images(folder, pixels[::-1], np.array([0, 1]), ["a", "b"]),
        Images(folder, pixels, np.array([1, 0]), ["a", "b"]),
        Images(folder, pixels + 1, np.array([0, 1]), ["a", "b"]),
    ]
    assert len({image.fingerprint() for image in (base, *others)}) == 4
    assert base.fingerprint() == Images(digits, pixels.copy(), np.array([0, 1], np.int32), ["a", "b"]).fingerprint()


def refuse(match, dataset, root):
    with pytest.raises(InputError, match=match) as caught:
        read_images(dataset, root)
    assert "\n" not in str(caught.value)
    assert caught.value.field == "data.root"


def test_refuses_what_is_not_there(tmp_path, folder):
    refuse("cifar10 needs a folder", "cifar10", None)
    refuse("no such folder", "imagefolder", tmp_path / "nowhere")
    refuse("data.download=true fetches it", "cifar10", tmp_path / "nowhere")
    refuse("data.download=true fetches it", "mnist", tmp_path / "nowhere")
    refuse("no such file", "cifar10", tmp_path / "train.beton")
    (folder / "train" / "cat" / "0.png").unlink()
    (folder / "train" / "cat" / "1.png").unlink()
    (folder / "train" / "cat" / "2.png").unlink()
    refuse("cat", "imagefolder", folder)


def test_refuses_images_of_the_wrong_size(folder):
    refuse("12x12, cifar10 has 32x32", "cifar10", folder)
    Image.new("RGB", (20, 10)).save(folder / "train" / "dog" / "9.png")
    refuse("9.png: 20x10 pixels, the others have 12x12", "imagefolder", folder)


def test_refuses_files_that_are_no_images(folder):
    path = folder / "train" / "dog" / "1.png"
    whole = path.read_bytes()
    for content in (b"not a picture", b"", whole[:20], whole[:-40]):
        path.write_bytes(content)
        refuse("1.png: not a readable image", "imagefolder", folder)
    Image.fromarray(np.zeros((12, 12), np.uint16)).save(path)
    refuse("1.png: I;16 pixels; 8 bits a channel are allowed", "imagefolder", folder)


@pytest.mark.parametrize("name", [name for name in DATASETS if find_dataset(name).views == "images"])
def test_every_dataset_is_read_from_class_folders_of_its_shape(name, tmp_path):
    dataset = find_dataset(name)
    side, number = dataset.side or 12, dataset.num_classes or 2
    classes = [f"{label:02}" for label in range(number)]

    def build(folder, classes, size):
        root = write_images(tmp_path / folder, 1, classes, size)
        data = DataConfig(dataset=name, root=str(root), batch_size=2)
        return build_loaders(data, AffineConfig(), seed=0, device=torch.device("cpu"))

    loaders = build("right", classes, (side, side))
    assert loaders.num_classes == number
    assert next(loaders.train.epoch(0)).views.shape[-2:] == (side, side)
    mean, std = dataset.statistics or read_images(name, tmp_path / "right").statistics()
    assert torch.equal(loaders.train.mean.flatten(), torch.tensor(mean))
    assert torch.equal(loaders.train.std.flatten(), torch.tensor(std))
    if dataset.side:
        with pytest.raises(InputError, match=f"images are 9x12, {name} has {side}x{side}"):
            build("size", classes, (12, 9))
        with pytest.raises(InputError, match=f"{number - 1} classes, {name} has {number}"):
            build("classes", classes[1:], (side, side))


def test_a_task_follows_its_dataset_unless_it_was_named_on_purpose(tmp_path):
    (tmp_path / "dataset.yaml").write_text("data: {dataset: imagefolder}")
    (tmp_path / "both.yaml").write_text("data: {dataset: imagefolder, name: cifar100_birds}")

    def name(*words):
        return compose(["configs/data/cifar100_aug.yaml", *words]).config.data.name

    assert name() == "cifar100_aug"
    assert name("data.dataset=imagefolder") == name(f"{tmp_path}/dataset.yaml") == "imagefolder_aug"
    assert name("data.dataset=imagefolder", "data.name=cifar100_birds") == "cifar100_birds"
    assert name(f"{tmp_path}/both.yaml") == "cifar100_birds"
    assert DataConfig(dataset="mnist").name == "mnist_affine"
    assert DataConfig(dataset="mnist", name="digits_big").name == "digits_big"


@pytest.mark.realdata
def test_real_mnist_and_cifar(data_root):
    mnist = read_images("mnist", data_root, "test")
    assert mnist.pixels.shape == (10_000, 28, 28, 3)
    assert mnist.labels[:4].tolist() == [7, 2, 1, 0]  # LeCun's first test digits
    mean, std = mnist.statistics()
    scaled = read_images("mnist", data_root).pixels[..., 0] / 255
    assert abs(scaled.mean() - mean[0]) < 1e-4
    assert abs(scaled.std() - std[0]) < 1e-4
    cifar = read_images("cifar10", data_root / "cifar10")
    assert cifar.pixels.shape[1:] == (32, 32, 3)
    assert len(cifar.classes) == 10
    published, measured = cifar.statistics()[0], cifar.pixels.reshape(-1, 3).mean(0) / 255
    assert np.abs(measured - published).max() < 0.02  # a subset's mean
