"""Augmentations of a batch against torchvision's, one sample at a time, parameter by parameter."""

import pytest
import torch
from oracles import jitter_order
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from seqjepa.kernels.views import color_jitter_, crop, gaussian_blur, grayscale_, solarize

COUNT = 96
ROUNDING = 2e-6  # float32 sums of a dozen terms of order one, in another order than torchvision's


@pytest.fixture
def planes():
    """Noise with gray, black, white and saturated pixels: the corners of the colour cube."""
    generator = torch.Generator().manual_seed(0)
    planes = torch.rand(3, COUNT, 12, 20, generator=generator)
    planes[:, :, 0, :5] = planes[:1, :, 0, :5]
    planes[:, :, 1] = planes[:, :, 1].round()
    return planes


def uniform(low, high, seed):
    return low + (high - low) * torch.rand(COUNT, generator=torch.Generator().manual_seed(seed))


def images(planes):
    return planes.permute(1, 0, 2, 3)


def assert_close(planes, expected, tolerance=ROUNDING):
    torch.testing.assert_close(images(planes), torch.stack(expected), rtol=0, atol=tolerance)


@pytest.mark.parametrize("size", [(32, 32), (13, 22)])
def test_crop_is_torchvisions(size):
    rows, columns = size
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (20, rows, columns, 3), dtype=torch.uint8, generator=generator)
    height = torch.randint(1, rows + 1, (20, 3), generator=generator)
    width = torch.randint(1, columns + 1, (20, 3), generator=generator)
    height[0], width[0] = rows, columns
    top = (torch.rand(20, 3, generator=generator) * (rows - height + 1)).long()
    left = (torch.rand(20, 3, generator=generator) * (columns - width + 1)).long()
    flip = torch.randint(0, 2, (20, 3), generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # which changes nothing
        planes = crop(pixels, top.float(), left.float(), height.float(), width.float(), flip.float())
    expected = []
    for image, *boxes in zip(pixels, top, left, height, width, flip, strict=True):
        image = image.permute(2, 0, 1).float() / 255
        for *box, mirrored in zip(*(part.tolist() for part in boxes), strict=True):
            view = F.resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True).clamp(0, 1)
            expected.append(F.hflip(view) if mirrored else view)
    assert_close(planes, expected)
    # the whole image comes back as it is
    whole = images(planes)[:3]
    upright = torch.stack([v.flip(-1) if f else v for v, f in zip(whole, flip[0].tolist(), strict=True)])
    torch.testing.assert_close(upright, (pixels[:1].permute(0, 3, 1, 2) / 255).expand(3, -1, -1, -1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_is_torchvisions(planes, name):
    one = torch.ones(COUNT)
    given = {"brightness": one, "contrast": one, "saturation": one, "hue": 0 * one, "order": uniform(0, 24, 3).floor()}
    given[name] = uniform(-0.5, 0.5, 2) if name == "hue" else uniform(0, 2, 2)
    adjust = getattr(F, f"adjust_{name}")
    expected = [adjust(image, factor) for image, factor in zip(images(planes), given[name].tolist(), strict=True)]
    assert_close(color_jitter_(planes, **given), expected)


def test_jitter_follows_each_samples_order(planes):
    order = torch.arange(COUNT) % 24
    factors = {name: uniform(0.3, 1.7, seed) for seed, name in enumerate(("brightness", "contrast", "saturation"))}
    factors["hue"] = uniform(-0.3, 0.3, 9)
    expected = []
    for number, image in enumerate(images(planes)):
        for name in jitter_order(int(order[number])):
            image = getattr(F, f"adjust_{name}")(image, factors[name][number].item())
        expected.append(image)
    assert len({tuple(jitter_order(number)) for number in range(24)}) == 24
    assert_close(color_jitter_(planes, **factors, order=order.float()), expected, 5 * ROUNDING)


def test_neutral_jitter_changes_nothing(planes):
    before = planes.clone()
    one = torch.ones(COUNT)
    color_jitter_(planes, one, one, one, 0 * one, uniform(0, 24, 0).floor())
    torch.testing.assert_close(planes, before, rtol=0, atol=ROUNDING)


def test_grayscale_is_torchvisions_where_it_is_on(planes):
    on = (uniform(0, 1, 4) < 0.5).float()
    expected = [
        F.rgb_to_grayscale(image, 3) if chosen else image
        for image, chosen in zip(images(planes.clone()), on.tolist(), strict=True)
    ]
    assert_close(grayscale_(planes, on), expected)


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_blur_is_torchvisions(planes, kernel):
    sigma = uniform(0.1, 2.0, 5)
    expected = [
        F.gaussian_blur(image, [kernel, kernel], [value, value])
        for image, value in zip(images(planes), sigma.tolist(), strict=True)
    ]
    assert_close(gaussian_blur(planes, sigma, kernel), expected)
    assert torch.equal(gaussian_blur(planes, 0 * sigma, kernel), planes)  # 0 is none


def test_solarize_is_torchvisions_where_it_is_on(planes):
    planes[:, :, 2, 3] = 128 / 255
    on = (uniform(0, 1, 6) < 0.5).float()
    expected = [
        F.solarize(image, 0.5) if chosen else image
        for image, chosen in zip(images(planes.clone()), on.tolist(), strict=True)
    ]
    assert_close(solarize(planes, on), expected)
