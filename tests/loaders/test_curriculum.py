"""Curricula: which programs take part in an epoch, and that nothing else changes."""

import numpy as np
import pytest
import torch

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.loaders.config import ActionsConfig, CompetenceConfig, DataConfig, PhasesConfig, ProgramConfig
from seqjepa.loaders.grids.moves import OUTSIDE
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.sampler import Sampler
from seqjepa.loaders.sequences import build_sequence

PLAIN = ActionsConfig(normalization="none")
CPU = torch.device("cpu")


def sampler(share, number=90, **settings):
    difficulty = np.random.default_rng(0).integers(0, 5, number)
    made = Sampler(
        np.arange(number) * 2,
        batch_size=10,
        seed=3,
        train=True,
        curriculum=share,
        difficulty=lambda: difficulty,
        **settings,
    )
    return made, dict(zip(made.indices.tolist(), difficulty.tolist(), strict=True))


def test_phases_add_part_after_part():
    shares = [PhasesConfig(until=[2, 5]).share(epoch) for epoch in range(7)]
    assert shares == [1 / 3] * 2 + [2 / 3] * 3 + [1.0] * 2
    assert [PhasesConfig(until=[1]).share(epoch) for epoch in range(2)] == [0.5, 1.0]
    for wrong in ([5, 2], [2, 2], [0, 2], []):
        with pytest.raises(ValueError, match="must be one or several ascending numbers >= 1"):
            PhasesConfig(until=wrong)


def test_competence_grows_with_the_root_of_time():
    shares = [CompetenceConfig(epochs=8, start=0.25).share(epoch) for epoch in range(10)]
    assert shares[0] == 0.25
    assert shares[8:] == [1.0, 1.0]
    squares = np.diff(np.square(shares[:9]))
    assert np.allclose(squares, (1 - 0.0625) / 8)


def test_only_the_easiest_take_part_and_an_epoch_is_as_long():
    made, difficulty = sampler(lambda epoch: (1 / 3, 2 / 3, 1.0)[epoch])
    before = set()
    for epoch, count in enumerate((30, 60, 90)):
        order = made.order(epoch).tolist()
        there = set(order)
        assert (len(order), len(there)) == (90, count)
        times = np.unique(order, return_counts=True)[1]
        assert times.max() - times.min() <= 1  # repeated evenly
        rest = set(difficulty) - there
        assert not rest or max(map(difficulty.get, there)) <= min(map(difficulty.get, rest))
        assert before <= there
        before = there
    assert len(made.batches(0)) == 9
    for batch in made.batches(0):
        assert len(set(batch.tolist())) >= 9  # a batch in which one round ends and another begins may repeat one


def test_with_all_images_it_is_the_order_without_curriculum():
    made, _ = sampler(lambda epoch: 1.0)
    plain = Sampler(made.indices, batch_size=10, seed=3, train=True)
    assert all((made.order(epoch) == plain.order(epoch)).all() for epoch in range(3))


def test_processes_share_the_same_epoch():
    whole, _ = sampler(lambda epoch: 0.4)
    parts = [sampler(lambda epoch: 0.4, rank=rank, num_processes=2)[0] for rank in range(2)]
    for number, batch in enumerate(whole.batches(1)):
        assert (np.concatenate([part.batches(1)[number] for part in parts]) == batch).all()


def test_the_difficulty_of_a_program():
    sequence = build_sequence(ProgramConfig(num_observed=2), (4, 4), PLAIN, CPU)
    first = torch.full((4, 4), OUTSIDE)
    first[:2, :2] = torch.tensor([[1, 2], [3, 4]])
    one_cell, smaller = first.clone(), first.clone()
    one_cell[0, 0] = 5
    smaller[1] = OUTSIDE
    frames = {
        (first, first, first): 0,
        (first, one_cell, one_cell): 1000 + 25,
        (first, one_cell, first): 2000,
        (first, one_cell, smaller): 2000 + 50 + 500,
    }
    views = torch.stack([torch.stack(grids)[:, None].float() for grids in frames])
    assert sequence.difficulty(views, torch.zeros(4, 3, 10)).tolist() == list(frames.values())


def loaders(**data):
    settings = {"dataset": "object_grids", "batch_size": 20, "train_subset": 200, "val_subset": 40}
    return build_loaders(DataConfig(**settings, **data), ProgramConfig(), PLAIN, seed=1, device=CPU)


def by_index(batches):
    return {int(i): v for batch in batches for i, v in zip(batch.index, batch.views, strict=True)}


@pytest.mark.parametrize("fixed", [True, False])
def test_views_are_fixed_if_asked(fixed):
    train = loaders(fixed_views=fixed).train
    first, later = by_index(train.epoch(0)), by_index(train.epoch(4))
    alike = [torch.equal(first[index], later[index]) for index in first]
    assert all(alike) if fixed else not any(alike)
    assert list(first) != list(later)


def test_easy_programs_come_first():
    curriculum = PhasesConfig(until=[1])
    with_it, plain = (loaders(fixed_views=True, **more).train for more in ({"curriculum": curriculum}, {}))
    views = by_index(plain.epoch(0))
    hard = {i: int(plain.sequence.difficulty(v[None], torch.empty(0))) for i, v in views.items()}
    easy = by_index(with_it.epoch(0))
    assert len(easy) == 100
    assert max(hard[i] for i in easy) <= min(hard[i] for i in hard if i not in easy)
    assert all(torch.equal(easy[i], views[i]) for i in easy)
    assert len(by_index(with_it.epoch(1))) == 200
    assert len(by_index(with_it.restricted(with_it.sampler.indices[:60]).epoch(0))) == 60  # probes see all


def test_programs_are_judged_only_where_some_are_left_out(monkeypatch):
    train = loaders(fixed_views=True, curriculum=CompetenceConfig(epochs=1)).train
    judged = []
    monkeypatch.setattr(
        type(train.sequence), "difficulty", lambda self, views, params: judged.append(1) or views[:, 0, 0, 0, 0]
    )
    assert len(by_index(train.epoch(1))) == 200
    assert not judged
    assert len(by_index(train.epoch(0))) == 66
    once = len(judged)
    assert once
    list(train.epoch(0))
    assert len(judged) == once


def test_what_cannot_be_judged_is_refused():
    with pytest.raises(ValueError, match=r"data\.fixed_views=true"):
        DataConfig(curriculum=PhasesConfig())
    words = ["tests/small.yaml", "data.fixed_views=true", "data.curriculum.kind=competence"]
    with pytest.raises(InputError, match=r"sequence\.kind=affine does not tell hard views from easy ones"):
        compose(words)
    stream = ["stream.kind=classes", "stream.tasks=2", "optim.schedule=constant", "eval.every=1"]
    with pytest.raises(InputError, match="new views at each visit"):
        compose(["tests/small.yaml", "data.fixed_views=true", *stream])
    with pytest.raises(InputError, match="begins with 18 of 200 images, fewer than the 20 of a batch"):
        loaders(fixed_views=True, curriculum=CompetenceConfig(start=0.09))
