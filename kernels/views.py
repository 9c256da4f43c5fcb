"""Augmentations of a batch in which every sample has its own parameters, without loops over samples or host syncs.

Images are *planes*, float32 [3, N, H, W] in [0, 1], so that every step runs over contiguous colour channels. Results
are those of torchvision on float tensors, except that `crop` clamps where bicubic interpolation overshoots, as happens
with 8-bit images. Functions whose name ends in an underscore write into their argument.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["color_jitter_", "crop", "gaussian_blur", "grayscale_", "solarize"]

GRAY = (0.2989, 0.587, 0.114)  # ITU-R 601, in torchvision's digits
BRIGHTNESS, CONTRAST, SATURATION = range(3)


def crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, flip: Tensor) -> Tensor:
    """Cut a box out of each image for each view, resize it to the image's size and flip it: `A_y X A_xᵀ`.

    Interpolation is bicubic with a = -0.5, as in Pillow and in torchvision's antialiased mode; enlarging has four taps.

    Args:
        images: uint8 [B, H, W, 3].
        top, left: first row and column of the box, whole numbers, float32 [B, V].
        height, width: size of the box, in 1..H and 1..W, float32 [B, V].
        flip: 1 where the view is mirrored left to right, else 0, [B, V].

    Returns:
        Planes [3, B * V, H, W].
    """
    num_images, rows, columns, _ = images.shape
    num_views = top.shape[1]
    vertical = _resize_matrix(rows, top, height).flatten(1, 2)  # [B, V*H', H]
    horizontal = _resize_matrix(columns, left, width, flip).flatten(0, 1)  # [B*V, W', W]
    pixels = images.permute(3, 0, 1, 2).float() / 255  # [3, B, H, W]
    planes = torch.empty((3, num_images * num_views, rows, columns), device=images.device)
    with torch.autocast(images.device.type, enabled=False):
        for plane, channel in zip(planes, pixels, strict=True):
            stretched = torch.bmm(vertical, channel).view(num_images * num_views, rows, columns)
            torch.bmm(stretched, horizontal.mT, out=plane)
    return planes.clamp_(0, 1)


def _resize_matrix(size: int, start: Tensor, length: Tensor, flip: Tensor | None = None) -> Tensor:
    """Weights [B, V, size, size] of the input pixels start..start+length-1 in each output pixel."""
    place = torch.arange(size, dtype=torch.float32, device=start.device)
    start, length = start[..., None], length[..., None]
    output = place if flip is None else torch.where(flip[..., None] > 0, size - 1 - place, place)
    centre = (output + 0.5) * (length / size) + start - 0.5  # [B, V, size], in input pixels
    distance = (place - centre[..., None]).abs_()
    # Keys' cubic with a = -0.5, zero beyond a distance of 2, as polynomials of (2 - distance)+ and (1 - distance)+
    outer = (2 - distance).clamp_(min=0)
    inner = distance.neg_().add_(1).clamp_(min=0)
    weights = (outer - 1).mul_(outer.square_()).mul_(0.5)
    weights.add_((1 - 2 * inner).mul_(inner.square_()))
    inside = ((place >= start) & (place < start + length)).float()
    weights.mul_(inside[..., None, :])
    return weights.div_(weights.sum(-1, keepdim=True))


def color_jitter_(
    planes: Tensor, brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, order: Tensor
) -> Tensor:
    """Change brightness, contrast, saturation and hue, in an order of its own for every sample.

    The first three blend a pixel with black, with the image's mean gray or with the pixel's gray. That is one formula,
    which runs three times before the hue and three times after it; each sample uses three of the six.

    Args:
        planes: [3, N, H, W], written in place.
        brightness, contrast, saturation: factors, float32 [N]; 1 changes nothing.
        hue: shift in turns, [N], within [-0.5, 0.5].
        order: [N], in 0..23. `order % 6` numbers the permutations of (brightness, contrast, saturation) in
            lexicographic order, and `order // 6` is how many of the three come before the hue.
    """
    before_hue = order // 6
    first = order % 6 // 2
    lower, upper = (first == 0).to(first.dtype), 2 - (first == 2).to(first.dtype)
    swapped = order % 2 == 1
    operations = (first, torch.where(swapped, upper, lower), torch.where(swapped, lower, upper))
    factors = [
        torch.where(op == BRIGHTNESS, brightness, torch.where(op == CONTRAST, contrast, saturation))
        for op in operations
    ]
    for place in range(3):
        _blend_(planes, torch.where(place < before_hue, factors[place], 1.0), operations[place])
    _shift_hue_(planes, hue)
    for place in range(3):
        _blend_(planes, torch.where(place < before_hue, 1.0, factors[place]), operations[place])
    return planes


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None]


def _gray(planes: Tensor) -> Tensor:
    red, green, blue = planes
    return (red * GRAY[0]).add_(green, alpha=GRAY[1]).add_(blue, alpha=GRAY[2])


def _blend_(planes: Tensor, factor: Tensor, operation: Tensor) -> None:
    """factor * x + (1 - factor) * y, clamped to [0, 1], where y is 0, the mean gray or the gray, by operation."""
    rest = 1 - factor
    gray = _gray(planes)
    mean = gray.mean((1, 2)) * torch.where(operation == CONTRAST, rest, 0.0)
    gray.mul_(_per_image(torch.where(operation == SATURATION, rest, 0.0))).add_(_per_image(mean))
    planes.mul_(_per_image(factor)).add_(gray).clamp_(0, 1)


def _shift_hue_(planes: Tensor, hue: Tensor) -> None:
    """Shift the hue of HSV. Value and chroma stay, so each colour is a clamped triangle wave of the new hue."""
    red, green, blue = planes
    largest = torch.maximum(red, green).maximum(blue)
    smallest = torch.minimum(red, green).minimum(blue)
    chroma = largest - smallest
    scale = chroma.clamp(min=1e-30).reciprocal_()  # where chroma is 0, all differences are 0 as well
    angle = torch.where(
        largest == red,
        (green - blue).mul_(scale),
        torch.where(largest == green, (blue - red).mul_(scale).add_(2), (red - green).mul_(scale).add_(4)),
    )  # in sixths of a turn
    angle.add_(_per_image(6 * hue))
    angle.sub_(torch.floor(angle / 6).mul_(6))
    torch.addcmul(smallest - chroma, chroma, (angle - 3).abs_().clamp_(1, 2), out=red)
    high = smallest.add_(chroma, alpha=2)
    torch.addcmul(high, chroma, (angle - 2).abs_().clamp_(1, 2), value=-1, out=green)
    torch.addcmul(high, chroma, (angle - 4).abs_().clamp_(1, 2), value=-1, out=blue)


def grayscale_(planes: Tensor, on: Tensor) -> Tensor:
    """Replace all three colours by the gray value in samples where `on` [N] is 1."""
    return planes.lerp_(_gray(planes), _per_image(on))


def gaussian_blur(planes: Tensor, sigma: Tensor, kernel_size: int) -> Tensor:
    """Separable Gaussian blur with reflected edges, `K X Kᵀ`: planes [3, N, H, W], sigma [N] in pixels (0: no blur)."""
    radius = kernel_size // 2
    place = torch.arange(-radius, radius + 1, dtype=torch.float32, device=planes.device)
    weights = torch.exp(-0.5 * (place / sigma.clamp(min=1e-3)[:, None]).square())  # [N, k]; at 0: 1 in the middle
    weights = (weights / weights.sum(-1, keepdim=True)).T[..., None, None]  # [k, N, 1, 1]
    for dim, padding in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        size = planes.shape[dim]
        # as images of one channel: a process may have no images, and `reflect` does not accept 0 channels
        padded = F.pad(planes.flatten(0, 1)[:, None], padding, mode="reflect")
        padded = padded.view(*planes.shape[:2], *padded.shape[2:])
        planes = planes * weights[radius]
        for tap in [*range(radius), *range(radius + 1, kernel_size)]:
            planes.addcmul_(padded.narrow(dim, tap, size), weights[tap])
    return planes


def solarize(planes: Tensor, on: Tensor) -> Tensor:
    """Invert values of at least 1/2 in samples where `on` [N] is 1.

    At this threshold, Pillow's default of 128 of 255, inverting is continuous, so rounding cannot cause a jump.
    """
    limit = torch.where(on > 0, 0.5, 2.0)
    return torch.where(planes >= _per_image(limit), 1 - planes, planes)
