"""The reference code's augmentations, view by view, with torchvision's functions on float tensors or Pillow images."""

from itertools import permutations

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

NAMES = (
    *("top", "left", "height", "width", "brightness", "contrast", "saturation", "hue", "sigma"),
    *("flip", "grayscale", "solarize", "order"),
)


def jitter_order(order: int) -> list[str]:
    """The four operations in the order of that number: the blends' permutation, and the place of the hue in it."""
    names = list(list(permutations(("brightness", "contrast", "saturation")))[order % 6])
    names.insert(order // 6, "hue")
    return names


def augment(image, params):
    """A view of an image.

    Args:
        image: float tensor [3, H, W] in [0, 1], or a Pillow image.
        params: the thirteen of `Augment`.
    """
    p = dict(zip(NAMES, params, strict=True))
    is_pil = isinstance(image, Image.Image)
    size = image.size[::-1] if is_pil else image.shape[1:]
    box = [round(p[name]) for name in ("top", "left", "height", "width")]
    view = F.resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
    if not is_pil:
        view = view.clamp(0, 1)  # what eight bits do; torchvision leaves floats where bicubic overshoots
    if p["flip"]:
        view = F.hflip(view)
    for name in jitter_order(round(p["order"])):
        if p[name] != (name != "hue"):  # a jitter that is not drawn is not run: Pillow's HSV would round
            view = getattr(F, f"adjust_{name}")(view, p[name])
    if p["grayscale"]:
        view = F.rgb_to_grayscale(view, num_output_channels=3)
    if p["sigma"]:
        kernel = 2 * max(0, round((min(size) - 10) / 20)) + 1
        view = F.gaussian_blur(view, [kernel, kernel], [p["sigma"], p["sigma"]])
    if p["solarize"]:
        view = F.solarize(view, 128 if is_pil else 0.5)  # between 127 and 128
    return view


def augment_views(pixels, params, *, pil):
    """Views, float [B, V, 3, H, W] in [0, 1], of images, uint8 [B, H, W, 3]."""
    views = []
    for image, rows in zip(pixels, params.tolist(), strict=True):
        given = Image.fromarray(image.numpy()) if pil else image.permute(2, 0, 1).float() / 255
        for row in rows:
            view = augment(given, row)
            views.append(F.to_tensor(view) if pil else view)
    return torch.stack(views).unflatten(0, params.shape[:2])
