"""Programs on grids: that every step does something, that they are the same everywhere, and their actions."""

import pytest
import torch
from PIL import Image

from seqjepa.configs.errors import InputError
from seqjepa.loaders.config import ActionsConfig, DataConfig, ProgramConfig
from seqjepa.loaders.grids.moves import (
    COLUMNS,
    DX,
    FIRST,
    LEVEL,
    MOVE,
    OUTSIDE,
    SECOND,
    THIRD,
    TURNS,
    Move,
    X,
    apply,
    commonest,
    present,
    sizes,
)
from seqjepa.loaders.grids.objects import components
from seqjepa.loaders.grids.programs import counterfactuals, draw_program, encode
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.write import main as write

KINDS = ("noise_grids", "object_grids")
PLAIN = ActionsConfig(normalization="none")


def grids(kind, count):
    return torch.from_numpy(find_dataset(kind).read(None, "test", False).pixels[:count, ..., 0]).long()


def keys(count, seed=0):
    return torch.randint(0, 2**32, (count, 2), generator=torch.Generator().manual_seed(seed))


def area(frames):
    height, width = sizes(frames)
    return height * width


@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_step_changes_the_grid_and_leaves_something(kind):
    frames, steps = draw_program(grids(kind, 2000), keys(2000), 3)
    flat, moves = frames[:, 1:].flatten(0, 1), steps.flatten(0, 1)
    assert torch.equal(apply(frames[:, :-1].flatten(0, 1), moves), flat)  # the steps are those that were taken
    changed = (frames[:, 1:] != frames[:, :-1]).flatten(2).any(2)
    assert changed.double().mean() > 0.99
    height, width = sizes(flat)
    assert ((height >= 3) & (width >= 3) & (present(flat).sum(1) >= 2)).double().mean() > 0.99
    shares = torch.bincount(moves[:, MOVE], minlength=10) / len(moves)
    assert shares.min() > 0.04
    assert shares.max() < 0.14


def test_what_a_move_needs_is_there():
    """A source that the grid has, a level between two colours, a seed off the commonest colour, a pair that touches."""
    start = grids("object_grids", 3000)
    frames, steps = draw_program(start, keys(3000, 1), 1)
    before, step = frames[:, 0], steps[:, 0]
    of = {move: step[:, MOVE] == move for move in Move}
    assert present(before)[of[Move.RECOLOUR]].gather(1, step[of[Move.RECOLOUR], FIRST, None]).all()
    ranks = present(before)[of[Move.THRESHOLD]]
    level = step[of[Move.THRESHOLD], LEVEL, None]
    colours = torch.arange(10)
    assert (ranks & (colours <= level)).any(1).all()
    assert (ranks & (colours > level)).any(1).all()
    assert (step[of[Move.TRANSLATE], FIRST] == 0).all()
    assert (frames[of[Move.EXTRACT], 1] != OUTSIDE).flatten(1).sum(1).double().mean() > 4
    pairs = step[of[Move.MERGE]][:, [FIRST, SECOND]]
    assert (pairs > 0).all()
    assert (pairs[:, 0] != pairs[:, 1]).all()
    unread = step[of[Move.MIRROR_X]][:, 1:]
    assert not unread.any()


def test_the_origins_draws_have_the_origins_statistics():
    """Shares of the outputs of 20,000 programs of one step.

    A threshold leaves one colour if it is the largest of n, or if what is above and below it becomes the same: 2/n less
    1/n², for the palettes of four to six colours. A seed is on the commonest colour as often as cells have it.
    """
    start = torch.from_numpy(find_dataset("noise_grids").read(None, "train", False).pixels[:20_000, ..., 0]).long()
    frames, steps = draw_program(start, keys(20_000), 1, "origin")
    after, move = frames[:, 1], steps[:, 0, MOVE]
    assert (after != start).flatten(1).any(1).all()
    single, one_colour = area(after) == 1, present(after).sum(1) == 1
    assert 0.03 < single.double().mean() < 0.07
    share = (start == commonest(start)[:, None, None]).flatten(1).sum(1) / area(start)
    assert single[move == Move.EXTRACT].double().mean().item() == pytest.approx(share.mean().item(), abs=0.05)
    expected = sum(2 / n - 1 / n**2 for n in (4, 5, 6)) / 3
    assert one_colour[move == Move.THRESHOLD].double().mean().item() == pytest.approx(expected, abs=0.03)
    same_shape = (torch.stack(sizes(after)) == torch.stack(sizes(start))).all(0)
    assert 0.75 < same_shape.double().mean() < 0.9


def test_noise_has_the_origins_statistics():
    """Median number of objects 39, 98 % of grids with more than 16."""
    start = torch.from_numpy(find_dataset("noise_grids").read(None, "train", False).pixels[:3000, ..., 0]).long()
    first = components(start) == torch.arange(196).view(1, 14, 14)
    count = (first & (start > 0) & (start < 10)).flatten(1).sum(1)
    assert count.median().item() == pytest.approx(39, abs=1)
    assert (count > 16).double().mean().item() == pytest.approx(0.98, abs=0.01)


@pytest.mark.parametrize("draws", ["valid", "origin"])
def test_a_program_does_not_depend_on_its_batch(draws):
    start, key = grids("object_grids", 100), keys(100)
    frames, steps = draw_program(start, key, 3, draws)
    for rows in (slice(7, 8), slice(30, 70)):
        alone = draw_program(start[rows], key[rows], 3, draws)
        assert torch.equal(alone[0], frames[rows])
        assert torch.equal(alone[1], steps[rows])
    shorter = draw_program(start, key, 2, "valid")
    assert torch.equal(shorter[0], draw_program(start, key, 3, "valid")[0][:, :3])


def test_actions_tell_what_a_move_reads_and_nothing_else():
    step = torch.zeros(3, 10, dtype=torch.long)
    step[:, MOVE] = torch.tensor([Move.ROTATE, Move.TRANSLATE, Move.MERGE])
    step[:, TURNS], step[:, DX], step[:, X] = 2, -3, 5
    step[:, FIRST], step[:, SECOND], step[:, THIRD] = 1, 2, 9
    found = encode(step, 14)
    expected = torch.zeros(3, 49)
    expected[0, [2, 12]] = 1
    expected[1, [3, 20]] = 1
    expected[1, 14] = -3 / 7
    expected[2, [9, 20, 31, 48]] = 1
    torch.testing.assert_close(found, expected)


def test_counterfactuals_differ_from_the_truth_and_from_each_other():
    start, key = grids("object_grids", 400), keys(400, 5)
    frames, steps = draw_program(start, keys(400, 6), 1)
    others = counterfactuals(start, steps[:, 0], frames[:, 1], key, 15)
    every = torch.cat([frames[:, 1:], others], 1).flatten(2)
    same = (every[:, :, None] == every[:, None]).all(-1)
    twins = same.float().sum((1, 2)) - 16
    assert (twins == 0).double().mean() > 0.9
    assert (others != start[:, None]).flatten(2).any(2).double().mean() > 0.98
    alone = counterfactuals(start[3:5], steps[3:5, 0], frames[3:5, 1], key[3:5], 15)
    assert torch.equal(alone, others[3:5])


def loaders(batch_size, **more):
    data = DataConfig(dataset="object_grids", batch_size=batch_size, train_subset=96, val_subset=20)
    return build_loaders(data, ProgramConfig(), PLAIN, seed=3, device=torch.device("cpu"), **more)


def test_programs_are_the_same_for_any_batch_and_number_of_processes_and_new_each_epoch():
    def rows(*loaders, epoch=0):
        found = {}
        for loader in loaders:
            for batch in loader.train.epoch(epoch):
                found |= {int(i): (v, a) for i, v, a in zip(batch.index, batch.views, batch.actions, strict=True)}
        return found

    whole = rows(loaders(32))
    assert len(whole) == 96
    for other in (rows(loaders(48)), rows(*(loaders(32, rank=rank, num_processes=2) for rank in (0, 1)))):
        assert other.keys() == whole.keys()
        assert all(torch.equal(x, y) for i in whole for x, y in zip(whole[i], other[i], strict=True))
    later = rows(loaders(32), epoch=1)
    assert all(torch.equal(later[i][0][0], whole[i][0][0]) for i in whole)  # the grids themselves
    assert sum(torch.equal(later[i][0], whole[i][0]) for i in whole) == 0


def test_what_cannot_be_read_is_refused():
    with pytest.raises(InputError, match="only none is allowed"):
        build_loaders(
            DataConfig(dataset="object_grids"), ProgramConfig(), ActionsConfig(), seed=0, device=torch.device("cpu")
        )
    with pytest.raises(InputError, match=r"digits has images, sequence\.kind=program needs grids: noise_grids"):
        build_loaders(DataConfig(), ProgramConfig(), PLAIN, seed=0, device=torch.device("cpu"))


def test_views_are_colours_and_outside(tmp_path):
    batch = next(loaders(32).train.epoch(0))
    assert batch.views.shape == (32, 4, 1, 14, 14)
    assert batch.actions.shape == (32, 3, 49)
    assert batch.params.shape == (32, 4, len(COLUMNS))
    assert set(batch.views.unique().tolist()) <= set(range(11))


def test_a_batch_without_grids_has_no_programs():
    """The last batch of a validation may leave a process without a part."""
    for draws in ("valid", "origin"):
        frames, steps = draw_program(grids("object_grids", 1)[:0], keys(1)[:0], 3, draws)
        assert (frames.shape, steps.shape) == ((0, 4, 14, 14), (0, 3, 10))


def test_grids_are_not_written_as_betons(tmp_path, capsys):
    assert write(["object_grids", str(tmp_path / "betons")]) == 2
    assert "betons hold images, not grids" in capsys.readouterr().err
    assert not (tmp_path / "betons").exists()


def test_generated_grids_have_no_folder(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (14, 14)).save(tmp_path / split / "a" / "1.png")
    for root in (tmp_path, tmp_path / "train"):
        data = DataConfig(dataset="object_grids", root=str(root))
        with pytest.raises(InputError, match="object_grids are generated; only null is allowed"):
            build_loaders(data, ProgramConfig(), PLAIN, seed=0, device=torch.device("cpu"))
