"""The smoke gate means something: the run passes it, and each of its three controls fails it."""

import json

import pytest

from seqjepa.engine.train import main

pytestmark = pytest.mark.slow
DECIDING = {"online_r2_test", "pred_cosine_centred_test"}  # which a network without actions fails with every seed


def smoke(folder, *words):
    arguments = ["configs/smoke.yaml", "tracking.wandb=disabled", f"run.dir={folder / 'run'}", *words]
    code = main([*arguments, f"control.cache={folder / 'untrained'}"])
    return code, json.loads((folder / "run" / "summary.json").read_text())


def failed_metrics(summary):
    return {
        reason.removeprefix("final epoch: ").split(" = ")[0] for reason in summary["gate_reasons"] if "final" in reason
    }


def test_the_run_passes(tmp_path):
    code, summary = smoke(tmp_path)
    assert code == 0
    assert summary["gate_pass"] is True
    assert summary["timing"]["seconds"] < 180


@pytest.mark.parametrize(
    "control",
    [("ablation.shuffle_actions=true",), ("ablation.freeze_encoder=true",), ("optim.lr=0", "optim.min_lr=0")],
    ids=["shuffled actions", "frozen encoder", "learning rate zero"],
)
def test_a_control_fails(control, tmp_path):
    code, summary = smoke(tmp_path, *control)
    assert code == 1
    assert summary["gate_pass"] is False
    assert failed_metrics(summary) >= DECIDING
