"""Counter-based draws: the generator's published answers, its independence of everything but the address."""

import numpy as np
import pytest
import torch

from seqjepa.loaders.draws import integers, philox, uniform, words

M32 = 0xFFFFFFFF


def philox_in_python(key, counter):
    """Philox4x32-10 from its paper, in Python's unbounded integers."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for number in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 2**32)
        w0, w1 = (k0 + number * 0x9E3779B9) & M32, (k1 + number * 0xBB67AE85) & M32
        c0, c1, c2, c3 = high1 ^ c1 ^ w0, low1, high0 ^ c3 ^ w1, low0
    return c0, c1, c2, c3


def as_tensor(values):
    return tuple(torch.tensor(value) for value in values)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # known answers published with Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((M32,) * 4, (M32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, answer):
    assert tuple(int(word) for word in philox(key, as_tensor(counter))) == answer


def test_words_are_philox_of_their_address():
    index = torch.tensor([0, 5, 59_999])
    drawn = words(1234, 1, 77, index, num_views=3, num_draws=6)
    assert drawn.shape == (3, 3, 6)
    for row, image in enumerate(index.tolist()):
        for view in range(3):
            expected = [w for block in range(2) for w in philox_in_python((1234, 1), (image, view, block, 77))]
            assert drawn[row, view].tolist() == expected[:6]


def test_words_do_not_depend_on_the_batch():
    index = torch.randperm(1000)
    whole = words(3, 0, 2, index, 4, 4)
    for size in (1, 7, 512):
        parts = torch.cat([words(3, 0, 2, part, 4, 4) for part in index.split(size)])
        assert torch.equal(parts, whole)


def test_every_coordinate_of_the_address_matters():
    index = torch.arange(64)
    base = words(1, 0, 0, index, 2, 4)
    others = [words(2, 0, 0, index, 2, 4), words(1, 1, 0, index, 2, 4), words(1, 0, 1, index, 2, 4)]
    others += [words(1, 0, 0, index + 64, 2, 4), base.flip(1), base.flip(2)]
    for other in others:
        # 512 words: two equal ones have a chance of 1e-7
        assert not (base == other).any()


def test_draws_have_the_same_bits_compiled():
    def draw(index):
        drawn = words(42, 0, 9, index, 4, 3)
        return (
            uniform(drawn[..., 0], -75.0, 75.0),
            uniform(drawn[..., 1], -0.5108, 0.0),
            integers(drawn[..., 2], -4, 4),
        )

    index = torch.arange(500)
    compiled = torch.compile(draw, fullgraph=True)
    for eager_values, compiled_values in zip(draw(index), compiled(index), strict=True):
        assert torch.equal(eager_values, compiled_values)


def test_uniform_fills_its_range_evenly():
    drawn = words(0, 0, 0, torch.arange(40_000), 1, 1).flatten()
    values = uniform(drawn, -30.0, 50.0)
    assert values.dtype == torch.float32
    assert values.min() >= -30
    assert values.max() < 50
    # fixed point: every value is a multiple of 2**-16, so nothing was rounded
    assert torch.equal(values * 65536, (values * 65536).round())
    counts, _ = np.histogram(values.numpy(), bins=100, range=(-30, 50))
    chi2 = ((counts - 400) ** 2 / 400).sum()
    assert 50 < chi2 < 160  # 99 degrees of freedom: mean 99, standard deviation 14


def test_integers_are_inclusive_and_even():
    drawn = words(0, 0, 0, torch.arange(40_000), 1, 1).flatten()
    values, counts = integers(drawn, -3, 4).unique(return_counts=True)
    assert values.tolist() == list(range(-3, 5))
    assert ((counts - 5000).abs() < 5 * (5000 * 7 / 8) ** 0.5).all()
