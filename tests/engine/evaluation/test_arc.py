"""Scores on tasks of ARC: for features that hold the rule, for those that hold nothing, and from the command line."""

import json

import pytest
import torch

from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.evaluation.arc import arc_scores, pixels, size_and_colours
from seqjepa.engine.train import main
from seqjepa.loaders.grids.arc import ArcTask, Pair, on_canvas
from seqjepa.loaders.grids.moves import counts

SIDE = 6


def tasks():
    """The rule of task k adds k + 1 cells of colour 1 to a 6 x 6 grid that has some of colour 2."""
    found = []
    for k in range(6):
        pairs = []
        for first in range(5):
            grid = [[0] * SIDE for _ in range(SIDE)]
            for place in range(3 * first + k):
                grid[place // SIDE][place % SIDE] = 2
            after = [list(row) for row in grid]
            for place in range(k + 1):
                after[5 - place // SIDE][place % SIDE] = 1
            pairs.append(Pair(grid, after))
        found.append(ArcTask(f"{k}", pairs[:4], pairs[4:]))
    return found


def numbers(grids):
    """A power of the number of cells of colour 1, so that rules differ in direction, and the number of colour 2."""
    one, two = counts(grids)[:, 1].float(), counts(grids)[:, 2].float()
    return torch.stack([one, one**2, two], 1)


def test_features_that_hold_the_rule_find_it():
    found = arc_scores(numbers, tasks(), SIDE)
    assert found["rule_nn"] == pytest.approx(100)
    assert found["among_all"] == pytest.approx(100)
    assert found["choose16"] > found["choose16_input"]
    assert found["choose16_1"] == pytest.approx(found["choose16"])  # all demonstrations say the same


def test_a_constant_is_at_chance():
    """All are equally near: a tie counts in parts. 23 other demonstrations, of which three are of the same task."""
    found = arc_scores(lambda grids: torch.ones(len(grids), 4), tasks(), SIDE)
    assert found["rule_nn"] == pytest.approx(100 * 3 / 23)
    for name in ("choose16", "choose16_1", "choose16_2", "choose16_input"):
        assert found[name] == pytest.approx(100 / 16)
    assert found["among_all"] == pytest.approx(100 / 6)


def test_what_has_collapsed_is_at_chance_whatever_its_roundings_are():
    """Features that are equal up to 1e-7 of their length, by which the number of coloured cells could be told."""

    def collapsed(grids):
        return 1 + 1e-7 * numbers(grids).double() / 36

    found = arc_scores(collapsed, tasks(), SIDE)
    assert found["rule_nn"] == pytest.approx(100 * 3 / 23)
    assert found["choose16"] == pytest.approx(100 / 16)
    assert found["among_all"] == pytest.approx(100 / 6)


def test_what_learns_nothing_sees_cells_and_shares():
    grids = on_canvas([[[0, 3], [3, 3]]], 4)
    assert pixels(grids).sum() == 16
    expected = torch.zeros(1, 12)
    expected[0, :2], expected[0, 2], expected[0, 5] = 0.2, 0.25, 0.75
    torch.testing.assert_close(size_and_colours(grids), expected)


def test_a_run_is_judged_by_a_folder_of_tasks(tiny, tmp_path, capsys):
    words = ("sequence.kind=program", "data.dataset=object_grids", "actions.normalization=none")
    words += ("model.encoder.kind=grid_convnet", "model.encoder.width=4", "control.enabled=false", "run.epochs=1")
    assert main(tiny(*words, "gates.enforce=false")) == 0
    folder = tmp_path / "tasks"
    folder.mkdir()
    for task in tasks():
        parts = (("train", task.demonstrations), ("test", task.tests))
        content = {key: [pair._asdict() for pair in pairs] for key, pairs in parts}
        (folder / f"{task.name}.json").write_text(json.dumps(content))
    capsys.readouterr()
    assert evaluate([str(tmp_path / "run"), f"eval.arc={folder}"]) == 0
    assert "6 of 6 tasks fit 14 x 14 cells; 6 tests" in capsys.readouterr().out
    result = json.loads((tmp_path / "run" / "eval" / "epoch-0001-arc" / "arc.json").read_text())
    assert result["pixels"] == arc_scores(pixels, tasks(), 14)
    assert result["trained"].keys() == result["untrained"].keys()
    assert evaluate([str(tmp_path / "run"), f"eval.arc={folder}", "eval.arc_side=5"]) == 2
    assert "0 of 6 tasks fit 5 x 5 cells" in capsys.readouterr().err
    for words, problem in (
        (["eval.subspace=true"], "only images are swept"),
        (["eval.subspace=true", f"eval.arc={folder}"], "only one of them is allowed"),
    ):
        assert evaluate([str(tmp_path / "run"), *words]) == 2
        assert problem in capsys.readouterr().err
    plain = ("run.epochs=1", "control.enabled=false", "gates.enforce=false", "gates.rules.digits_affine=[]")
    assert main(tiny(*plain, run="images")) == 0
    assert evaluate([str(tmp_path / "images"), f"eval.arc={folder}"]) == 2
    assert "its encoder sees images, not grids" in capsys.readouterr().err
