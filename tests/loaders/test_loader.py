"""The batch contract."""

import pytest
import torch

from seqjepa.configs.errors import InputError
from seqjepa.loaders.batch import Batch
from seqjepa.loaders.config import AffineConfig, DataConfig
from seqjepa.loaders.loader import build_loaders

CPU = torch.device("cpu")


def build(batch=16, sequence=None, **settings):
    data = DataConfig(dataset="digits", batch_size=batch, train_subset=100, val_subset=50)
    return build_loaders(data, sequence or AffineConfig(), seed=0, device=CPU, **settings)


def joined(batches):
    return Batch(*(torch.cat(field) for field in zip(*batches, strict=True)))


def test_shapes_and_dtypes():
    loaders = build(sequence=AffineConfig(num_observed=2))
    batch = next(loaders.train.epoch(0))
    assert batch.views.shape == (16, 3, 3, 24, 24)
    assert batch.actions.shape == (16, 2, 5)
    assert batch.params.shape == (16, 3, 4)
    assert batch.labels.shape == batch.index.shape == (16,)
    assert [field.dtype for field in batch] == [torch.float32] * 3 + [torch.int64] * 2
    assert len(loaders.train) == 6
    assert len(loaders.validation) == 4


def test_first_views_are_normalised():
    # the digits' own statistics: view 0 of all training images has mean 0 and variance 1
    data = DataConfig(dataset="digits", batch_size=1438)
    views = next(build_loaders(data, AffineConfig(), seed=0, device=CPU).train.epoch(0)).views[:, 0]
    assert abs(views.mean()) < 1e-3
    assert abs(views.std() - 1) < 1e-3


def test_a_sample_gets_the_same_views_in_any_batch_and_process():
    whole = joined(build(batch=50).train.epoch(4))
    by_image = {int(index): row for row, index in enumerate(whole.index)}
    others = [build(batch=7), build(batch=10, rank=1, num_processes=2)]
    for loaders in others:
        batch = joined(loaders.train.epoch(4))
        rows = [by_image[int(index)] for index in batch.index if int(index) in by_image]
        mine = [row for row, index in enumerate(batch.index) if int(index) in by_image]
        assert len(rows) > 40
        assert torch.equal(batch.params[mine], whole.params[rows])
        torch.testing.assert_close(batch.views[mine], whole.views[rows], rtol=0, atol=1e-4)


def test_training_draws_change_with_the_epoch_and_validation_draws_do_not():
    loaders = build()
    ours, later = joined(loaders.train.epoch(0)), joined(loaders.train.epoch(1))
    both = set(ours.index.tolist()) & set(later.index.tolist())
    rows = [(ours.index.tolist().index(i), later.index.tolist().index(i)) for i in both]
    assert not any(torch.equal(ours.params[a, 1:], later.params[b, 1:]) for a, b in rows)
    for one, other in zip(joined(loaders.validation.epoch(0)), joined(loaders.validation.epoch(8)), strict=True):
        assert torch.equal(one, other)


def test_held_out_images_are_of_the_training_split_and_not_trained_on():
    data = DataConfig(dataset="digits", batch_size=16, train_subset=100, val_subset=50, held_out=300)
    loaders = build_loaders(data, AffineConfig(), seed=0, device=CPU)
    trained, held_out = loaders.train.sampler.indices, loaders.validation.sampler.indices
    assert (len(trained), len(held_out)) == (100, 300)
    assert not set(trained) & set(held_out)
    whole = build_loaders(data.model_copy(update={"train_subset": None}), AffineConfig(), seed=0, device=CPU)
    assert sorted([*whole.train.sampler.indices, *whole.validation.sampler.indices]) == list(range(1438))
    # validation draws, of training images
    batch = next(loaders.validation.epoch(0))
    pixels = next(whole.validation.images.batches([batch.index.numpy()]))[0]
    clean = pixels.permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(batch.views[:, 0], (clean - whole.train.mean) / whole.train.std, rtol=0, atol=1e-5)
    assert torch.equal(batch.params, next(loaders.validation.epoch(3)).params)
    other = build_loaders(data.model_copy(update={"subset_seed": 7}), AffineConfig(), seed=0, device=CPU)
    assert set(other.validation.sampler.indices) != set(held_out)
    with pytest.raises(InputError, match="leaves none of the 1438 training images") as caught:
        build_loaders(data.model_copy(update={"held_out": 1438}), AffineConfig(), seed=0, device=CPU)
    assert caught.value.field == "data.held_out"


def test_refuses_a_batch_larger_than_the_images():
    with pytest.raises(InputError, match="101 is larger than the 100 training images") as caught:
        build(batch=101)
    assert caught.value.field == "data.batch_size"
