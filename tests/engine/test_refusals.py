"""What a run refuses: one line that says what was given and what is allowed, exit code 2, and nothing lost."""

import json
import sys

import pytest
import torch

from seqjepa.engine.train import main


def test_an_existing_run_is_not_overwritten(tiny, tmp_path, refused):
    assert main(tiny()) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    refused(
        tiny("run.overwrite=false"),
        "run.dir:",
        "run.resume=auto continues it, run.overwrite=true replaces it",
    )
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before
    assert main(tiny("run.overwrite=true", "run.epochs=1")) == 0
    assert [json.loads(row)["epoch"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()] == [1]


def test_refusals_while_starting(tiny, tmp_path, refused):
    refused(
        tiny("data.root=/nowhere/at/all", "data.dataset=cifar10"),
        "override data.root=/nowhere/at/all: data.root:",
    )
    refused(
        tiny("data.batch_size=200", "data.train_subset=null", "data.dataset=imagefolder", "data.root=/nowhere"),
        "no such folder",
    )
    refused(
        tiny("data.batch_size=2000", "data.train_subset=null"),
        "data.batch_size: 2000 is larger than the 1438 training images",
    )
    refused(
        tiny("gates.rules.digits_affine=[{metric: gap_action, min: 0}]"),
        "gates.rules.digits_affine",
        "gap_action is not computed",
    )
    refused(
        tiny("eval.best_metric=accuracy"),
        "override eval.best_metric=accuracy: eval.best_metric: accuracy is not computed",
    )
    refused(tiny("run.resume=/nowhere"), "run.resume", "holds no checkpoint")
    if not torch.cuda.is_available():
        refused(
            tiny("run.device=cuda"),
            "override run.device=cuda: run.device: cuda is not there; this machine has cpu",
        )
    assert not (tmp_path / "run").exists()


PROJECTED = ("model.projector.kind=mlp", "model.projector.dim=8", "target.kind=shared", "objective.prediction.kind=mse")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ["target.sharpening.kind=softmax", "objective.prediction.kind=mse"],
            ["objective.prediction.kind = 'mse': compares features", "cosine or cross_entropy is allowed"],
        ),
        (
            ["objective.prediction.kind=cross_entropy"],
            ["objective.prediction.kind = 'cross_entropy': compares distributions"],
        ),
        (
            [*PROJECTED, "objective.sigreg.weight=0.1", "model.projector.unit=true"],
            [
                "model.projector.unit = True: removes the scale that objective.sigreg regularises",
                "only false is allowed",
            ],
        ),
        (
            [*PROJECTED, "objective.variance.weight=1.0", "model.projector.unit=true"],
            ["model.projector.unit = True: removes the scale"],
        ),
        (["model.projector.unit=true"], ["only applies with model.projector.kind=mlp (it is none)"]),
        (
            ["objective.prediction.temperature=0.2"],
            ["objective.prediction.temperature = 0.2: only applies with objective.prediction.kind=cross_entropy"],
        ),
        (
            ["gates.rules.digits_affine=[{metric: val_loss, margin: 0}]"],
            ["gates.rules.digits_affine: val_loss has no untrained control"],
        ),
        (
            ["objective.sigreg.weight=0.1"],
            ["objective.sigreg.weight = 0.1: needs projections", "projector.kind=mlp"],
        ),
        *(
            (
                [f"target.kind={kind}", "model.projector.kind=mlp", "model.projector.dim=8"],
                ["model.projector.kind = 'mlp': no gradient would reach the projector", "or objective.covariance"],
            )
            for kind in ("ema", "stop_gradient")
        ),
        (
            ["objective.prediction.kind=infonce", "objective.prediction.scale_limits=[0.2, 0.3]"],
            ["objective.prediction.scale_limits", "must be [lowest, highest], and scale = 0.1 between them"],
        ),
        (
            ["configs/variant/local.yaml", "objective.prediction.kind=infonce", "objective.prediction.queue=8"],
            ["objective.prediction.queue = 8: blocks have predictions of their own widths; only 0 is allowed"],
        ),
        (
            [*PROJECTED, "target.kind=ema", "objective.invariance.weight=1", "sequence.num_observed=1"],
            ["sequence.num_observed = 1: leaves one view for the terms that compare views"],
        ),
        (["objective.rate.weight=0.1", "data.batch_size=1"], ["data.batch_size = 1: must be a whole number >= 2"]),
        (["objective.rate.weight=0.1", "optim.accumulate=32"], ["optim.accumulate = 32: leaves one sequence"]),
        (["objective.prediction.weight=0"], ["objective.prediction.weight = 0: every term has weight 0"]),
        (
            [*PROJECTED, "objective.prediction.weight=0", "objective.rate.weight=0.1"],
            [
                "model.projector.kind = 'mlp': no gradient would reach the projector",
                "set objective.invariance.weight or",
            ],
        ),
        (
            ["objective.rate.weight=0.1", "objective.rate.features=projections"],
            ["objective.rate.weight = 0.1: needs projections"],
        ),
        (["objective.inverse.weight=0.1"], ["objective.inverse.weight = 0.1: needs a network that infers actions"]),
        (
            ["model.inverse.kind=mlp"],
            ["model.inverse.kind = 'mlp': nothing would train it", "set objective.inverse.weight"],
        ),
        (
            ["objective.reading.kind=windows", "objective.reading.length=4"],
            ["objective.reading.length = 4: is longer than the 3 observed views"],
        ),
        (
            ["objective.balance.kind=gradnorm", "objective.rate.weight=0.1"],
            ["objective.rate.weight = 0.1: is negative, which has no share that is left"],
        ),
        (
            ["objective.relational.weight=1"],
            ["objective.relational.weight = 1: needs tokens; model.encoder.kind=convnet"],
        ),
        (
            ["objective.balance.kind=gradnorm"],
            ["objective.balance.kind = 'gradnorm': needs two terms of features that have a weight"],
        ),
        (
            ["model.aggregator.time_embedding=true", "model.aggregator.positions=2"],
            ["model.aggregator.positions = 2: is less than the 3 observed views"],
        ),
        (["objective.rate.features=y"], ["objective.rate.features", "agg|z|both"]),
        (
            ["target.batch_statistics=own"],
            ["target.batch_statistics", "target.kind=stop_gradient or shared (it is ema)"],
        ),
        (["target.kind=shared", "target.decay=0.9"], ["target.decay", "target.kind=ema (it is shared)"]),
        (
            ["target.sharpening.temperature=0.1"],
            ["target.sharpening.temperature", "only applies with target.sharpening.kind=softmax (it is none)"],
        ),
        (
            ["model.predictor_action=false", "sequence.num_observed=1"],
            ["model.predictor_action = False: with one observed view no action would be used"],
        ),
        (
            ["model.aggregator_action=false", "model.aggregator.num_heads=3"],
            ["does not divide the token width 16 (encoder features)"],
        ),
        (["early_stop.metric=accuracy"], ["early_stop.metric: accuracy is not computed"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(tiny, tmp_path, refused, words, parts):
    refused(tiny(*words), *parts)
    assert not (tmp_path / "run").exists()


def test_refuses_a_checkpoint_of_another_experiment_or_a_damaged_one(tiny, tmp_path, refused):
    assert main(tiny("run.epochs=1")) == 0
    path = tmp_path / "run" / "checkpoints" / "epoch-0001"
    refused(
        tiny(f"run.resume={path}", "model.encoder.width=8", run="b"),
        "model.encoder.width",
        "is 8",
        "was trained with 4",
    )
    whole = (path / "trainer.safetensors").read_bytes()
    (path / "trainer.safetensors").write_bytes(whole[:1000])
    refused(tiny(f"run.resume={path}", run="b"), "run.resume", "1000 bytes, the manifest says")
    (path / "trainer.safetensors").write_bytes(whole)
    (path / "manifest.json").unlink()  # as before version 4
    for text, message in (
        ("{", "not readable"),
        ('{"version": 2}', "a checkpoint of version 2; 3, 4, 5, 6 can be read"),
    ):
        (path / "state.json").write_text(text)
        refused(tiny(f"run.resume={path}", run="b"), "run.resume", message)


def test_refuses_folders_that_cannot_be_written(tiny, tmp_path, refused):
    (tmp_path / "file").write_text("")
    refused(tiny(f"run.dir={tmp_path / 'file' / 'run'}"), "run.dir", "cannot be written")
    refused(tiny(f"control.cache={tmp_path / 'file'}"), "control.cache", "cannot be made")


def test_a_python_without_posix_trains(tiny, tmp_path, run_process):
    """What Windows' Python lacks is taken away; that it trains on Windows is not shown by this."""
    without = """
import signal, sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ModuleNotFoundError("No module named 'fcntl'", name="fcntl")

sys.meta_path.insert(0, Without())
sys.modules.pop("fcntl", None)
for name in ("SIGHUP", "SIGBUS", "SIGALRM", "SIGKILL", "setitimer"):
    delattr(signal, name)
import seqjepa.kernels
from seqjepa.engine.train import main

sys.exit(main(sys.argv[1:]))
"""
    done = run_process(sys.executable, "-W", "ignore", "-c", without, *tiny())
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "summary.json").exists()
