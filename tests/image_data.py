"""Folders of noise, and the decoded images of a dataset."""

import numpy as np
from PIL import Image

from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.sources import find_layout, open_images


def write_images(root, count=3, classes=("cat", "dog"), size=(16, 16)):
    """Write `count` PNGs of a size (H, W) for each class of both splits."""
    noise = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8))
                image.save(root / split / name / f"{number}.png")
    return root


def read_images(name, root, split="train"):
    """A split of a dataset, whose pixels are one array."""
    dataset = find_dataset(name)
    images = open_images(dataset, find_layout(dataset, root and str(root)), split)
    images.pixels = images.pixels[:]
    return images
