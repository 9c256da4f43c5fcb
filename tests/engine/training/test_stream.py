"""Whole runs on a stream of digits: what is measured, and that restarts and processes change nothing."""

import json

import pytest
import torch

from seqjepa.engine.config import compose
from seqjepa.engine.evaluation.tasks import task_scores
from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.train import main
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.validation import metric_names

STREAM = ("configs/stream/classes.yaml", "stream.tasks=3", "stream.steps=5", "stream.buffer.kind=reservoir")
STREAM += ("stream.buffer.size=30", "eval.best_metric=val_loss", "eval.best_mode=min")
ACTIONS = ("configs/stream/actions.yaml", "stream.steps=4", "eval.best_metric=val_loss", "eval.best_mode=min")


def read(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]
    return rows, json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(("words", "measures"), [(STREAM, 4), (ACTIONS, 3)])
def test_a_stream_is_measured_task_by_task(words, measures, tiny, tmp_path, capsys):
    words = tiny(*words)
    assert main(words) == 0
    rows, summary = read(tmp_path / "run")
    known = metric_names(compose(words).config, 10, {"rotation": 0, "translation_x": 1, "translation_y": 2, "scale": 3})
    found = summary["stream"]
    assert len(found["measures"]) == measures
    for measure, scores in found["measures"].items():
        assert scores["matrix"] == [[row[f"task_{measure}_{task}"] for task in (1, 2, 3)] for row in rows]
        assert scores["untrained"] == [summary["untrained"][f"task_{measure}_{task}"] for task in (1, 2, 3)]
        last, first = scores["matrix"][2], [scores["matrix"][task][task] for task in range(3)]
        assert scores["backward"] == pytest.approx(sum(last[task] - first[task] for task in (0, 1)) / 2)
        assert rows[-1][f"stream_{measure}_backward"] == scores["backward"]
        assert f"stream_{measure}_backward" not in rows[0]
    assert set(rows[-1]) - {"epoch"} == known
    assert (tmp_path / "run" / "figures" / "stream.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "a stream of 3 tasks" in printed
    assert "cosine by task (untrained):" in printed
    assert find_checkpoint(tmp_path / "run").name == "segment-0003"


def test_an_interrupted_stream_ends_as_it_would_have(tiny, tmp_path, interrupt_at):
    assert main(tiny(*STREAM, run="whole")) == 0
    with pytest.MonkeyPatch.context():
        interrupt_at(7)
        assert main(tiny(*STREAM)) == 143
    assert main(tiny(*STREAM, "run.resume=auto", "run.overwrite=false")) == 0
    (rows, summary), (expected, whole) = read(tmp_path / "run"), read(tmp_path / "whole")
    assert rows == expected
    assert summary["stream"] == whole["stream"]
    one, other = (find_checkpoint(tmp_path / name) for name in ("run", "whole"))
    for name in ("model", "probes", "trainer"):
        assert (one / f"{name}.safetensors").read_bytes() == (other / f"{name}.safetensors").read_bytes()


def test_the_classes_of_a_task_are_the_only_answers(tiny):
    """Of one class alone, every answer is right; and no measure changes the network or its mode of training."""
    words = tiny("configs/stream/classes.yaml", "stream.tasks=10", "stream.steps=2")
    config = compose(words).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    training = TrainingStep(config, loaders, accelerator)
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    found = task_scores(training.model.eval(), training.objective, loaders, accelerator)
    assert all(found[f"task_own_class_{task}"] == 100 for task in range(1, 11))
    assert any(found[f"task_class_{task}"] < 100 for task in range(1, 11))
    assert all(torch.equal(value, before[name]) for name, value in training.model.state_dict().items())
    assert all(parameter.requires_grad for parameter in training.model.predictor.parameters())


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("optim.schedule=cosine",), ("optim.schedule", "only constant is allowed")),
        (("eval.every=2",), ("eval.every", "only 1 is allowed")),
        (("stream.tasks=1",), ("stream.tasks",)),
        (("stream.kind=nothing",), ("stream.kind", "classes")),
    ],
)
def test_refusals(words, parts, tiny, refused):
    refused(tiny(*STREAM, *words), *parts)
