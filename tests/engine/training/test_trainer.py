"""Whole runs on real digits: what they write, how they stop, resume, diverge and are judged."""

import json
import math
import os
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from seqjepa.engine.compare import read_run
from seqjepa.engine.config import compose
from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.train import main
from seqjepa.engine.training import diagnostics
from seqjepa.engine.training import step as step_module
from seqjepa.engine.training.validation import metric_names

pytestmark = pytest.mark.usefixtures("blank_figures")

FILES = ("model", "probes", "trainer", "rng-00000")


def rows(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(run: Path):
    return [{k: v for k, v in row.items() if k != "timing"} for row in rows(run)]


def summary(run: Path):
    return json.loads((run / "summary.json").read_text())


def assert_same_checkpoint(one: Path, other: Path):
    for name in FILES:
        ours, theirs = (load_file(path / f"{name}.safetensors") for path in (one, other))
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key]), f"{name}: {key}"


def test_a_run_writes_what_it_promises(tiny, tmp_path, capsys):
    assert main(tiny("gates.enforce=true", "gates.rules.digits_affine=[{metric: val_loss, max: 2.0}]")) == 0
    run = tmp_path / "run"
    printed = capsys.readouterr().out
    block = dict(line.split(": ", 1) for line in printed[printed.rindex("---\n") + 4 :].splitlines())
    assert block["gate_pass"] == "True"
    assert block["epochs"] == "2"

    final = summary(run)
    expected = {
        "gate_pass",
        "gate_reasons",
        "final",
        "best",
        "untrained",
        "largest_class",
        "best_epoch",
        "final_minus_best",
        "epochs",
        "stopped_early",
        "commit",
        "timing",
    }
    assert set(final) == expected
    assert set(final["timing"]) == {"seconds", "sequences_per_second", "hardware", "versions"}
    assert final["gate_pass"] is True
    assert final["gate_reasons"] == []
    lines = rows(run)
    assert [line["epoch"] for line in lines] == [1, 2]
    diagnostics = {name for name in lines[-1] if name.startswith(("subspace_", "circle_"))}
    assert final["final"] == {k: v for k, v in lines[-1].items() if k not in ("epoch", "timing", *diagnostics)}
    gap = final["final"]["online_r2_test"] - final["best"]["online_r2_test"]
    assert final["final_minus_best"] == pytest.approx(gap)
    assert final["best"]["online_r2_test"] == max(line["online_r2_test"] for line in lines)
    assert float(block["online_r2_test"]) == pytest.approx(final["final"]["online_r2_test"], rel=1e-5)
    # every metric that gates may ask for is there, and no other
    factors = {name: slice(0, 1) for name in ("rotation", "translation_x", "translation_y", "scale")}
    names = metric_names(compose(tiny()).config, 10, factors)
    assert set(final["final"]) == names
    assert {name for name in names if name.endswith("_test")} <= set(final["untrained"])
    assert yaml.safe_load((run / "config.yaml").read_text())["run"]["epochs"] == 2
    assert (run / "figures" / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert os.readlink(run / "checkpoints" / "best") == f"epoch-{final['best_epoch']:04d}"
    state = json.loads((run / "checkpoints" / "epoch-0002" / "state.json").read_text())
    assert state["config"]["run"]["epochs"] == 2
    assert state["position"] == {"segment": 2, "step": 0}


def test_the_same_command_gives_the_same_run(tiny, tmp_path):
    for run in ("one", "two"):
        assert main(tiny(run=run)) == 0
    assert timeless(tmp_path / "one") == timeless(tmp_path / "two")
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "epoch-0002" for run in ("one", "two")))
    assert main(tiny("run.seed=1", run="three")) == 0
    assert timeless(tmp_path / "one") != timeless(tmp_path / "three")


@pytest.mark.parametrize(
    ("settings", "step", "number"),
    [
        ((), 7, signal.SIGTERM),  # in the second epoch
        (("target.kind=stop_gradient", "optim.clip_norm=0.5"), 2, signal.SIGINT),  # in the first
        (
            ("optim.accumulate=2", "target.buffers=average", "target.schedule=cosine"),
            4,
            signal.SIGTERM,
        ),  # an epoch's last step
        (
            (
                *("objective.prediction.kind=infonce", "objective.prediction.queue=50", "objective.sigreg.weight=0.1"),
                *("objective.prediction.scale_limits=[0.05, 0.2]", "model.projector.kind=mlp", "optim.accumulate=2"),
            ),
            6,
            signal.SIGTERM,
        ),
    ],
)
def test_an_interrupted_run_reaches_the_same_weights(
    tiny, tmp_path, capsys, interrupt_at, monkeypatch, settings, step, number
):
    assert main(tiny(*settings, run="whole")) == 0
    interrupt_at(step, number)
    assert main(tiny(*settings, run="cut")) == 128 + number
    monkeypatch.undo()
    printed = capsys.readouterr().out
    assert f"interrupted by {number.name}: saved " in printed
    assert "run.resume=auto continues" in printed
    folder = tmp_path / "cut" / "checkpoints"
    done, within = divmod(step + 1, 5)
    left_at = f"epoch-{done:04d}-step-{within:05d}" if within else f"epoch-{done - 1:04d}-step-00005"
    assert (folder / left_at).is_dir()
    assert not (tmp_path / "cut" / "summary.json").exists()

    torch.manual_seed(999)  # what the process did before must not matter
    assert main(tiny(*settings, "run.resume=auto", run="cut")) == 0
    assert "resumed from" in capsys.readouterr().out
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert_same_checkpoint(folder / "epoch-0002", tmp_path / "whole" / "checkpoints" / "epoch-0002")
    ours, theirs = (summary(tmp_path / run) for run in ("cut", "whole"))
    assert {k: v for k, v in ours.items() if k != "timing"} == {k: v for k, v in theirs.items() if k != "timing"}


def logged(run: Path):
    return [{k: v for k, v in row.items() if k != "timing"} for row in read_rows(run / "steps.jsonl", "step")]


def test_an_epoch_without_a_step_of_this_start_has_no_rate(tiny, tmp_path, interrupt_at, capsys):
    """The signal comes in its last step; what the resumed run does of it is validation, and the summary has all."""
    interrupt_at(4)
    assert main(tiny()) == 143
    capsys.readouterr()
    assert main(tiny("run.resume=auto", "run.overwrite=false")) == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("epoch 1/2", "epoch 2/2"))]
    assert [title.rstrip().endswith("sequences/s") for title in titles] == [False, True]
    timings = [row["timing"] for row in rows(tmp_path / "run")]
    assert ["sequences_per_second" in timing for timing in timings] == [False, True]
    run = tmp_path / "run"
    assert read_run(run).seconds == summary(run)["timing"]["seconds"]


def test_steps_are_logged_once_however_often_a_run_was_stopped(tiny, tmp_path, interrupt_at, monkeypatch):
    words = ("run.log_every=2", "run.epochs=3", "checkpoint.keep=3")
    assert main(tiny(*words, run="whole")) == 0
    whole = logged(tmp_path / "whole")
    assert [row["step"] for row in whole] == list(range(2, 16, 2))
    assert all(math.isfinite(value) for row in whole for value in row.values())
    assert {"step_loss", "lr", "prediction_rank", "target_rank"} <= whole[0].keys()
    interrupt_at(7)
    assert main(tiny(*words, run="cut")) == 143
    monkeypatch.undo()
    assert logged(tmp_path / "cut") == whole[: len(logged(tmp_path / "cut"))]
    with (tmp_path / "cut" / "steps.jsonl").open("a") as file:
        file.write('{"step": 14, "step_loss": 0.0}\n{"step": 9')  # of a process that was killed later on
    assert main(tiny(*words, "run.resume=auto", run="cut")) == 0
    assert logged(tmp_path / "cut") == whole
    first = tmp_path / "whole" / "checkpoints" / "epoch-0001"
    assert main(tiny(*words, f"run.resume={first}", run="other")) == 0
    assert logged(tmp_path / "other") == whole
    assert main(tiny(*words, "run.overwrite=true", run="other")) == 0
    assert logged(tmp_path / "other") == whole


@pytest.mark.gpu
@pytest.mark.parametrize(("settings", "tolerance"), [((), 1e-6), (("run.deterministic=false",), 1e-3)])
def test_gpu_an_interrupted_run_is_the_undisturbed_one(tiny, tmp_path, interrupt_at, monkeypatch, settings, tolerance):
    """Up to the order of sums, which CUDA is free to choose without run.deterministic."""
    words = ("run.device=cuda", "run.precision=fp32", *settings)
    assert main(tiny(*words, run="whole")) == 0
    interrupt_at(7)
    assert main(tiny(*words, run="cut")) == 143
    monkeypatch.undo()
    assert main(tiny(*words, "run.resume=auto", run="cut")) == 0
    for ours, theirs in zip(rows(tmp_path / "cut"), rows(tmp_path / "whole"), strict=True):
        for name in ("ep_loss", "val_loss", "grad_norm", "online_linloss_train"):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance), name


def test_resuming_from_a_path_goes_back(tiny, tmp_path, capsys, refused, interrupt_at, monkeypatch):
    words = ("run.epochs=4", "checkpoint.keep=2", "eval.best_metric=ep_loss", "eval.best_mode=min")
    assert main(tiny(*words, "checkpoint.keep=9")) == 0
    before = timeless(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    assert os.readlink(folder / "best") == "epoch-0004"
    interrupt_at(7)
    capsys.readouterr()
    assert main(tiny(*words, f"run.resume={folder / 'epoch-0001'}")) == 143
    monkeypatch.undo()
    printed = capsys.readouterr().out
    assert f"resumed from {folder / 'epoch-0001'}: epoch 2, step 0" in printed
    # what lay ahead is gone, what was saved is there
    assert {path.name for path in folder.iterdir()} == {"epoch-0001", "epoch-0001-step-00003", "best"}
    assert os.readlink(folder / "best") == "epoch-0001"
    assert len(rows(tmp_path / "run")) == 1
    assert main(tiny(*words, "run.resume=auto")) == 0
    assert timeless(tmp_path / "run") == before
    refused(tiny(*words, "run.resume=auto", "run.epochs=2"), "run.epochs", "is 2", "has 4 already")
    refused(tiny(*words, "run.resume=auto", "eval.best_mode=max"), "eval.best_mode", "was trained with 'min'")


def test_signals_that_are_passed_on_twice_count_once(tiny, tmp_path, capsys, monkeypatch):
    original = step_module.TrainingStep.step

    def twice(self, batch, at):
        if at == 3 and self.train_model:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, at)

    monkeypatch.setattr(step_module.TrainingStep, "step", twice)
    assert main(tiny()) == 143
    assert "saved" in capsys.readouterr().out


def test_retention_keeps_the_newest_and_the_best(tiny, tmp_path):
    words = ("run.epochs=5", "checkpoint.keep=1", "eval.best_metric=ep_loss", "eval.best_mode=max")
    assert main(tiny(*words)) == 0  # the loss is largest in the first epoch
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept == {"epoch-0001", "epoch-0005", "best"}


def test_an_enforced_gate_decides_the_exit_code(tiny, tmp_path, capsys):
    rule = "gates.rules.digits_affine=[{metric: online_r2_test, margin: 0.5}]"
    assert main(tiny(rule, run="lenient")) == 0
    assert main(tiny(rule, "gates.enforce=true", run="strict")) == 1
    for run in ("lenient", "strict"):
        verdict = summary(tmp_path / run)
        assert verdict["gate_pass"] is False
        assert any(reason.startswith("final epoch: online_r2_test = ") for reason in verdict["gate_reasons"])
        assert any(reason.startswith("best epoch ") for reason in verdict["gate_reasons"])
    assert "gate: final epoch: online_r2_test" in capsys.readouterr().out


def test_divergence_ends_with_3_and_saves_no_nan(tiny, tmp_path, capsys, monkeypatch):
    original = step_module.TrainingStep.step

    def poisoned(self, batch, step):
        if step == 7:
            batch.views[0, 0, 0, 0, 0] = torch.nan
        return original(self, batch, step)

    monkeypatch.setattr(step_module.TrainingStep, "step", poisoned)
    assert main(tiny("run.log_every=1000")) == 3
    printed = capsys.readouterr().out
    good = tmp_path / "run" / "checkpoints" / "epoch-0001"
    assert f"diverged: loss_prediction was not finite at step 7 (epoch 2); last good checkpoint: {good}" in printed
    assert sorted(p.name for p in good.parent.iterdir()) == ["best", "epoch-0001"]
    for name in ("model", "probes", "trainer"):
        for key, tensor in load_file(good / f"{name}.safetensors").items():
            assert torch.isfinite(tensor).all(), key
    assert [row["epoch"] for row in rows(tmp_path / "run")] == [1]


def test_a_gradient_alone_can_diverge(tiny, capsys, monkeypatch):
    def poison(parameter):
        parameter.register_hook(lambda gradient: gradient * torch.inf)

    original = step_module.TrainingStep.__init__

    def built(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.train_model:
            poison(self.model.predictor.layers[0].weight)

    monkeypatch.setattr(step_module.TrainingStep, "__init__", built)
    assert main(tiny("run.log_every=1")) == 3
    assert "diverged: grad_norm was not finite at step 0 (epoch 1); nothing was saved" in capsys.readouterr().out


def test_the_control_is_run_once_and_cached(tiny, tmp_path, capsys):
    assert main(tiny(run="one")) == 0
    assert "(once; then cached)" in capsys.readouterr().out
    assert main(tiny("run.epochs=3", "optim.lr=1e-4", run="two")) == 0
    assert "untrained control: cached in" in capsys.readouterr().out
    assert summary(tmp_path / "one")["untrained"] == summary(tmp_path / "two")["untrained"]
    # what decides the control's figures makes another one
    for change in (
        "run.seed=7",
        "model.encoder.width=5",
        "data.train_subset=170",
        "probes.lr=1e-2",
        "sequence.num_observed=2",
    ):
        assert main(tiny(change, "run.epochs=1", "run.overwrite=true")) == 0
        assert "(once; then cached)" in capsys.readouterr().out


def test_a_run_without_a_control_says_so(tiny, tmp_path):
    assert main(tiny("control.enabled=false", "gates.rules.digits_affine=[]", "run.epochs=1")) == 0
    assert summary(tmp_path / "run")["untrained"] is None
    assert not (tmp_path / "untrained").exists()


def test_a_frozen_run_is_its_own_control(tiny, tmp_path):
    """With a frozen encoder, a probe on its features must land exactly on the untrained control."""
    assert main(tiny("ablation.freeze_encoder=true", "control.max_epochs=2")) == 0
    verdict = summary(tmp_path / "run")
    for name in ("online_r2_test", "leakage_linacc_test", "matched_z_linacc_test"):
        assert verdict["final"][name] == pytest.approx(verdict["untrained"][name], rel=1e-5)
    assert verdict["final"]["online_linacc_test"] != verdict["untrained"]["online_linacc_test"]


def test_kernels_and_torch_train_alike(tiny, tmp_path):
    """AdamW and the teacher's update in one pass, and one after the other: on a CPU they differ by roundings alone."""
    teachers = []
    for run, words in {
        "kernels": [],
        "torch": ["optim.kind=adamw"],
    }.items():
        assert main(tiny("target.decay=0.9", "target.schedule=cosine", "target.buffers=average", *words, run=run)) == 0
        weights = load_file(tmp_path / run / "checkpoints" / "epoch-0002" / "model.safetensors")
        teachers.append({name: value for name, value in weights.items() if name.startswith("target.")})
    for other in teachers[1:]:
        for name, value in teachers[0].items():
            # four steps of Adam at lr 1e-3 amplify the last bit of a gradient near zero by its sign at most
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


def test_learning_rate_zero_leaves_the_weights(tiny, tmp_path):
    assert main(tiny("optim.lr=0", "optim.min_lr=0")) == 0
    first, last = (load_file(tmp_path / "run" / "checkpoints" / f"epoch-000{n}" / "model.safetensors") for n in (1, 2))
    parameters = [key for key in first if not any(part in key for part in ("running", "num_batches"))]
    assert all(torch.equal(first[key], last[key]) for key in parameters)
    assert len(parameters) > 30


def test_accumulation_keeps_the_batch(tiny, tmp_path):
    """Two micro-batches see the same images: only batch statistics differ, so losses and gradients are close."""
    for parts in (1, 2):
        assert main(tiny(f"optim.accumulate={parts}", "run.epochs=1", run=str(parts))) == 0
    one, two = (rows(tmp_path / run)[0] for run in "12")
    assert one["loss_prediction"] != two["loss_prediction"]
    assert one["loss_prediction"] == pytest.approx(two["loss_prediction"], rel=0.1)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=0.3)  # summed instead of averaged: twice


def test_validation_can_be_rarer(tiny, tmp_path):
    assert main(tiny("run.epochs=5", "eval.every=2")) == 0
    assert [row["epoch"] for row in rows(tmp_path / "run") if "val_loss" in row] == [2, 4, 5]


def test_a_cut_cache_of_the_control_is_made_anew(tiny, tmp_path, capsys):
    assert main(tiny()) == 0
    (cached,) = (tmp_path / "untrained").glob("*.json")
    whole = cached.read_text()
    for damaged in (whole[:50], "[]", '{"online_linacc_test": "x"}', "[" * 100_000):
        cached.write_text(damaged)
        assert main(tiny()) == 0
        assert cached.read_text() == whole


def test_a_run_that_no_longer_improves_ends(tiny, tmp_path):
    """Nothing improves accuracy by a thousand: the first validation is the best, and two more are waited for."""
    rule = ("early_stop.metric=online_linacc_test", "early_stop.patience=2", "early_stop.min_delta=1000.0")
    assert main(tiny("run.epochs=9", *rule)) == 0
    final = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (final["stopped_early"], final["epochs"]) == (True, 3)
    assert (tmp_path / "run" / "checkpoints" / "epoch-0003").is_dir()
    # a run that was stopped in between has waited as long
    assert main(tiny("run.epochs=9", *rule, "early_stop.patience=1", run="two")) == 0
    assert main(tiny("run.epochs=9", *rule, "run.resume=auto", run="two")) == 0
    assert_same_checkpoint(*(tmp_path / run / "checkpoints" / "epoch-0003" for run in ("run", "two")))
    # and one that has ended has nothing left to do
    before = rows(tmp_path / "two")
    assert main(tiny("run.epochs=9", *rule, "run.resume=auto", run="two")) == 0
    assert rows(tmp_path / "two") == before


def test_sweeps_are_made_now_and_then_and_at_the_end(tiny, tmp_path, monkeypatch, capsys):
    """And a resumed run measures stability against the same bases, and ends with the same figures."""
    words = ("run.epochs=3", "diagnostics.every=2", "diagnostics.anchors=8", "optim.schedule=constant")
    assert main(tiny(*words)) == 0
    swept = {row["epoch"]: row for row in rows(tmp_path / "run") if "subspace_ev_rotation_2" in row}
    assert list(swept) == [2, 3]
    assert "subspace_stability_rotation" not in swept[2]
    assert 0 < swept[3]["subspace_stability_rotation"] <= 1 + 1e-9
    assert swept[3]["timing"]["diagnostics_time"] > 0
    figures = {path.stem for path in (tmp_path / "run" / "figures").iterdir()}
    assert {"rotation_circle", "sweep_traj_scale", "eigs_translation_x", "overlap_heatmap", "rank_monitor"} <= figures
    assert main(tiny(*words, "run.epochs=2", run="two")) == 0
    assert main(tiny(*words, "run.resume=auto", run="two")) == 0
    assert [row | {"timing": 0} for row in rows(tmp_path / "two")] == [
        row | {"timing": 0} for row in rows(tmp_path / "run")
    ]
    # what a sweep cannot do costs no epoch
    monkeypatch.setattr(diagnostics, "draw_all", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    capsys.readouterr()
    assert main(tiny("diagnostics.every=1", "run.epochs=1", run="full")) == 0
    assert "no sweeps for epoch 1: no space left" in capsys.readouterr().out
    assert (tmp_path / "full" / "summary.json").exists()
    assert not any("subspace_ev_rotation_2" in row for row in rows(tmp_path / "full"))


def test_curves_that_cannot_be_written_fail_no_run(tiny, tmp_path, capsys):
    assert main(tiny("run.epochs=1")) == 0
    curves = tmp_path / "run" / "figures" / "curves.png"
    curves.unlink()
    curves.mkdir()
    for epochs in (1, 2):
        capsys.readouterr()
        assert main(tiny("run.resume=auto", f"run.epochs={epochs}")) == 0
        said = capsys.readouterr().out
        assert f"curves are not drawn: {curves} cannot be written (Is a directory)" in said
        assert f"epochs: {epochs}" in said


def test_a_run_that_has_ended_ends_in_the_same_words(tiny, capsys):
    """Also where a metric is NaN, which files hold as null: one angle alone leaves no action to predict."""
    one_angle = ("sequence.kind=rotation", "sequence.angles=[0]", "actions.normalization=none")
    words = tiny("run.epochs=1", "run.resume=auto", *one_angle)
    said = []
    for _ in range(2):
        assert main(words) == 0
        said.append(capsys.readouterr().out.partition("\n---\n")[2])
    assert said[0] == said[1]
    assert "online_r2_test: nan\nuntrained_online_r2_test: nan\n" in said[0]
