"""Sequences on real images: against Pillow and torchvision, and against what actions must satisfy."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

from seqjepa.loaders.config import SequenceConfig
from seqjepa.loaders.draws import words
from seqjepa.loaders.sequences import SEQUENCES, build_sequence
from seqjepa.loaders.sources import find_layout, read_images

SIZE = (24, 24)


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(read_images("digits", find_layout("digits", None), "test").pixels[:32])


def draw(sequence, count=32, seed=0):
    return sequence.params(words(seed, 0, 0, torch.arange(count), sequence.num_views, sequence.num_draws))


def test_rotations_are_pillows(digits):
    sequence = build_sequence(SequenceConfig(kind="rotation"), SIZE)
    params = draw(sequence)
    views = sequence.render(digits, params)
    for image, image_views, image_params in zip(digits, views, params, strict=True):
        for view, angle in zip(image_views, image_params[:, 0].tolist(), strict=True):
            expected = np.asarray(Image.fromarray(image.numpy()).rotate(angle))
            assert torch.equal((view * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert set(params[:, 1:].flatten().tolist()) == {0.0, 90.0, 180.0, 270.0}
    assert (params[:, 0] == 0).all()


def test_rotation_actions_are_the_turn_between_views():
    sequence = build_sequence(SequenceConfig(kind="rotation"), SIZE)
    params = torch.tensor([0.0, 90.0, 270.0, 180.0]).view(1, 4, 1)
    expected = torch.tensor([[1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    assert torch.equal(sequence.relative(params)[0], expected)  # exact, so that a constant looks like one


def test_rotation_angles_can_be_chosen():
    params = draw(build_sequence(SequenceConfig(kind="rotation", angles=[0, 180]), SIZE), 200)
    assert set(params[:, 1:].flatten().tolist()) == {0.0, 180.0}


def test_affine_views_are_torchvisions(digits):
    sequence = build_sequence(SequenceConfig(kind="affine"), SIZE)
    params = draw(sequence)
    views = sequence.render(digits, params)
    pixels = digits.permute(0, 3, 1, 2).float() / 255
    for image, image_views, image_params in zip(pixels, views, params, strict=True):
        for view, (turn, shift_x, shift_y, log_scale) in zip(image_views, image_params.tolist(), strict=True):
            expected = affine(
                image,
                angle=-turn,  # torchvision turns clockwise
                translate=[round(shift_x), round(shift_y)],
                scale=math.exp(log_scale),
                shear=[0.0],
                interpolation=InterpolationMode.BILINEAR,
            )
            # grid coordinates in float32: about 1e-6 of 24 pixels, times a slope of at most 1 a pixel
            torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


def test_affine_first_view_is_the_image(digits):
    sequence = build_sequence(SequenceConfig(kind="affine"), SIZE)
    views = sequence.render(digits, draw(sequence))
    torch.testing.assert_close(views[:, 0], digits.permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-5)


def test_affine_background_is_black():
    sequence = build_sequence(SequenceConfig(kind="affine", scale=[0.5, 0.5], rotation=[0.0, 0.0]), SIZE)
    white = torch.full((8, 24, 24, 3), 255, dtype=torch.uint8)
    params = draw(sequence, 8)
    params[..., 1:3] = 0
    views = sequence.render(white, params)[:, 1:]
    assert (views[..., :5, :] == 0).all()
    assert (views[..., 8:16, 8:16] == 1).all()


def test_affine_draws_fill_their_ranges():
    config = SequenceConfig(kind="affine", rotation=[-30.0, 60.0], translation=[-2, 5], scale=[0.5, 2.0])
    turn, shift_x, shift_y, log_scale = draw(build_sequence(config, SIZE), 4000)[:, 1:].flatten(0, 1).T
    assert -30 <= turn.min() < -29.5 < 59.5 < turn.max() < 60
    for shift in (shift_x, shift_y):
        assert set(shift.tolist()) == set(range(-2, 6))
    # log-uniform: the logarithm's mean is the middle of its range
    assert abs(log_scale.mean()) < 5 * (2 * math.log(2)) / math.sqrt(12 * 12_000)
    assert log_scale.min() >= -math.log(2) - 1e-4


def test_affine_actions_compose():
    sequence = build_sequence(SequenceConfig(kind="affine"), SIZE)
    params = draw(sequence)
    actions = sequence.relative(params).double()
    turn = torch.atan2(actions[..., 0], actions[..., 1]).sum(1)
    last = params[:, -1].double()
    difference = torch.deg2rad(last[:, 0]) - turn
    torch.testing.assert_close(torch.sin(difference), torch.zeros(32).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(actions[..., 2:4].sum(1) * 4, last[:, 1:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(actions[..., 4].sum(1), last[:, 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_views_do_not_depend_on_the_batch(kind, digits):
    sequence = build_sequence(SequenceConfig(kind=kind), SIZE)
    params = draw(sequence)
    whole = sequence.render(digits, params)
    parts = [sequence.render(i, p) for i, p in zip(digits.split(7), params.split(7), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", SEQUENCES)
def test_factors_cover_the_action(kind):
    sequence = build_sequence(SequenceConfig(kind=kind, num_observed=2), SIZE)
    dims = [d for dims in sequence.factors.values() for d in range(dims.start, dims.stop)]
    actions = sequence.actions(draw(sequence))
    assert sorted(dims) == list(range(sequence.action_dim))
    assert actions.shape == (32, 2, sequence.action_dim)


@pytest.mark.realdata
def test_cifar_rotations_are_pillows(data_root):
    images = torch.from_numpy(
        read_images("cifar10", find_layout("cifar10", str(data_root / "cifar10")), "test").pixels[:64]
    )
    sequence = build_sequence(SequenceConfig(kind="rotation"), SIZE)
    params = draw(sequence, 64)
    views = (sequence.render(images, params) * 255).round().byte()
    for image, image_views, image_params in zip(images, views, params, strict=True):
        for view, angle in zip(image_views, image_params[:, 0].tolist(), strict=True):
            expected = np.asarray(Image.fromarray(image.numpy()).rotate(angle))
            assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)
