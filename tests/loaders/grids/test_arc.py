"""Tasks of ARC: what is read, and what is said of files that are none."""

import json
import os
from pathlib import Path

import pytest

from seqjepa.configs.errors import InputError
from seqjepa.loaders.grids.arc import on_canvas, read_tasks
from seqjepa.loaders.grids.moves import OUTSIDE
from seqjepa.loaders.images import find_dataset

GRID = [[0, 1], [2, 3]]
PAIR = {"input": GRID, "output": [[5]]}
GOOD = {"test": [PAIR], "name": "any", "train": [PAIR, PAIR]}


def test_a_folder_is_read_with_what_lies_below_it(tmp_path):
    (tmp_path / "Above").mkdir()
    (tmp_path / "b.json").write_text(json.dumps(GOOD))
    (tmp_path / "Above" / "a.json").write_text(json.dumps(GOOD))
    (tmp_path / "README.md").write_text("no task")
    first, second = read_tasks(tmp_path)
    assert (first.name, second.name) == ("Above/a", "b")
    assert [pair.output for pair in second.demonstrations] == [[[5]], [[5]]]
    assert second.tests[0].input == GRID
    assert second.side == 2
    canvas = on_canvas([GRID, [[5]]], 3)
    assert canvas[0].tolist() == [[0, 1, OUTSIDE], [2, 3, OUTSIDE], [OUTSIDE] * 3]
    assert canvas[1].tolist() == [[5, OUTSIDE, OUTSIDE], [OUTSIDE] * 3, [OUTSIDE] * 3]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ([GOOD], "is no object with train and test"),
        ({"train": [PAIR]}, "test is no list of pairs"),
        ({"train": [], "test": [PAIR]}, "train is no list of pairs"),
        ({"train": [{"input": GRID}], "test": [PAIR]}, "output of train pair 1 is missing"),
        ({"train": [PAIR], "test": [PAIR, 3]}, "input of test pair 2 is missing"),
        ({"train": [{"input": [[1], [1, 2]], "output": GRID}], "test": [PAIR]}, "has rows of different lengths"),
        ({"train": [{"input": [], "output": GRID}], "test": [PAIR]}, "is empty"),
        ({"train": [{"input": [[]], "output": GRID}], "test": [PAIR]}, "is empty"),
        ({"train": [{"input": "grid", "output": GRID}], "test": [PAIR]}, "is no list of rows"),
        ({"train": [{"input": [[10]], "output": GRID}], "test": [PAIR]}, "has the colour 10; 0 to 9 are allowed"),
        ({"train": [{"input": [[1.5]], "output": GRID}], "test": [PAIR]}, "has the colour 1.5"),
        ({"train": [{"input": [[True]], "output": GRID}], "test": [PAIR]}, "has the colour True"),
        ({"train": [{"input": [[0] * 31], "output": GRID}], "test": [PAIR]}, "has 1 rows of 31; at most 30"),
    ],
)
def test_a_file_that_is_no_task_is_named(content, problem, tmp_path):
    path = tmp_path / "bad.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as error:
        read_tasks(tmp_path)
    assert str(path) in str(error.value)
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_tasks_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(InputError, match=r"no \.json files there"):
            read_tasks(folder)


@pytest.mark.realdata
@pytest.mark.parametrize(("split", "pairs", "tests"), [("training", 1302, 416), ("evaluation", 1363, 419)])
def test_arc_agi_1_is_read_whole(split, pairs, tests):
    folder = Path(os.environ.get("SEQJEPA_DATA", "")) / "ARC-AGI" / "data" / split
    if not folder.is_dir():
        pytest.skip("no ARC-AGI there")
    tasks = read_tasks(folder)
    assert len(tasks) == 400
    assert sum(len(task.demonstrations) for task in tasks) == pairs
    assert sum(len(task.tests) for task in tasks) == tests
    assert max(task.side for task in tasks) == 30


def write_tasks(folder, *grids):
    folder.mkdir(parents=True)
    for number, grid in enumerate(grids):
        pair = {"input": grid, "output": [[number % 10]]}
        (folder / f"{number:02d}.json").write_text(json.dumps({"train": [pair, pair], "test": [pair]}))


@pytest.fixture
def opened():
    def read(root, split="train", name="arc14"):
        return find_dataset(name).read(root, split, False).pixels

    return read


def test_grids_are_read_once_and_splits_kept_apart(tmp_path, opened):
    write_tasks(tmp_path / "training", GRID, GRID, [[1] * 15])
    write_tasks(tmp_path / "evaluation", [[7, 7]])
    train, test = (opened(tmp_path, split) for split in ("train", "test"))
    wanted = on_canvas([GRID, [[0]], [[1]], [[2]]], 14)
    assert train[..., 0].tolist() == wanted.tolist()  # a row of fifteen does not fit
    assert test[..., 0].tolist() == on_canvas([[[7, 7]]], 14).tolist()  # its output is one to train on
    assert opened(tmp_path, name="arc30").shape == (5, 30, 30, 1)


def test_a_folder_above_the_splits_is_refused(tmp_path, opened):
    """Its tasks for evaluation would be trained on."""
    for split in ("training", "evaluation"):
        write_tasks(tmp_path / "data" / split, GRID)
    with pytest.raises(InputError, match=f"training/ and evaluation/ are in {tmp_path}/data, which is to be given"):
        opened(tmp_path)


def test_of_a_folder_without_splits_every_tenth_task_is_for_testing(tmp_path, opened):
    write_tasks(tmp_path / "mine", *([[9, n % 10], [n // 10, 9]] for n in range(21)))
    train, test = (opened(tmp_path, split) for split in ("train", "test"))
    tested = on_canvas([[[9, n % 10], [n // 10, 9]] for n in (9, 19)] + [[[9]]], 14)
    assert sorted(test[..., 0].tolist()) == sorted(tested.tolist())
    assert len(train) == 19 + 9  # nineteen inputs, nine outputs


@pytest.mark.parametrize(
    ("folder", "grid", "problem"),
    [
        ("training", GRID, "has training/, but not evaluation/"),
        ("evaluation", GRID, "has evaluation/, but not training/"),
        ("mine", [[0] * 15], "none of the 1 train grids has at most 14 rows and columns"),
        ("mine", [[10]], "has the colour 10"),
        ("mine", None, "no .json files there"),
        ("", None, "no such folder"),
    ],
)
def test_a_folder_without_grids_is_one_line(folder, grid, problem, tmp_path, opened):
    if grid is not None:
        (tmp_path / folder).mkdir()
        content = {"train": [{"input": grid, "output": grid}], "test": [{"input": grid, "output": grid}]}
        (tmp_path / folder / "a.json").write_text(json.dumps(content))
    with pytest.raises(InputError) as error:
        opened(tmp_path if folder else tmp_path / "nowhere")
    assert problem in str(error.value)
    assert error.value.field == "data.root"
    assert "\n" not in str(error.value)
