"""Streams: which images come when, what is kept of them, and that both are pure functions of the seed."""

import heapq

import numpy as np
import pytest
import torch

from seqjepa.configs.errors import InputError
from seqjepa.loaders.config import AffineConfig, AugmentConfig, DataConfig, RotationConfig
from seqjepa.loaders.draws import REPLAY_STREAM, keys
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.sampler import Sampler
from seqjepa.loaders.sequences import build_sequence
from seqjepa.loaders.streams.config import (
    BalancedConfig,
    ClassesConfig,
    FactorsConfig,
    NoBufferConfig,
    NoStreamConfig,
    ReservoirConfig,
)
from seqjepa.loaders.streams.order import Stream, Task
from seqjepa.loaders.streams.replay import Balanced, Reservoir

CPU = torch.device("cpu")
LABELS = np.arange(600) % 6


def built(buffer=None, *, tasks=3, seed=0, sharing=(0, 1), micro_batches=1, **settings) -> Stream:
    """A stream of 600 images in equal tasks, 20 to a batch."""
    parts = np.array_split(np.arange(600), tasks)
    sampler = Sampler(
        np.arange(600),
        batch_size=20,
        seed=seed,
        train=True,
        rank=sharing[0],
        num_processes=sharing[1],
        micro_batches=micro_batches,
    )
    config = ClassesConfig(tasks=tasks, buffer=buffer or NoBufferConfig(), **settings)
    return Stream(config, [Task(str(n), part, part, None) for n, part in enumerate(parts)], LABELS, sampler)


def test_a_single_pass_shows_every_image_once():
    stream = built()
    assert stream.starts.tolist() == [0, 10, 20, 30]
    for task in range(3):
        seen = np.concatenate([stream.batch(step)[0] for step in range(10 * task, 10 * task + 10)])
        assert sorted(seen) == list(range(200 * task, 200 * task + 200))
        assert seen.tolist() != sorted(seen)


def test_more_steps_pass_over_a_task_again_in_another_order():
    stream = built(steps=25)
    first, second = (np.concatenate([stream.new(step)[0] for step in range(n, n + 10)]) for n in (0, 10))
    assert sorted(first) == sorted(second) == list(range(200))
    assert first.tolist() != second.tolist()
    assert {turn for step in range(10) for turn in stream.batch(step)[1]} == {0}
    assert {turn for step in range(10, 20) for turn in stream.batch(step)[1]} == {2}
    assert stream.starts.tolist() == [0, 25, 50, 75]


def test_a_buffer_takes_its_share_after_the_first_step():
    stream, picked, places = built(ReservoirConfig(size=50, share=0.25), steps=30), [], []
    for step in range(90):
        positions, visits = stream.batch(step)
        old = visits % 2 == 1
        assert (visits[old] == 2 * step + 1).all()
        assert len(positions) == 20
        assert old.sum() == (5 if step else 0)
        arrived = {image for before in range(step) for image in stream.new(before)[0]}
        assert set(positions[old]) <= arrived
        assert sorted(positions[~old]) == sorted(stream.new(step)[0])
        assert len(set(positions[old])) == old.sum()  # none twice
        picked.append(frozenset(positions[old]))
        places.append(np.flatnonzero(old).mean() if step else None)
    assert len(set(picked)) > 80  # others in each step
    assert np.std(places[1:]) > 2  # and not always at the end of the batch


def test_a_reservoir_is_what_an_algorithm_with_state_keeps():
    """A heap that takes each image as it arrives, and throws out the one with the smallest key."""
    stream = built(ReservoirConfig(size=50, share=0.25), steps=12)
    numbers, heap, seen = keys(0, REPLAY_STREAM, np.arange(600)), [], set()
    for step in range(36):
        assert set(stream.kept(step)) == {image for _, image in heap}
        for image in stream.new(step)[0]:
            if image not in seen:
                seen.add(image)
                heapq.heappush(heap, (numbers[image], image))
                if len(heap) > 50:
                    heapq.heappop(heap)
    assert len(heap) == 50


def test_every_image_is_as_likely_to_be_kept():
    """χ² of 200 images over 400 seeds, 20 kept each: between the 0.1 and 99.9 % quantiles of 199 degrees of freedom."""
    counts = np.zeros(200)
    for seed in range(400):
        numbers = keys(seed, REPLAY_STREAM, np.arange(200))
        kept = Reservoir(ReservoirConfig(size=20), numbers, LABELS[:200], LABELS[:200]).kept(np.arange(200))
        counts[kept] += 1
    expected, chance = 40.0, 0.1
    chi_square = ((counts - expected) ** 2 / (expected * (1 - chance))).sum()
    assert 140 < chi_square < 267


@pytest.mark.parametrize("by", ["task", "class"])
def test_a_balanced_buffer_has_as_many_of_each(by):
    tasks = np.repeat([0, 1, 2], 200)
    groups = tasks if by == "task" else LABELS
    buffer = Balanced(BalancedConfig(size=50, by=by), keys(3, REPLAY_STREAM, np.arange(600)), tasks, LABELS)
    kept = buffer.kept(np.arange(600))
    _, counts = np.unique(groups[kept], return_counts=True)
    assert len(kept) == 50
    assert counts.max() - counts.min() <= 1
    # of a group it keeps what a reservoir of the group would
    first = groups[kept] == 0
    alone = Reservoir(ReservoirConfig(size=int(first.sum())), buffer.keys, tasks, LABELS)
    assert set(kept[first]) == set(alone.kept(np.flatnonzero(groups == 0)))
    # a group that is too small leaves its places to the others
    few = np.concatenate([np.flatnonzero(groups == 0)[:3], np.flatnonzero(groups == 1)])
    assert len(buffer.kept(few)) == 50
    assert (groups[buffer.kept(few)] == 0).sum() == 3


@pytest.mark.parametrize(
    "buffer", [ReservoirConfig(size=50), *(BalancedConfig(size=50, by=by) for by in ("task", "class"))]
)
def test_what_is_kept_does_not_depend_on_where_one_starts(buffer):
    """Step after step, or at once as after a restart, or back again."""
    stream = built(buffer, steps=13)
    in_order = [stream.kept(step).tolist() for step in range(39)]
    for step in (38, 7, 20):
        assert sorted(built(buffer, steps=13).kept(step)) == sorted(in_order[step])
        assert sorted(stream.kept(step)) == sorted(in_order[step])


def test_a_task_that_is_smaller_than_a_batch_gets_other_views_each_time():
    stream = built(tasks=60, steps=3)
    for step in range(180):
        positions, visits = stream.batch(step)
        assert len(positions) == 20
        assert len(set(zip(positions.tolist(), visits.tolist(), strict=True))) == 20


@pytest.mark.parametrize("settings", [{}, {"steps": 17}, {"boundary": 0.5, "steps": 20}, {"mixed": True}])
def test_processes_share_the_batches_of_one(settings):
    """Each image of a step is on one process, with the same visit, and micro-batches do not change which."""
    buffer = ReservoirConfig(size=40, share=0.5)
    whole = built(buffer, **settings)
    parts = [built(buffer, sharing=(rank, 2), micro_batches=2, **settings) for rank in range(2)]
    for step in (0, 1, 7, 29):
        pairs = [list(zip(*part.batch(step), strict=True)) for part in parts]
        assert len(pairs[0]) == len(pairs[1]) == 10
        assert sorted(pairs[0] + pairs[1]) == sorted(zip(*whole.batch(step), strict=True))


def test_a_mixed_stream_has_all_tasks_from_the_start():
    stream = built(mixed=True)
    assert stream.starts.tolist() == [0, 10, 20, 30]
    seen = np.concatenate([stream.batch(step)[0] for step in range(30)])
    assert sorted(seen) == list(range(600))
    assert len({image // 200 for image in stream.batch(0)[0]}) == 3


def test_a_blurred_boundary_gives_way_step_by_step():
    stream = built(steps=20, boundary=0.5)  # ten steps around each boundary
    shares = stream.counts / stream.counts.sum(1, keepdims=True)
    assert (stream.counts.sum(1) == 20).all()
    assert (shares[:15, 0] == 1).all()
    assert (shares[25:35, 1] == 1).all()
    assert (shares[45:, 2] == 1).all()
    rising = shares[15:25, 1]
    assert (np.diff(rising) > 0).all()
    assert rising[0] < 0.1
    assert np.allclose(rising, 1 - rising[::-1])  # as much of the next task before as of the last one after


def test_the_seed_draws_the_order():
    one, same, other = (built(seed=seed) for seed in (5, 5, 6))
    assert all((one.batch(step)[0] == same.batch(step)[0]).all() for step in range(30))
    assert any((one.batch(step)[0] != other.batch(step)[0]).any() for step in range(30))


# -- real images


def digits(stream, sequence=None, *, seed=0):
    data = DataConfig(dataset="digits", batch_size=16, train_subset=400, val_subset=200)
    return build_loaders(data, sequence or AffineConfig(), stream=stream, seed=seed, device=CPU)


def test_classes_are_divided_among_the_tasks():
    loaders = digits(ClassesConfig(tasks=3))
    train, validation = loaders.train, loaders.validation
    found = []
    for task in loaders.stream.tasks:
        classes = {int(name) for name in task.name.split(", ")}
        for loader, positions in ((train, task.train), (validation, task.validation)):
            labels = loader.images.labels[torch.from_numpy(positions)]
            assert set(labels.tolist()) == classes
        found.append(classes)
    assert sorted(map(len, found)) == [3, 3, 4]
    assert set.union(*found) == set(range(10))
    for side, loader in (("train", train), ("validation", validation)):
        positions = np.concatenate([getattr(task, side) for task in loaders.stream.tasks])
        assert sorted(positions) == sorted(loader.sampler.indices)
    orders = {tuple(task.name for task in digits(ClassesConfig(tasks=3), seed=seed).stream.tasks) for seed in range(4)}
    assert len(orders) > 1


def test_only_the_factors_of_a_task_vary():
    stream = FactorsConfig(factors=[["rotation"], ["translation_x", "translation_y"], ["scale"]])
    loaders = digits(stream)
    columns = {"rotation": [0], "translation_x, translation_y": [1, 2], "scale": [3]}
    moved = set()
    of = {int(image): task.name for task in loaders.stream.tasks for image in task.train}
    for step in range(int(loaders.stream.starts[-1])):
        (batch,) = loaders.train.arriving([loaders.stream.batch(step)])
        for image, params in zip(batch.index.tolist(), batch.params[:, 1:], strict=True):
            moving = {column for column in range(4) if (params[:, column] != 0).any()}
            assert moving <= set(columns[of[image]])
            moved |= moving
    assert moved == {0, 1, 2, 3}
    for task in loaders.stream.tasks:
        (batch, *_) = loaders.validation.restricted(task.validation).epoch(0)
        deviation = batch.params[:, 1:].flatten(0, 1).std(0)
        assert [column for column in range(4) if deviation[column] > 0] == columns[task.name]
        # what moves has the draws that it has without a stream
        plain = {}
        for part in digits(NoStreamConfig()).validation.epoch(0):
            plain |= zip(part.index.tolist(), part.params, strict=True)
        expected = torch.stack([plain[image] for image in batch.index.tolist()])
        assert torch.equal(batch.params[..., columns[task.name]], expected[..., columns[task.name]])


def test_a_held_view_is_the_image_itself():
    for config in (AffineConfig(), AugmentConfig()):
        sequence = build_sequence(config, (24, 24))
        images = torch.randint(0, 256, (2, 24, 24, 3), dtype=torch.uint8)
        params = torch.rand(2, 4, len(sequence.param_names))
        params = sequence.weakened(params, sequence.strengths([])[None].expand(2, -1))
        views = sequence.render(images, params)
        expected = (images.permute(0, 3, 1, 2).float() / 255)[:, None].expand_as(views)
        torch.testing.assert_close(views, expected, atol=2e-3, rtol=0)
        covered = [column for columns in sequence.columns.values() for column in columns]
        assert sorted(covered) == list(range(len(sequence.param_names)))  # each parameter has one factor
        assert set(sequence.factors) <= set(sequence.columns)


@pytest.mark.parametrize("config", [AffineConfig(translation=[-7, 7]), AugmentConfig(crop_area=[0.2, 1.0])])
@pytest.mark.parametrize("strength", [0.1, 0.25, 0.5, 0.7, 1.0])
def test_a_weak_move_is_a_share_of_a_strong_one(config, strength):
    sequence = build_sequence(config, (24, 20))
    params = sequence.params(torch.randint(0, 2**32, (64, 4, sequence.num_draws)))
    names, share = sequence.param_names, round(1024 * strength) / 1024
    every = sequence.strengths(sequence.columns, strength)[None].expand(64, -1)
    moved = sequence.weakened(params, every)
    if strength == 1:
        assert torch.equal(moved, params)
    still = torch.tensor([0.0] * 4 if len(names) == 4 else [0, 0, 24, 20, 1, 1, 1] + [0] * 6)
    for column, name in enumerate(names):
        way = params[..., column].double() - still[column]
        found = moved[..., column].double() - still[column]
        if name in ("flip", "grayscale", "solarize", "order"):
            assert torch.equal(found, way)
        elif name in ("top", "left", "height", "width", "shift x", "shift y"):
            assert torch.equal(found, (share * way).trunc())
        else:
            torch.testing.assert_close(found, share * way, rtol=1e-5, atol=1e-6)
    if len(names) > 4:  # the crop stays within the image
        top, left, height, width = moved[..., :4].unbind(-1)
        assert ((top + height <= 24) & (left + width <= 20) & (height >= 1) & (width >= 1)).all()


def test_the_moves_of_a_task_have_its_strength():
    stream = FactorsConfig(factors=[["rotation", "scale"], ["rotation"], ["rotation"]], strengths=[0.25, 0.5, 1])
    loaders, plain = digits(stream), digits(NoStreamConfig())
    names = [task.name for task in loaders.stream.tasks]
    assert names == ["rotation, scale at 0.25", "rotation at 0.5", "rotation at 1"]
    for kind in ("train", "validation"):
        drawn = {}
        for part in getattr(plain, kind).epoch(0):
            drawn |= zip(part.index.tolist(), part.params, strict=True)
        for task, share in zip(loaders.stream.tasks, (0.25, 0.5, 1), strict=True):
            (batch, *_) = getattr(loaders, kind).restricted(getattr(task, kind)).epoch(0)
            expected = torch.stack([drawn[image] for image in batch.index.tolist()]) * share
            expected[..., 1:] = expected[..., 1:] * torch.tensor([0, 0, "scale" in task.name])
            torch.testing.assert_close(batch.params, expected)
            assert expected[..., 0].abs().amax() > 40 * share


def test_an_image_that_comes_again_gets_new_views():
    loaders = digits(ClassesConfig(tasks=2, steps=40, buffer=ReservoirConfig(size=20, share=0.5)))
    params: dict[int, list] = {}
    for batch in loaders.train.arriving([loaders.stream.batch(step) for step in range(20)]):
        for image, drawn in zip(batch.index.tolist(), batch.params, strict=True):
            params.setdefault(image, []).append(tuple(drawn.flatten().tolist()))
    again = {image: drawn for image, drawn in params.items() if len(drawn) > 1}
    assert again
    assert all(len(set(drawn)) == len(drawn) for drawn in again.values())


@pytest.mark.parametrize(
    ("stream", "sequence", "said"),
    [
        (ClassesConfig(tasks=11), AffineConfig(), "11 is more than the 10 classes"),
        (FactorsConfig(factors=[["rotation"], ["zoom"]]), AffineConfig(), "zoom: sequence.kind=affine has rotation"),
        (FactorsConfig(factors=[["rotation"], ["rotation"]]), RotationConfig(), "has no factor that can be held"),
        (
            FactorsConfig(factors=[["flip", "crop"], ["flip"]], strengths=[0.5, 0.5]),
            AugmentConfig(),
            "flip is drawn or not; its strength can be 1, not 0.5",
        ),
        (ClassesConfig(buffer=ReservoirConfig(size=5)), AffineConfig(), "5 is less than the 8 sequences of a batch"),
        (
            FactorsConfig(factors=[["rotation"], ["scale"]] * 50, buffer=ReservoirConfig(size=50)),
            AffineConfig(),
            "takes 8 sequences from the buffer, but the first brings only 4 images",
        ),
        (
            FactorsConfig(factors=[["rotation"]] * 500),
            AffineConfig(),
            "the task .rotation. has no (training|test) images",
        ),
    ],
)
def test_what_cannot_be_streamed(stream, sequence, said):
    with pytest.raises(InputError, match=said):
        digits(stream, sequence)


def test_tasks_must_be_two_lists_of_factors():
    for tasks in ([["rotation"]], [["rotation"], []]):
        with pytest.raises(ValueError, match="two or more lists of factors"):
            FactorsConfig(factors=tasks)
    with pytest.raises(ValueError, match="gives 3 for 2 tasks"):
        FactorsConfig(factors=[["rotation"], ["scale"]], strengths=[0.1, 0.2, 0.3])
