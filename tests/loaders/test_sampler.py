"""The sampler: every image once, the same order for everybody."""

import random

import numpy as np
import pytest

from seqjepa.configs.errors import InputError
from seqjepa.loaders.sampler import Sampler, subset


def make(number=103, batch=10, **settings):
    settings = {"seed": 5, "train": True} | settings
    return Sampler(np.arange(number) * 3, batch_size=batch, **settings)


def test_subsets_hold_the_same_images_as_in_the_reference_code():
    expected = list(range(100))
    random.Random(42).shuffle(expected)
    assert subset(100, 12, 42).tolist() == expected[:12]
    assert subset(100, None, 42).tolist() == subset(100, 100, 7).tolist() == list(range(100))


def test_an_epoch_has_every_image_once_and_drops_the_rest():
    sampler = make()
    assert sorted(sampler.order(4)) == sorted(sampler.indices)
    batches = sampler.batches(4)
    assert len(batches) == len(sampler) == 10
    assert all(len(batch) == 10 for batch in batches)
    assert np.array_equal(np.concatenate(batches), sampler.order(4)[:100])


def test_order_is_a_function_of_seed_and_epoch():
    assert np.array_equal(make().order(3), make(batch=7).order(3))
    for other in (make(seed=6).order(3), make().order(4), make().indices):
        assert (make().order(3) != other).mean() > 0.9


def test_orders_are_uniform_permutations():
    # where image 0 lands over 2000 epochs of 8 images: 250 times in each place, standard deviation 15
    sampler = make(number=8, batch=8)
    places = [int(np.flatnonzero(sampler.order(epoch) == 0)[0]) for epoch in range(2000)]
    counts = np.bincount(places, minlength=8)
    assert np.abs(counts - 250).max() < 75


@pytest.mark.parametrize("processes", [1, 2, 5])
def test_processes_share_each_batch(processes):
    whole = make().batches(2)
    parts = [make(rank=rank, num_processes=processes).batches(2) for rank in range(processes)]
    for number, batch in enumerate(whole):
        joined = np.concatenate([part[number] for part in parts])
        assert np.array_equal(joined, batch)


def test_start_skips_batches():
    for number, batch in enumerate(make().batches(1, start=6), start=6):
        assert np.array_equal(batch, make().batches(1)[number])


def test_validation_keeps_order_and_tail():
    sampler = make(train=False, num_processes=2)
    other = make(train=False, num_processes=2, rank=1)
    joined = [np.concatenate(parts) for parts in zip(sampler.batches(0), other.batches(9), strict=True)]
    assert np.array_equal(np.concatenate(joined), sampler.indices)
    assert [len(batch) for batch in joined] == [10] * 10 + [3]


def test_refuses_batches_that_do_not_fit():
    with pytest.raises(InputError, match="104 is larger than the 103 training images"):
        make(batch=104)
    with pytest.raises(InputError, match="10 is not divisible by 3 processes"):
        make(num_processes=3)


def test_micro_batches_are_shared_one_by_one():
    """The first micro-batches of all processes are the batch's first, as one process has it."""
    whole = make(96, 24).batches(0)[1]
    for processes, micro_batches in ((2, 3), (4, 2)):
        columns = []
        for rank in range(processes):
            part = make(96, 24, rank=rank, num_processes=processes, micro_batches=micro_batches).batches(0)[1]
            columns.append(np.split(part, micro_batches))
        rows = [np.concatenate(micro_batch) for micro_batch in zip(*columns, strict=True)]
        assert np.array_equal(np.concatenate(rows), whole)
