"""Tasks of ARC: what is read, and what is said of files that are none."""

import json
import os
from pathlib import Path

import pytest

from seqjepa.configs.errors import InputError
from seqjepa.loaders.grids.arc import on_canvas, read_tasks
from seqjepa.loaders.grids.moves import OUTSIDE

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
