"""Action sequences per second on one core, beside Pillow and torchvision: `python bench/sequences.py ROOT`.

ROOT holds MNIST, cifar10 and cifar100, each as a folder with train/ and test/ or in torchvision's own layout.
"""

from __future__ import annotations

from statistics import median

import torch
from common import command_line, cpu, existing_folder, interleaved, record, spread
from PIL import Image
from pillow import pillow_sequence

from seqjepa.engine.config import compose
from seqjepa.loaders.loader import build_loaders

SEQUENCES = ("digits_affine", "mnist_affine", "mnist_rot", "cifar10_rot", "cifar_affine", "cifar100_aug")
BATCH, OURS, THEIRS = 256, 2048, 256  # sequences in a batch; and in a repetition of each side


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("root", type=existing_folder, metavar="ROOT")
    root = parser.parse_args().root
    torch.set_num_threads(1)
    rows = []
    for name in SEQUENCES:
        dataset = compose([f"configs/data/{name}.yaml"]).config.data.dataset
        folder = root if dataset == "mnist" or not (root / dataset).is_dir() else root / dataset
        words = [f"configs/data/{name}.yaml", f"data.batch_size={BATCH}"]
        config = compose([*words, f"data.root={'null' if dataset == 'digits' else folder}"]).config
        loader = build_loaders(
            config.data, config.sequence, config.actions, seed=0, device=torch.device("cpu")
        ).validation
        if len(loader.images.pixels) < OURS:  # the digits have few test images
            loader.sampler.indices = loader.sampler.indices.repeat(-(-OURS // len(loader.sampler.indices)))
        loader.sampler.indices = loader.sampler.indices[:OURS]
        pipeline = pillow_sequence(config.sequence, loader.mean.flatten().tolist(), loader.std.flatten().tolist())
        pixels = loader.images.pixels[:THEIRS]
        gray = dataset in ("digits", "mnist")
        images = [Image.fromarray((image[..., 0] if gray else image).numpy()) for image in pixels]

        def ours(loader=loader) -> int:
            return sum(len(batch.views) for batch in loader.epoch(0))

        def theirs(pipeline=pipeline, images=images) -> int:
            return len(torch.stack([pipeline(image)[0] for image in images]))

        rates = interleaved({"seqjepa": ours, "pillow": theirs})
        ratios = [a / b for a, b in zip(rates["seqjepa"], rates["pillow"], strict=True)]
        rows.append({"sequence": name, **rates, "ratio": ratios})
    print(f"sequences of four views a second, one thread of {cpu()}: median (range) of 5, interleaved\n")
    print("| sequence | seqjepa | Pillow and torchvision | ratio |\n| --- | --- | --- | --- |")
    for row in rows:
        ratio = f"{median(row['ratio']):.1f} ({min(row['ratio']):.1f} to {max(row['ratio']):.1f})"
        print(f"| {row['sequence']} | {spread(row['seqjepa'])} | {spread(row['pillow'])} | {ratio} |")
    print(f"\nbench/history/{record('sequences', rows, 1).name}")


if __name__ == "__main__":
    main()
