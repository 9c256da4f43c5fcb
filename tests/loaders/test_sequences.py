"""Sequences on real images: against Pillow and torchvision, and against what actions must satisfy."""

import math

import numpy as np
import pytest
import torch
from image_data import read_images
from oracles import augment_views
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import affine, center_crop

from seqjepa.configs.errors import InputError
from seqjepa.configs.section import by_kind
from seqjepa.loaders.config import ActionsConfig, AffineConfig, AnySequence, AugmentConfig, RotationConfig
from seqjepa.loaders.draws import words
from seqjepa.loaders.sequences import build_sequence

SIZE = (24, 24)
KINDS = {kind: section for kind, section in by_kind(AnySequence).items() if section.views == "images"}


@pytest.fixture(scope="module")
def digits():
    return torch.from_numpy(read_images("digits", None, "test").pixels[:32])


def draw(sequence, count=32, seed=0):
    return sequence.params(words(seed, 0, 0, torch.arange(count), sequence.num_views, sequence.num_draws))


def test_rotations_equal_those_of_pillow(digits):
    sequence = build_sequence(RotationConfig(), SIZE)
    params = draw(sequence)
    views = sequence.render(digits, params)
    for image, image_views, image_params in zip(digits, views, params, strict=True):
        for view, angle in zip(image_views, image_params[:, 0].tolist(), strict=True):
            expected = np.asarray(Image.fromarray(image.numpy()).rotate(angle))
            assert torch.equal((view * 255).round().byte().permute(1, 2, 0), torch.from_numpy(expected.copy()))
    assert set(params[:, 1:].flatten().tolist()) == {0.0, 90.0, 180.0, 270.0}
    assert (params[:, 0] == 0).all()


def test_rotation_actions_are_the_turn_between_views():
    sequence = build_sequence(RotationConfig(), SIZE)
    params = torch.tensor([0.0, 90.0, 270.0, 180.0]).view(1, 4, 1)
    expected = torch.tensor([[1.0, 0.0], [0.0, -1.0], [-1.0, 0.0]])
    assert torch.equal(sequence.relative(params)[0], expected)  # exact, so that a constant looks like one


def test_rotation_angles_can_be_chosen():
    params = draw(build_sequence(RotationConfig(angles=[0, 180]), SIZE), 200)
    assert set(params[:, 1:].flatten().tolist()) == {0.0, 180.0}


def test_affine_views_equal_those_of_torchvision(digits):
    sequence = build_sequence(AffineConfig(), SIZE)
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
    sequence = build_sequence(AffineConfig(), SIZE)
    views = sequence.render(digits, draw(sequence))
    torch.testing.assert_close(views[:, 0], digits.permute(0, 3, 1, 2) / 255, rtol=0, atol=1e-5)


def test_affine_background_is_black():
    sequence = build_sequence(AffineConfig(scale=[0.5, 0.5], rotation=[0.0, 0.0]), SIZE)
    white = torch.full((8, 24, 24, 3), 255, dtype=torch.uint8)
    params = draw(sequence, 8)
    params[..., 1:3] = 0
    views = sequence.render(white, params)[:, 1:]
    assert (views[..., :5, :] == 0).all()
    assert (views[..., 8:16, 8:16] == 1).all()


def test_affine_draws_fill_their_ranges():
    config = AffineConfig(rotation=[-30.0, 60.0], translation=[-2, 5], scale=[0.5, 2.0])
    turn, shift_x, shift_y, log_scale = draw(build_sequence(config, SIZE), 4000)[:, 1:].flatten(0, 1).T
    assert -30 <= turn.min() < -29.5 < 59.5 < turn.max() < 60
    for shift in (shift_x, shift_y):
        assert set(shift.tolist()) == set(range(-2, 6))
    # log-uniform: the logarithm's mean is the middle of its range
    assert abs(log_scale.mean()) < 5 * (2 * math.log(2)) / math.sqrt(12 * 12_000)
    assert log_scale.min() >= -math.log(2) - 1e-4


def test_affine_actions_compose():
    sequence = build_sequence(AffineConfig(), SIZE)
    params = draw(sequence)
    actions = sequence.relative(params).double()
    turn = torch.atan2(actions[..., 0], actions[..., 1]).sum(1)
    last = params[:, -1].double()
    difference = torch.deg2rad(last[:, 0]) - turn
    torch.testing.assert_close(torch.sin(difference), torch.zeros(32).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(actions[..., 2:4].sum(1) * 4, last[:, 1:3], rtol=0, atol=1e-5)
    torch.testing.assert_close(actions[..., 4].sum(1), last[:, 3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_views_do_not_depend_on_the_batch(kind, digits):
    sequence = build_sequence(KINDS[kind](), SIZE)
    params = draw(sequence)
    whole = sequence.render(digits, params)
    parts = [sequence.render(i, p) for i, p in zip(digits.split(7), params.split(7), strict=True)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batches_give_empty_views(kind, digits):
    """The last batch may leave a process without a part."""
    sequence = build_sequence(KINDS[kind](), SIZE)
    params = draw(sequence, 0)
    assert sequence.render(digits[:0], params).shape == (0, 4, 3, 24, 24)
    assert sequence.actions(params).shape == (0, 3, sequence.action_dim)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [8, 64])
def test_other_sizes_and_lengths(kind, side):
    sequence = build_sequence(KINDS[kind](num_observed=1), (side, side))
    images = torch.randint(0, 256, (3, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = draw(sequence, 3)
    views = sequence.render(images, params)
    assert views.shape == (3, 2, 3, side, side)
    if kind == "augment":
        torch.testing.assert_close(views, augment_views(images, params, pil=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_cover_the_action(kind):
    sequence = build_sequence(KINDS[kind](num_observed=2), SIZE)
    dims = [d for dims in sequence.factors.values() for d in range(dims.start, dims.stop)]
    actions = sequence.actions(draw(sequence))
    assert sorted(dims) == list(range(sequence.action_dim))
    assert actions.shape == (32, 2, sequence.action_dim)


def test_affine_border_is_mirrored_at_the_outermost_pixels(digits):
    config = AffineConfig(rotation=[0.0, 0.0], scale=[1.0, 1.0], padding="reflect")
    sequence = build_sequence(config, SIZE)
    noise = torch.randint(0, 256, (4, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = torch.zeros(4, 2, 4)
    params[:, 1, 1:3] = torch.tensor([[3.0, 0.0], [-2.0, 1.0], [0.0, 4.0], [-4.0, -4.0]])
    views = sequence.render(noise, params)
    padded = torch.nn.functional.pad(noise.permute(0, 3, 1, 2) / 255, (4,) * 4, mode="reflect")
    for view, image, (_, x, y, _) in zip(views[:, 1], padded, params[:, 1].tolist(), strict=True):
        expected = image[:, 4 - int(y) : 28 - int(y), 4 - int(x) : 28 - int(x)]
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("still", "moving"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"translation": [0, 0], "scale": [1.0, 1.0]}, [0, 1]),  # the reference code's rot_only, and so on
        ({"rotation": [0.0, 0.0], "scale": [1.0, 1.0]}, [2, 3]),
        ({"rotation": [0.0, 0.0], "translation": [0, 0]}, [4]),
    ],
)
def test_affine_modes_move_one_factor(still, moving):
    sequence = build_sequence(AffineConfig(**still), SIZE)
    actions = sequence.actions(draw(sequence, 500))
    varies = actions.flatten(0, 1).std(0) > 0
    assert varies.nonzero().flatten().tolist() == moving


def augment(num_observed=3, *, full=False, normalization="standard", size=SIZE, **settings):
    config = AugmentConfig(num_observed=num_observed, full_actions=full, **settings)
    return build_sequence(config, size, ActionsConfig(normalization=normalization))


def test_augmented_views_equal_those_of_torchvision(digits):
    sequence = augment(blur=[0.7, 0.7], solarize=[0.3, 0.3])
    coloured = digits.roll(7, 1) // 3 + (digits.flip(0) * torch.tensor([1, 0, 1])) // 2  # digits are gray
    params = draw(sequence)
    expected = augment_views(coloured, params, pil=False)
    # thirty float32 operations on values of order one, none of which jumps
    error = (sequence.render(coloured, params) - expected).abs()
    assert error.mean() < 1e-6
    assert error.max() < 1e-5


def test_crops_are_drawn_as_torchvision_draws_them():
    sequence = augment(size=(32, 32))
    _, _, height, width = draw(sequence, 6000)[..., :4].flatten(0, 1).T
    image = torch.zeros(3, 32, 32)
    torch.manual_seed(0)
    theirs = torch.tensor([RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(24_000)])
    for mine, yours in ((height, theirs[:, 2]), (width, theirs[:, 3]), (height * width, theirs[:, 2] * theirs[:, 3])):
        ours, counts = mine.double().sort().values, yours.double().sort().values
        grid = torch.arange(0.5, 1025)
        distance = (torch.searchsorted(ours, grid) - torch.searchsorted(counts, grid)).abs().max() / 24_000
        assert distance < 1.95 * (2 / 24_000) ** 0.5  # Kolmogorov-Smirnov at 0.1 %


def test_crops_lie_in_the_image_and_fill_it():
    top, left, height, width = draw(augment(size=(32, 32)), 4000)[..., :4].flatten(0, 1).T
    assert (height.min() >= 12, height.max(), width.max()) == (True, 32, 32)
    assert (top >= 0).all()
    assert (top + height).max() == 32
    assert (left + width).max() == 32
    # where it can be anywhere it is anywhere
    places = top[height == 20].long().bincount()
    assert len(places) == 13
    assert ((places - places.sum() / 13).abs() < 5 * (places.sum() / 13) ** 0.5).all()


def test_a_crop_that_never_fits_is_the_largest_that_does():
    params = draw(augment(size=(8, 40), crop_area=[1.0, 1.0], crop_ratio=[0.5, 2.0]), 10)
    # as high as the image, twice as wide, in its middle; torchvision's fall-back is the same
    assert (params[..., :4] == torch.tensor([0.0, 12.0, 8.0, 16.0])).all()
    theirs = RandomResizedCrop.get_params(torch.zeros(3, 8, 40), [1.0, 1.0], [0.5, 2.0])
    assert tuple(params[0, 0, :4].tolist()) == theirs


def test_augmentations_occur_with_their_probabilities():
    params = draw(augment(), 5000)  # 15,000 observed views, 5,000 targets
    names = augment().param_names
    share = {name: (params[..., number] != 0).double().mean(0) for number, name in enumerate(names)}

    def near(found, probability, count):
        return abs(found - probability) < 5 * (probability * (1 - probability) / count) ** 0.5 + 1e-12

    assert near(share["flip"].mean(), 0.5, 20_000)
    assert near(share["grayscale"].mean(), 0.2, 20_000)
    assert (share["sigma"][:3] == 1).all()
    assert near(share["sigma"][3], 0.1, 5000)
    assert (share["solarize"][:3] == 0).all()
    assert near(share["solarize"][3], 0.2, 5000)
    assert near((params[..., 4] != 1).double().mean(), 0.8, 20_000)
    still = params[params[..., 4] == 1]
    assert (still[:, 4:8] == torch.tensor([1.0, 1.0, 1.0, 0.0])).all()
    counts = params[..., 12].flatten().long().bincount()
    assert len(counts) == 24
    assert ((counts - 20_000 / 24).abs() < 5 * (20_000 / 24) ** 0.5).all()


def test_full_actions_include_the_rest():
    plain, full = augment(), augment(full=True)
    params = draw(plain)
    assert torch.equal(params, draw(full))
    assert (plain.action_dim, full.action_dim) == (9, 12)
    assert torch.equal(full.relative(params)[..., :9], plain.relative(params))
    assert torch.equal(full.relative(params)[..., 9], params[:, 1:, 9] - params[:, :-1, 9])
    # nothing but the order of the jitter is left untold
    assert set(range(13)) - {d for dims in full.factors.values() for d in range(dims.start, dims.stop)} == {12}


@pytest.mark.parametrize("kind", KINDS)
def test_standard_actions_have_mean_zero_and_deviation_one(kind):
    sequence = build_sequence(KINDS[kind](num_observed=2), SIZE)
    params = draw(sequence, 20_000, seed=5)
    moves = sequence.actions(torch.cat([params[:, 1:2], params[:, 1:2].roll(1, 0)], 1))[:, 0].double()
    assert moves.mean(0).abs().max() < 0.05  # 4,096 moves there and back settle the statistics
    assert (moves.std(0) - 1).abs().max() < 0.05


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 8])
def test_standard_actions_do_not_depend_on_the_other_views(kind, length):
    sequence = build_sequence(KINDS[kind](num_observed=length), SIZE)
    params = draw(sequence)
    torch.testing.assert_close(sequence.actions(params)[:, :1], sequence.actions(params[:, :2]), rtol=0, atol=0)
    other = build_sequence(KINDS[kind](num_observed=3), SIZE)
    assert torch.equal(other.actions(params), sequence.actions(params))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalization", ["standard", "none"])
def test_inverse_actions_lead_back(kind, normalization):
    sequence = build_sequence(KINDS[kind](), SIZE, ActionsConfig(normalization=normalization))
    params = draw(sequence)
    there, back = sequence.actions(params), sequence.inverse_actions(params)
    for step in range(3):
        swapped = params[:, [step + 1, step]]
        torch.testing.assert_close(back[:, step : step + 1], sequence.actions(swapped), rtol=0, atol=1e-6)
    sign = torch.full((sequence.action_dim,), -1.0)
    if kind != "augment":
        sign[1] = 1.0  # the cosine of a turn is that of the turn back
    torch.testing.assert_close(back, there * sign, rtol=0, atol=1e-3)  # sampled means of shifts are zero but for 1e-4


def test_view_l2_equals_the_reference_code_and_leaks_the_target():
    with pytest.warns(UserWarning, match="view_l2 .* depend on the target"):
        sequence = augment(normalization="view_l2")
    params = draw(sequence)
    absolute = params[..., :9].double()
    expected = (absolute / absolute.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12)).diff(dim=1)
    torch.testing.assert_close(sequence.actions(params).double(), expected, rtol=0, atol=1e-6)
    other = params.clone()
    other[:, -1] = params.roll(1, 0)[:, -1]  # another target
    assert not torch.allclose(sequence.actions(other)[:, 0], sequence.actions(params)[:, 0])


@pytest.mark.realdata
@pytest.mark.parametrize(("dataset", "padding"), [("mnist", "zeros"), ("cifar10", "reflect")])
def test_affine_views_of_real_images_equal_those_of_torchvision(data_root, dataset, padding):
    folder = data_root / dataset if dataset != "mnist" else data_root
    images = torch.from_numpy(read_images(dataset, folder, "test").pixels[:50])
    side = images.shape[1]
    config = AffineConfig(rotation=[-180.0, 180.0], scale=[0.7, 1.3], padding=padding)
    sequence = build_sequence(config, (side, side))
    params = draw(sequence, len(images))
    views = sequence.render(images, params)
    # torchvision has no reflected border: a border of its own is wide enough for these moves, and cut off again
    border = side - 1
    mode = {"zeros": "constant", "reflect": "reflect"}[padding]
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2) / 255, (border,) * 4, mode=mode)
    for image, image_views, image_params in zip(padded, views, params, strict=True):
        for view, (turn, x, y, log_scale) in zip(image_views, image_params.tolist(), strict=True):
            shift = [round(x), round(y)]
            moved = affine(image, -turn, shift, math.exp(log_scale), [0.0], InterpolationMode.BILINEAR)
            # float32 coordinates over three times the side, times a slope of at most 1 a pixel
            torch.testing.assert_close(view, center_crop(moved, [side, side]), rtol=0, atol=3e-4)


@pytest.mark.realdata
def test_ten_thousand_augmented_views_of_cifar_equal_those_of_torchvision(data_root):
    """10,000 views of real images, each bound with its reason."""
    images = torch.from_numpy(read_images("cifar100", data_root / "cifar100", "test").pixels[:2500])
    sequence = augment(size=(32, 32))
    params = draw(sequence, len(images))
    assert params.shape[:2] == (2500, 4)
    error = (sequence.render(images, params) - augment_views(images, params, pil=False)).abs()
    assert error.mean() < 1e-6  # rounding of some thirty float32 operations on values of order one
    assert error.max() < 1e-5  # no operation jumps: solarise inverts at 1/2, and equal colours have no hue to lose


@pytest.mark.realdata
def test_rotations_of_cifar_equal_those_of_pillow(data_root):
    images = torch.from_numpy(read_images("cifar10", data_root / "cifar10", "test").pixels[:64])
    sequence = build_sequence(RotationConfig(), SIZE)
    params = draw(sequence, 64)
    views = (sequence.render(images, params) * 255).round().byte()
    for image, image_views, image_params in zip(images, views, params, strict=True):
        for view, angle in zip(image_views, image_params[:, 0].tolist(), strict=True):
            expected = np.asarray(Image.fromarray(image.numpy()).rotate(angle))
            assert np.array_equal(view.permute(1, 2, 0).numpy(), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 16), (16, 1), (2, 2), (2, 9), (200, 3)])
@pytest.mark.parametrize("ratio", [[0.75, 4 / 3], [0.1, 0.2], [5.0, 10.0]])
def test_very_small_and_thin_images(kind, size, ratio):
    """Rendered, or refused in a line. An image of one colour has views of that colour: black is beyond its edge."""
    plain = {"jitter": 0.0, "grayscale": 0.0, "solarize": [0.0, 0.0]}
    ratios = {"crop_ratio": ratio} if kind == "augment" else {}
    config = KINDS[kind](**{"augment": ratios | plain, "affine": {"padding": "reflect"}}.get(kind, {}))
    if (kind == "affine" and min(size) < 2) or (kind == "rotation" and size[0] != size[1]):
        with pytest.raises(InputError, match=f"{size[1]}x{size[0]}") as caught:
            build_sequence(config, size)
        assert "\n" not in str(caught.value)
        return
    sequence = build_sequence(config, size)
    params = draw(sequence, count=40)
    colour = torch.tensor([10, 128, 250], dtype=torch.uint8)
    views = sequence.render(colour.expand(40, *size, 3), params)
    assert views.shape == (40, 4, 3, *size)
    torch.testing.assert_close(views, (colour / 255).view(3, 1, 1).expand_as(views), rtol=0, atol=1e-5)
    assert sequence.actions(params).isfinite().all()
    noise = torch.randint(256, (40, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = build_sequence(KINDS[kind](**ratios), size).render(noise, params)
    assert ((whole >= 0) & (whole <= 1)).all()
    if kind == "augment":
        top, left, height, width = params[..., :4].unbind(-1)
        assert ((height >= 1) & (top >= 0) & (top + height <= size[0])).all()
        assert ((width >= 1) & (left >= 0) & (left + width <= size[1])).all()
