"""Distance of views from torchvision's, on floats and on Pillow's bytes: `python bench/pillow_distance.py CIFAR100`.

Pillow rounds to whole gray levels after each operation, so distances from it are reported but not judged.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from common import command_line, existing_folder

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from image_data import read_images
from oracles import NAMES, augment_views

from seqjepa.loaders.config import AugmentConfig
from seqjepa.loaders.draws import words
from seqjepa.loaders.sequences import build_sequence

COUNT = 2500  # sequences of four views: 10,000 draws
NEUTRAL = {"height": 32.0, "width": 32.0, "brightness": 1.0, "contrast": 1.0, "saturation": 1.0}  # the others are 0
OPERATIONS = {
    "crop": ("top", "left", "height", "width"),
    "flip": ("flip",),
    "brightness": ("brightness",),
    "contrast": ("contrast",),
    "saturation": ("saturation",),
    "hue": ("hue",),
    "grayscale": ("grayscale",),
    "blur": ("sigma",),
    "solarise": ("solarize",),
    "all": NAMES,
}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("root", type=existing_folder, metavar="CIFAR100")
    root = parser.parse_args().root
    torch.set_num_threads(1)
    images = torch.from_numpy(read_images("cifar100", root, "test").pixels[:COUNT])
    sequence = build_sequence(AugmentConfig(), (32, 32))
    drawn = sequence.params(words(0, 0, 0, torch.arange(len(images)), sequence.num_views, sequence.num_draws))
    neutral = torch.tensor([NEUTRAL.get(name, 0.0) for name in NAMES])
    print(f"{drawn.shape[0] * drawn.shape[1]:,} draws on CIFAR-100, in gray levels of 255: mean, largest\n")
    print("| operation | here to torchvision, float | here to Pillow | torchvision, float, to Pillow |")
    print("| --- | --- | --- | --- |")
    for operation, names in OPERATIONS.items():
        varied = torch.tensor([name in names for name in NAMES])
        params = torch.where(varied, drawn, neutral)
        ours = sequence.render(images, params)
        floats, pillow = (augment_views(images, params, pil=pil) for pil in (False, True))
        distances = [(ours - floats), (ours - pillow), (floats - pillow)]
        cells = [f"{255 * d.abs().mean():.2g}, {255 * d.abs().max():.2g}" for d in distances]
        print(f"| {operation} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
