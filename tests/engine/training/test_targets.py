"""Tasks without classes, without factors of the action, or without both: the metrics that are possible are measured."""

import json
from dataclasses import replace

import pytest

from seqjepa.engine.compare import main as compare
from seqjepa.engine.config import compose
from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.evaluation import cases, frozen
from seqjepa.engine.train import main as train
from seqjepa.engine.training import loading
from seqjepa.engine.training.validation import metric_names
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.sequences.affine import Affine

pytestmark = pytest.mark.usefixtures("blank_figures")
FACTORS = dict(Affine.factors)
BEST = ("gates.rules.digits_affine=[]", "eval.best_metric=val_loss", "eval.best_mode=min")


@pytest.fixture
def without(monkeypatch):
    """Digits whose class is unknown, or whose actions have no names."""

    def unlabelled(*args, **kwargs):
        loaders = build_loaders(*args, **kwargs)
        for loader in (loaders.train, loaders.validation):
            loader.images.labels.zero_()
        return replace(loaders, classes=[])

    def make(*targets):
        if "class" in targets:
            monkeypatch.setattr(loading, "build_loaders", unlabelled)
            monkeypatch.setattr(cases, "build_loaders", unlabelled)
            monkeypatch.setattr(frozen, "build_loaders", unlabelled)
        if "action" in targets:
            monkeypatch.setattr(Affine, "action_dim", 5)
            monkeypatch.setattr(Affine, "factors", {})

    return make


@pytest.mark.parametrize(
    "missing", [*(pytest.param((name,), marks=pytest.mark.slow) for name in ("class", "action")), ("class", "action")]
)
def test_what_cannot_be_asked_is_left_out(without, tiny, tmp_path, capsys, missing):
    without(*missing)
    words = tiny(*BEST)
    assert train(words) == 0
    printed = capsys.readouterr().out
    final = json.loads((tmp_path / "run" / "summary.json").read_text())["final"]
    known = (None if "class" in missing else 10, {} if "action" in missing else FACTORS)
    assert set(final) == metric_names(compose(words).config, *known)
    for target, score in (("class", "_linacc"), ("action", "_r2")):
        assert any(score in name for name in final) == (score in printed) == (target not in missing)

    run, small = str(tmp_path / "run"), ("eval.lengths=[1,2]", "eval.batch_size=32")
    paper = ("eval.protocol=both", "eval.epochs=2", "eval.linear_epochs=1")
    if len(missing) == 2:
        assert evaluate([run, *small]) == 2
        assert "neither classes nor factors" in capsys.readouterr().err
    else:
        assert evaluate([run, *small, *paper, f"eval.out={tmp_path / 'out'}"]) == 0
        result = json.loads((tmp_path / "out" / "eval.json").read_text())
        for protocol in ("fast", "paper"):
            scores = result[protocol]["trained"]
            assert any("_top1" in name for name in scores) == ("class" not in missing)
            assert any("_r2_" in name for name in scores) == ("action" not in missing)
        figures = {path.name for path in (tmp_path / "out").glob("*.png")}
        assert figures == {"factors.png" if "class" in missing else "lengths.png"}

    assert evaluate([run, *small, "eval.subspace=true", "diagnostics.anchors=8", f"eval.out={tmp_path / 'sub'}"]) == 0
    found = json.loads((tmp_path / "sub" / "subspace.json").read_text())["trained"]
    assert ("gap_class" in found) == ("class" not in missing)
    assert ("gap_action" in found) == ("equivariance_error" in found) == ("action" not in missing)
    assert "invariance_error_agg" in found

    capsys.readouterr()
    assert compare([run]) == (2 if len(missing) == 2 else 0)
    shown = capsys.readouterr()
    if len(missing) == 2:
        assert "--metrics online_linacc_test: no run has it; there are" in shown.err
        assert compare([run, "--metrics", "val_loss"]) == 0
    else:
        assert ("online_linacc_test" in shown.out) == ("class" not in missing)


def test_runs_without_classes_are_compared_without_a_grid(without, tiny, tmp_path):
    without("class")
    runs = []
    for views in (2, 3):
        runs.append(str(tmp_path / f"run{views}"))
        assert train(tiny(*BEST, f"sequence.num_observed={views}", "run.epochs=1", run=f"run{views}")) == 0
    words = ("eval.lengths=[1,2]", "eval.batch_size=32", "eval.protocol=both", "eval.epochs=1")
    assert evaluate([*runs, *words, f"eval.out={tmp_path / 'out'}"]) == 0
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert "agg_top1" not in comparison
    assert "z_r2_scale" in comparison["agreement"]
    assert not (tmp_path / "out" / "lengths_grid.png").exists()


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ((BEST[0], "eval.best_metric=online_linacc_test"), "online_linacc_test"),
        ((*BEST, "early_stop.metric=matched_z_linloss_test"), "matched_z_linloss_test"),
        (("gates.rules.digits_affine=[{metric: leakage_linacc_test, min: 0}]", *BEST[1:]), "leakage_linacc_test"),
    ],
)
def test_a_metric_that_the_task_does_not_have_is_refused(without, tiny, refused, settings, name):
    without("class")
    refused(tiny(*settings), f"{name} is not computed; there are", "online_r2_test")
