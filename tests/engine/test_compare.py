"""Runs side by side: what is one row, and what is said of it."""

import json
import math
import re
import signal

import numpy as np
import pytest
import yaml
from PIL import Image

from seqjepa.configs.compose import dump
from seqjepa.engine import compare
from seqjepa.engine.compare import differences, draw, group, main, read_run, to_markdown
from seqjepa.engine.config import compose
from seqjepa.engine.train import main as train


@pytest.fixture
def make(tmp_path):
    """A run's folder with these accuracies over the epochs."""

    def folder(name, seed, accuracies, *words, untrained=10.0, gate=True, ended=True):
        path = tmp_path / f"{name}-{seed}"
        path.mkdir()
        epochs = len(accuracies) if ended else len(accuracies) + 3
        config = compose([f"run.name={path.name}", f"run.seed={seed}", f"run.epochs={epochs}", *words]).config
        (path / "config.yaml").write_text(dump(config))
        lines = [
            {"epoch": number, "online_linacc_test": value, "online_r2_test": value / 100, "timing": {"ep_time": 2.0}}
            for number, value in enumerate(accuracies, start=1)
        ]
        (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        summary = {
            "gate_pass": gate,
            "untrained": {"online_linacc_test": untrained, "online_r2_test": 0.5},
            "commit": "abc",
            "timing": {"seconds": 2.5 * len(accuracies), "hardware": "a machine"},  # it was interrupted now and then
        }
        if ended:
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return folder


def read_lines(path):
    return (path / "metrics.jsonl").read_text().splitlines()


def cells(text, name):
    line = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_seeds_are_one_row_and_variants_are_others(make, tmp_path, capsys):
    paths = [make("a", seed, [20.0, last]) for seed, last in ((1, 30.0), (2, 32.0))]
    paths += [make("b", 1, [40.0, 35.0], "objective.rate.weight=0.1", gate=False)]
    out = tmp_path / "out" / "results.md"
    assert main([*map(str, paths), "--out", str(out), "--against", "a"]) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    a, b = cells(text, "a"), cells(text, "b")
    # seeds, final, margin, peak and epochs; the deviation of 30 and 32 is the root of 2
    assert a[1:5] == ["1, 2", "31.0 (1.4)", "+21.0 (1.4)", "31.0 (1.4) (2, 2)"]
    assert b[1:6] == ["1", "35.0", "+25.0", "40.0 (1)", "+5.0 (n = 1)"]  # beside seed 1 of a alone
    assert (a[-3:], b[-3:]) == (["2 of 2", "5", "a machine"], ["0 of 1", "5", "a machine"])
    assert len({len(line.split("|")) for line in text.splitlines() if line.startswith("|")}) == 1


def test_a_run_that_ends_in_nan_does_not_look_healthy(make):
    one, other = make("a", 1, [20.0, math.nan]), make("b", 1, [20.0, 30.0], "objective.rate.weight=0.1")
    a, b = group([read_run(one), read_run(other)])
    assert math.isnan(a.runs[0].final("online_linacc_test"))
    assert differences(a, b, "online_linacc_test") == []


def test_a_mean_over_fewer_seeds_says_so(make, capsys):
    """One of three runs has no control, another ends in NaN: 20 and 22 are left, and the margin of 20 over 10."""
    paths = [make("a", seed, [last]) for seed, last in ((1, 20.0), (2, 22.0), (3, math.nan))]
    summary = json.loads((paths[1] / "summary.json").read_text())
    (paths[1] / "summary.json").write_text(json.dumps(summary | {"untrained": None}))
    assert main([*map(str, paths), "--metrics", "online_linacc_test"]) == 0
    text = capsys.readouterr().out
    assert cells(text, "a")[1:4] == ["1, 2, 3", "21.0 (1.4) (n = 2)", "+10.0 (n = 1)"]
    assert main([str(paths[0]), "--metrics", "online_linacc_test"]) == 0
    assert "(n = " not in capsys.readouterr().out


def test_the_best_loss_is_the_least(make):
    path = make("a", 1, [20.0, 30.0])
    lines = [json.loads(line) | {"val_loss": loss} for line, loss in zip(read_lines(path), (1.0, 2.0), strict=True)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_run(path).peak("val_loss") == (1.0, 1)
    assert read_run(path).peak("online_linacc_test") == (30.0, 2)


def test_a_control_with_shorter_probes_is_told_of(make, capsys):
    path = make("a", 1, [20.0, 30.0], "control.max_epochs=1")
    assert main([str(path)]) == 0
    assert "control's probes had 1 epochs, a longer run's more" in capsys.readouterr().out


def test_runs_that_have_just_begun_are_left_out(make, capsys):
    good, empty = make("a", 1, [1.0]), make("b", 1, [1.0])
    (empty / "metrics.jsonl").unlink()
    assert main([str(good), str(empty)]) == 0
    said = capsys.readouterr()
    assert "| b |" not in said.out
    assert "b-1: no epoch is complete; it is left out" in said.err
    assert main([str(empty)]) == 2
    assert capsys.readouterr().err.endswith("no run has a complete epoch\n")


def test_differences_are_paired_by_seed(make):
    one, other = group(
        [read_run(make("a", seed, [value])) for seed, value in ((1, 3.0), (2, 5.0), (9, 7.0))]
        + [read_run(make("b", seed, [value], "objective.rate.weight=0.1")) for seed, value in ((2, 1.0), (1, 2.0))]
    )
    assert differences(one, other, "online_linacc_test") == [1.0, 4.0]


def test_a_run_that_has_not_ended_says_so(make, capsys):
    assert main([str(make("a", 1, [20.0, 30.0], ended=False))]) == 0
    row = cells(capsys.readouterr().out, "a")
    assert row[3] == "-"
    assert row[-3:-1] == ["epoch 2 of 5, not ended", "4"]  # seconds of the epochs


def test_what_differs_in_a_setting_is_no_repetition(make):
    runs = [read_run(make("a", 1, [1.0])), read_run(make("a", 2, [1.0], "optim.lr=0.1"))]
    assert [len(found.runs) for found in group(runs)] == [1, 1]
    places = [read_run(make("c", 1, [1.0])), read_run(make("c", 2, [1.0], "data.root=elsewhere", "run.threads=1"))]
    assert [len(found.runs) for found in group(places)] == [2]


def test_missing_values_are_dashes(make, capsys):
    path = make("a", 1, [20.0])
    row = json.loads((path / "metrics.jsonl").read_text())
    (path / "metrics.jsonl").write_text(
        json.dumps(row | {"online_r2_test": None}) + "\n" + json.dumps(row | {"epoch": 2})
    )
    assert read_run(path).final("online_r2_test") == 0.2
    cut = (path / "metrics.jsonl").read_text() + '\n{"epoch": 3, "online'
    (path / "metrics.jsonl").write_text(cut)
    assert read_run(path).final("online_r2_test") == 0.2
    assert math.isnan(read_run(path).final("other"))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"untrained": None, "gate_pass": None}))
    assert main([str(path)]) == 0
    assert cells(capsys.readouterr().out, "a")[3] == "-"


def test_bad_input_is_one_line(make, tmp_path, capsys):
    good = str(make("a", 1, [1.0]))
    broken = make("c", 1, [1.0])
    (broken / "config.yaml").write_text(yaml.safe_dump({"run": {}}))
    for words, message in (
        ([str(tmp_path / "nothing")], "not the folder of a run (config.yaml is missing); `seqjepa compare --list"),
        ([str(broken)], "not the folder of a run (config.yaml: run.seed: Field required)"),
        ([good, good], "have one config and seed 1: give one of them"),
        ([good, "--against", "z"], "--against z: there are a"),
        ([good, "--metrics", "accuracy"], "--metrics accuracy: no run has it"),
        ([good, "--out", f"{good}/config.yaml/x.md"], "cannot be written"),
        ([good, "--out", str(tmp_path / "x.png")], "must name the Markdown file"),
    ):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_a_file_is_read_as_training_reads_it(make, capsys):
    """A name that YAML takes for a number."""
    path = make("a", 1, [20.0])
    text = (path / "config.yaml").read_text().replace("name: a-1", "name: 4711")
    (path / "config.yaml").write_text(text)
    assert main([str(path)]) == 0
    assert cells(capsys.readouterr().out, "4711")[1] == "1"
    (path / "config.yaml").write_text(text.replace("seed: 1", "seed: one"))
    assert main([str(path)]) == 2
    assert "(config.yaml: run.seed: Input should be a valid integer)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "summary.json"])
def test_what_cannot_be_read_is_reported(make, tmp_path, capsys, monkeypatch, powerless, name):
    path = make("a", 1, [20.0])
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    (path / name).chmod(0)
    with powerless():
        assert main([path.name]) == 2
    assert capsys.readouterr().err == f"error: {path.name}/{name}: cannot be read (Permission denied)\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_a_line(make, tmp_path, capsys, monkeypatch, number):
    """It arrives while the figure is drawn."""
    out = tmp_path / "out" / "results.md"
    monkeypatch.setattr(compare, "draw", lambda *_: signal.raise_signal(number))
    assert main([str(make("a", 1, [20.0])), "--out", str(out)]) == 128 + number
    assert capsys.readouterr() == ("", f"interrupted by {number.name}: no file was half written\n")
    assert not out.exists()


def test_a_name_is_shown_as_it_is(make, tmp_path):
    """Dollars would begin a formula, a bar would end a cell, an underscore would leave a line out of the legend."""
    runs = [read_run(make("plain", 1, [10.0]))]
    for number, name in enumerate(("$a^$", "_hidden", "a|b"), start=2):
        path = make(f"run{number}", number, [10.0 + number])
        config = yaml.safe_load((path / "config.yaml").read_text())
        config["run"]["name"] = name
        config["model"]["width"] = 100 + number  # a config of its own is a row of its own
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        runs.append(read_run(path))
    groups = group(runs)
    assert [found.name for found in groups] == ["plain", "$a^$", "_hidden", "a|b"]
    rows = to_markdown(groups, ["online_r2_test"]).splitlines()
    assert len({len(re.split(r"(?<!\\)\|", row)) for row in rows[:6]}) == 1
    assert r"| a\|b | 4 |" in rows[5]
    draw(groups, ["online_r2_test"], tmp_path / "figure.png")
    draw(groups[:1], ["online_r2_test"], tmp_path / "one.png")

    def legend(path):  # its lines begin with a dash of the line's colour
        image = np.asarray(Image.open(path).convert("RGB"))
        right = image[:, int(0.8 * image.shape[1]) :]
        return {
            colour
            for colour in ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40))
            if (right == colour).all(-1).any()
        }

    assert len(legend(tmp_path / "one.png")) == 1
    assert len(legend(tmp_path / "figure.png")) == 4


def test_a_list_of_all_runs(tiny, tmp_path, capsys):
    """Beside the untrained control; what is no run is passed over, and what cannot be read is named."""
    done = tiny("run.epochs=1", "run.name='a|b'", run="runs/deep/one")
    assert train(done) == 0
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "config.yaml").write_text("x")
    capsys.readouterr()
    assert main(["--list", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    heading, _, row = said.out.splitlines()
    cells = dict(zip(heading.split(" | "), row.split(" | "), strict=True))
    run = read_run(tmp_path / "runs" / "deep" / "one")
    assert cells["| run"].endswith("runs/deep/one")
    assert cells["epochs"] == "1 of 1"
    assert cells["last"] == f"{run.final(cells['metric']):.4g}"
    assert float(cells["untrained"]) == pytest.approx(run.untrained[cells["metric"]], rel=1e-3)
    assert cells["gate"] in ("passed", "failed", "none")
    assert "broken: not the folder of a run" in said.err
    for folder in (tmp_path / "nowhere", tmp_path / "runs" / "deep" / "one" / "checkpoints"):
        assert main(["--list", str(folder)]) == 2
