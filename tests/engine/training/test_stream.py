"""Whole runs on a stream of digits: what is measured, and that restarts and processes change nothing."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from seqjepa.engine.analysis.coresets import largest_rate
from seqjepa.engine.config import compose
from seqjepa.engine.evaluation.frozen import untrained_network
from seqjepa.engine.evaluation.tasks import some, task_scores
from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.train import main
from seqjepa.engine.training import stream as stream_module
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.stream import TaskMeasures
from seqjepa.engine.training.validation import metric_names
from seqjepa.loaders.loader import build_loaders

pytestmark = pytest.mark.usefixtures("blank_figures")
STREAM = ("configs/stream/classes.yaml", "stream.tasks=3", "stream.steps=5", "stream.buffer.kind=reservoir")
STREAM += ("stream.trace_every=2", "stream.buffer.size=30", "eval.best_metric=val_loss", "eval.best_mode=min")
MEMORY = ("model.memory.kind=encoder", "objective.distillation.weight=1")
ACTIONS = ("configs/stream/actions.yaml", "stream.steps=4", "eval.best_metric=val_loss", "eval.best_mode=min")


def read(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k != "timing"} for line in lines]
    return rows, json.loads((run / "summary.json").read_text())


@pytest.mark.parametrize(("words", "measures"), [(STREAM, 4), (ACTIONS, 3)])
def test_a_stream_is_measured_task_by_task(words, measures, tiny, tmp_path, capsys, blank_figures):
    blank_figures.undo()
    words_of_classes, words = words is STREAM, tiny(*words)
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
        one, two, three = scores["untrained"]
        after = [one, (one + two) / 2, (one + two + three) / 3]
        assert summary["untrained"][f"stream_{measure}_average"] == pytest.approx(after[2])
        assert summary["untrained"][f"stream_{measure}_anytime"] == pytest.approx(sum(after) / 3)
    assert set(rows[-1]) - {"epoch"} == known
    assert found["drift"].keys() == {"cka", "overlap"}
    for name, drift in found["drift"].items():
        assert [len(row) for row in drift["rows"]] == [0, 1, 2]
        assert len(drift["untrained"]) == 3
        assert rows[2][f"stream_{name}"] == pytest.approx(sum(drift["rows"][2]) / 2)
        assert drift["rows"][2] == [rows[2][f"task_{name}_1"], rows[2][f"task_{name}_2"]]
        assert all(0 < value < 1 for value in [*drift["rows"][2], *drift["untrained"]])
    steps = [0, 2, 4, 5] if words_of_classes else [0, 4]
    assert [[step for step, *_ in trace] for trace in found["traces"].values()] == [steps, steps]
    assert [len(trace[0]) for trace in found["traces"].values()] == [2, 3]
    means = [[sum(cosines) / len(cosines) for _, *cosines in trace] for trace in found["traces"].values()]
    assert rows[-1]["stream_cosine_drop"] == pytest.approx(max(each[0] - min(each) for each in means))
    # so few sequences that all are measured; the last of the trace is what the matrix has
    cosines = [row["task_cosine_1"] for row in rows[1:]]
    assert [trace[-1][1] for trace in found["traces"].values()] == pytest.approx(cosines, abs=1e-5)
    assert (tmp_path / "run" / "figures" / "stream.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "a stream of 3 tasks" in printed
    assert "cosine by task (untrained):" in printed
    lines = [line.partition(":")[0] for line in printed.partition("\n---\n")[2].splitlines()]
    assert "untrained_stream_cosine_average" in lines
    assert "stream_cosine_backward" in lines
    assert "untrained_stream_cosine_backward" not in lines  # of which there is none, rather than NaN
    assert find_checkpoint(tmp_path / "run").name == "segment-0003"


@pytest.mark.parametrize(
    ("words", "step"),
    [
        ((*STREAM, *MEMORY, "stream.buffer.kind=coreset"), 6),
        pytest.param(  # the last of the first task: nothing is chosen yet
            (*STREAM, "stream.buffer.kind=coreset"), 4, marks=pytest.mark.slow
        ),
        (ACTIONS, 6),
    ],
)
def test_an_interrupted_stream_ends_as_it_would_have(words, step, tiny, tmp_path, interrupt_at):
    """Also with a memory, whose copy is in eval mode from the first step on, and with a coreset, which has a state."""
    assert main(tiny(*words, run="whole")) == 0
    interrupt_at(step)
    assert main(tiny(*words)) == 143
    assert main(tiny(*words, "run.resume=auto", "run.overwrite=false")) == 0
    (rows, summary), (expected, whole) = read(tmp_path / "run"), read(tmp_path / "whole")
    assert rows == expected
    assert summary["stream"] == whole["stream"]
    one, other = (find_checkpoint(tmp_path / name) for name in ("run", "whole"))
    for name in ("model", "probes", "trainer"):
        assert (one / f"{name}.safetensors").read_bytes() == (other / f"{name}.safetensors").read_bytes()


def test_a_measurement_that_is_interrupted_is_made_again(tiny, tmp_path, monkeypatch):
    """The signal comes while the tasks are measured; the run saves, goes on, and ends as it would have."""
    assert main(tiny(*STREAM, run="whole")) == 0
    original, calls = stream_module.task_scores, []

    def interrupted(*args, progress, **more):
        calls.append(1)
        if len(calls) == 3:  # untrained, after the first task, after the second
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args, progress=progress, **more)

    monkeypatch.setattr(stream_module, "task_scores", interrupted)
    assert main(tiny(*STREAM)) == 143
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 1
    assert main(tiny(*STREAM, "run.resume=auto", "run.overwrite=false")) == 0
    assert read(tmp_path / "run")[0] == read(tmp_path / "whole")[0]


def test_a_lost_row_leaves_the_summaries_out(tiny, tmp_path):
    assert main(tiny(*STREAM)) == 0
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(True)[1:]))
    assert main(tiny(*STREAM, "run.resume=auto", "run.overwrite=false")) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stream"]["measures"] == {}


def test_the_encoder_of_the_last_task_is_remembered(tiny, tmp_path):
    """After each of two tasks of one step the copy is the encoder of its end; the term is charged in the second."""
    words = ("configs/stream/classes.yaml", "stream.tasks=2", "stream.steps=1", *MEMORY, "checkpoint.keep=9")
    assert main(tiny(*words, "eval.best_metric=val_loss", "eval.best_mode=min")) == 0
    rows, _ = read(tmp_path / "run")
    assert rows[0]["loss_distillation"] == 0
    assert rows[1]["loss_distillation"] > 0  # the copy normalises by its statistics, the encoder by those of the batch
    for segment in (1, 2):
        weights = load_file(tmp_path / "run" / "checkpoints" / f"segment-000{segment}" / "model.safetensors")
        kept = {name.removeprefix("memory."): value for name, value in weights.items() if name.startswith("memory.enc")}
        assert kept
        assert all(torch.equal(value, weights[name]) for name, value in kept.items())


def test_a_coreset_keeps_images_of_the_tasks_that_have_ended(tiny):
    """After the first task all of them are its own; after the second those of largest rate, of both."""
    words = tiny(*STREAM, "stream.buffer.kind=coreset", "stream.steps=30")
    config = compose(words).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    stream = loaders.stream
    measures = TaskMeasures(TrainingStep(config, loaders, accelerator), loaders, stream)
    assert set(stream.kept(20)) <= set(stream.tasks[0].train)
    measures.end(1)
    first = stream.kept(31)
    assert len(first) == 30
    assert set(first) <= set(stream.tasks[0].train)
    candidates = stream.candidates(1)
    measures.end(2)
    second = stream.kept(61)
    assert set(candidates) == {*first, *stream.tasks[1].train}
    assert set(second) & set(stream.tasks[1].train)
    with torch.no_grad():
        batches = loaders.train.restricted(candidates).clean()
        features = torch.cat([measures.training.model.encoder(images[:, None])[:, 0] for images, _, _ in batches])
    assert second.tolist() == candidates[largest_rate(features, 30, 0.5)].tolist()


def test_a_checkpoint_whose_buffer_is_damaged_is_refused(tiny, tmp_path, refused):
    words = (*STREAM, "stream.buffer.kind=coreset", "stream.tasks=2")
    assert main(tiny(*words, "checkpoint.keep=9")) == 0
    path = tmp_path / "run" / "checkpoints" / "segment-0001"
    tensors = load_file(path / "trainer.safetensors")
    assert len(tensors.pop("stream.chosen")) == 30
    damaged = [[], [0] * 30, [-1, *range(20)], [10**6, *range(20)], [*range(100)], [1, 2], None]
    for chosen in damaged:
        more = {} if chosen is None else {"stream.chosen": torch.tensor(chosen, dtype=torch.int64)}
        save_file(tensors | more, path / "trainer.safetensors")
        (path / "manifest.json").unlink()
        seal(path)
        refused(tiny(*words, f"run.resume={path}", run="again"), "run.resume", "its buffer")


def test_a_checkpoint_whose_measurements_do_not_fit_is_refused(tiny, tmp_path, refused):
    words = (*STREAM, "stream.tasks=2")
    assert main(tiny(*words, "checkpoint.keep=9")) == 0
    path = tmp_path / "run" / "checkpoints" / "segment-0002"
    tensors = load_file(path / "trainer.safetensors")
    features, trace = tensors["stream.features_1"], tensors["stream.trace_2"]
    assert trace[:, 0].tolist() == [0, 2, 4, 5]
    damaged = {
        "features_1": [features[1:], features[:, 1:], features.bfloat16()],
        "features_3": [features],
        "trace_1": [trace[:, :1]],
        "trace_2": [trace[:0], trace.float(), trace.flip(0), trace * 2, trace[:, [0, 1, 1]]],
        "trace_x": [trace],
    }
    for name, values in damaged.items():
        for value in values:
            save_file(tensors | {f"stream.{name}": value.contiguous().clone()}, path / "trainer.safetensors")
            (path / "manifest.json").unlink()
            seal(path)
            refused(tiny(*words, f"run.resume={path}", run="again"), "run.resume", f"its {name} does not fit")


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_trace_that_is_not_whole_is_no_measure(before, after, tiny, tmp_path, interrupt_at, blank_figures):
    """Tracing began, or ended, in the middle of the second task."""
    interrupt_at(8)
    assert main(tiny(*STREAM, f"stream.trace_every={before}")) == 143
    blank_figures.undo()
    assert main(tiny(*STREAM, f"stream.trace_every={after}", "run.resume=auto", "run.overwrite=false")) == 0
    rows, summary = read(tmp_path / "run")
    assert not any("stream_cosine_drop" in row for row in rows)
    assert (2 in map(int, summary["stream"]["traces"])) == (before == 2 or after == 2)
    assert (tmp_path / "run" / "figures" / "stream.png").stat().st_size > 10_000


def test_images_that_are_measured_are_of_all_classes(tiny):
    """Neighbours in a dataset that is sorted by class are of one: the first ones would not do."""
    positions = np.arange(2000)
    chosen = some(positions, 1000)
    assert len(set(chosen)) == 1000
    assert (np.diff(chosen) > 0).all()
    assert 400 < (chosen < 1000).sum() < 600
    assert some(positions[:7], 1000).tolist() == list(range(7))


def test_a_stream_that_diverges_says_so(tiny, tmp_path, capsys, monkeypatch):
    """Before anything is fitted to features that are not finite."""
    original = TrainingStep.step

    def poisoned(self, batch, step):
        if step == 8:
            with torch.no_grad():
                next(self.model.encoder.parameters()).fill_(float("nan"))
        return original(self, batch, step)

    monkeypatch.setattr(TrainingStep, "step", poisoned)
    assert main(tiny(*STREAM, "stream.trace_every=0", "run.log_every=1000")) == 3
    assert "diverged: " in capsys.readouterr().out


@pytest.mark.slow
def test_processes_end_with_the_scores_of_one(tiny, tmp_path, ranks):
    """The main process measures, the others wait; both take the same decisions and all images of a batch once."""
    words = tiny(*STREAM, "model.aggregator.dropout=0", "run.deterministic=false", run="two")
    result = ranks(2, "engine/train.py", *words)
    assert result.returncode == 0, result.stderr
    assert main(tiny(*STREAM, "model.aggregator.dropout=0", "run.deterministic=false", run="one")) == 0
    (rows, _), (expected, _) = read(tmp_path / "two"), read(tmp_path / "one")
    for task in (1, 2, 3):
        name = f"task_cosine_{task}"
        assert rows[0][name] == pytest.approx(expected[0][name], abs=5e-3)
    assert rows[-1].keys() == expected[-1].keys()


def test_the_control_of_the_tasks_is_the_same_on_any_number_of_processes(tiny):
    """Its batch norm has the statistics of whole batches, and 50 of them show as many images."""
    config = compose(tiny(*ACTIONS)).config
    accelerator = build_accelerator(config.run, 1)
    built = [
        build_loaders(config.data, config.sequence, seed=0, device=torch.device("cpu"), num_processes=processes).train
        for processes in (1, 2)
    ]
    one, two = (
        untrained_network(config, accelerator, loader.restricted(loader.sampler.indices)).state_dict()
        for loader in built
    )
    assert any(name.endswith("running_var") for name in one)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_the_cosine_is_that_of_centred_rows(tiny):
    """By hand, on the images and the moves of one task; a constant added to every prediction changes nothing."""
    config = compose(tiny(*ACTIONS)).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    training = TrainingStep(config, loaders, accelerator)
    model = training.model.eval()
    found = task_scores(model, training.objective, loaders, accelerator)
    task = loaders.stream.tasks[1]
    with torch.no_grad():
        outputs = [model(b.views, b.actions) for b in loaders.validation.restricted(task.validation).epoch(0)]
    prediction, target = (torch.cat([getattr(output, name) for output in outputs]) for name in ("prediction", "target"))
    assert len(prediction) == len(task.validation)
    a, b = prediction - prediction.mean(0), target - target.mean(0)
    expected = ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    assert found["task_cosine_2"] == pytest.approx(expected.item(), abs=1e-5)
    with torch.no_grad():
        model.predictor.layers[-1].bias.add_(7.0)
    again = task_scores(model, training.objective, loaders, accelerator)
    assert again["task_cosine_2"] == pytest.approx(found["task_cosine_2"], abs=1e-4)
    shuffled = task_scores(model, training.objective, loaders, accelerator, shuffled=True)
    assert shuffled["task_cosine_2"] != pytest.approx(found["task_cosine_2"], abs=1e-6)


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
        (("early_stop.metric=val_loss",), ("early_stop.metric", "only null is allowed")),
        (
            ("gates.rules.digits_affine=[{metric: stream_class_average, margin: 1.0}]", "gates.enforce=true"),
            ("stream_class_average has no untrained control",),
        ),
        (
            ("gates.rules.digits_affine=[{metric: task_r2_1, min: 0.0}]", "sequence.num_observed=1"),
            ("is not computed",),
        ),
        (("stream.tasks=1",), ("stream.tasks",)),
        (("stream.kind=nothing",), ("stream.kind", "classes")),
    ],
)
def test_refusals(words, parts, tiny, refused):
    refused(tiny(*STREAM, *words), *parts)
