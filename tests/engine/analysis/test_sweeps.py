"""Factor sweeps: grids that hold the identity, and views that move in one factor alone."""

import pytest
import torch

from seqjepa.configs.section import by_kind
from seqjepa.loaders.config import AnySequence, AugmentConfig
from seqjepa.loaders.sequences import build_sequence

MOVES = {"rotation", "translation_x", "translation_y", "scale"}
AUGMENTATIONS = {"brightness", "contrast", "saturation", "hue", "blur", "crop_x", "crop_y", "crop_size"}
KINDS = {"affine": MOVES, "rotation": MOVES | {"right_angles"}, "augment": MOVES | AUGMENTATIONS}


def images(count=3, size=32):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def render(kind, size=32):
    pixels = images(size=size)
    for sequence, factors in build_sequence(by_kind(AnySequence)[kind](), (size, size)).sweeps():
        for factor in factors:
            yield factor, pixels, sequence.render(pixels, factor.params[None].expand(len(pixels), -1, -1))


@pytest.mark.parametrize("size", [28, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_each_grid_holds_the_identity_and_moves_one_factor(kind, size):
    names = set()
    for factor, pixels, views in render(kind, size):
        names.add(factor.name)
        assert len(factor.values) == len(factor.params) == views.shape[1]
        assert (factor.values.diff() > 0).all()
        still = factor.params[factor.identity]
        # no two steps are the same view, and parameters move in a column (a crop's size in its whole box)
        moved = (factor.params != still).any(0).sum()
        assert moved == (4 if factor.name == "crop_size" else 1)
        clean = pixels.permute(0, 3, 1, 2).float() / 255
        if not factor.name.startswith("crop_") or factor.name == "crop_size":
            torch.testing.assert_close(views[:, factor.identity], clean, rtol=0, atol=1e-5)
        else:
            assert factor.values[factor.identity] == 0
        for step in range(views.shape[1]):
            if step != factor.identity:
                assert (views[:, step] - views[:, factor.identity]).abs().mean() > 1e-4, (factor.name, step)
    assert names == KINDS[kind]


@pytest.mark.parametrize("image_size", [(1, 16), (16, 1), (1, 1), (2, 3)])
def test_images_a_pixel_wide_or_high_are_swept_along_what_they_can_be(image_size):
    """A single row can be neither turned nor shifted between its pixels."""
    pixels = torch.randint(0, 256, (2, *image_size, 3), dtype=torch.uint8)
    names = set()
    for sequence, factors in build_sequence(AugmentConfig(), image_size).sweeps():
        for factor in factors:
            names.add(factor.name)
            views = sequence.render(pixels, factor.params[None].expand(len(pixels), -1, -1))
            assert views.shape == (2, len(factor.values), 3, *image_size)
            assert views.isfinite().all()
    assert names == (AUGMENTATIONS if 1 in image_size else AUGMENTATIONS | MOVES)


def test_angles_go_round_once():
    closed = {factor.name: (factor, views) for factor, _, views in render("rotation") if factor.closed}
    assert closed.keys() == {"rotation", "right_angles"}
    for name, (factor, views) in closed.items():
        upright = views[:, factor.identity]
        step = 6 if name == "rotation" else 1
        # what right-angle sequences show
        torch.testing.assert_close(views[:, factor.identity + step], upright.rot90(1, (2, 3)), rtol=0, atol=1e-4)
        if name == "rotation":
            assert factor.values.tolist() == [-180 + 15 * step for step in range(24)]


def test_shifts_shift():
    for factor, _, views in render("affine"):
        if factor.name == "translation_x":
            still, moved = views[:, factor.identity], views[:, factor.identity + 3]
            torch.testing.assert_close(moved[..., 3:], still[..., :-3], rtol=0, atol=1e-5)
            assert moved[..., :3].abs().max() < 1e-5  # black beside it
