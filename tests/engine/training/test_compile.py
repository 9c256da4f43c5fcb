"""The same run in bf16, compiled, and compiled by an earlier process."""

import json
from pathlib import Path

import pytest
import torch

from seqjepa.engine.config import compose
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.objectives.objective import Objective
from seqjepa.engine.train import main
from seqjepa.loaders.sequences import build_sequence

pytestmark = pytest.mark.usefixtures("blank_figures")
PLAIN = ("run.epochs=1", "run.deterministic=false", "control.enabled=false", "gates.rules.digits_affine=[]")


def rows(run: Path):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_bf16_stays_close_to_fp32(tiny, tmp_path):
    assert main(tiny(*PLAIN, run="fp32")) == 0
    assert main(tiny(*PLAIN, "run.precision=bf16", run="bf16")) == 0
    fp32, bf16 = (rows(tmp_path / run)[0] for run in ("fp32", "bf16"))
    assert bf16["ep_loss"] != fp32["ep_loss"]
    assert bf16["ep_loss"] == pytest.approx(fp32["ep_loss"], rel=0.05)  # five steps; bf16 keeps 8 bits


def test_compiled_stays_close_to_eager(tiny, tmp_path, monkeypatch):
    compilations = []
    original = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compilations.append(how) or original(self, **how)
    )
    # without dropout, whose masks differ under compilation
    assert main(tiny(*PLAIN, "model.aggregator.dropout=0.0", run="eager")) == 0
    assert main(tiny(*PLAIN, "model.aggregator.dropout=0.0", "run.compile=default", run="compiled")) == 0
    assert len(compilations) == 1
    eager, compiled = (rows(tmp_path / run)[0] for run in ("eager", "compiled"))
    for name in ("ep_loss", "val_loss", "grad_norm"):
        assert compiled[name] == pytest.approx(eager[name], rel=1e-3)  # sums in another order, five steps


@pytest.mark.parametrize(
    "words",
    [
        ("configs/circle.yaml", "gates.enforce=false"),
        ("tests/small.yaml", "configs/variant/group_factors.yaml"),
        ("tests/small.yaml", "model.aggregator.kind=mean", "model.aggregator.kind=crate", "model.predictor.kind=crate"),
        ("tests/small.yaml", "model.aggregator.kind=mean", "model.aggregator.kind=tost"),
    ],
)
def test_model_and_objective_are_one_graph(words):
    config = compose(words).config
    sequence = build_sequence(config.sequence, (24, 24), config.actions)
    torch.manual_seed(0)
    model, objective = (
        SeqJEPA(config.model, config.target, sequence.action_space),
        Objective(config.objective, config.model.prediction_width),
    )
    views, actions, step = torch.rand(8, 4, 3, 24, 24), torch.randn(8, 3, sequence.action_dim), torch.tensor(0)

    def loss(views, actions, step):
        return objective(model(views, actions).float(), step)[0]

    model.eval()  # without dropout
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(views, actions, step)
    torch.testing.assert_close(compiled, loss(views, actions, step))
    compiled.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow
def test_compiled_bf16_on_a_cpu_trains_and_validates(tiny, tmp_path):
    """The transformer's fused path for evaluation once failed here, after the first epoch."""
    words = ("run.compile=default", "run.deterministic=false", "run.precision=bf16", "objective.reading.kind=both")
    assert main(tiny(*words)) == 0
    assert len(rows(tmp_path / "run")) == 2


WARM = """
import sys
from torch._dynamo.utils import counters
from seqjepa.engine.train import main
code = main(sys.argv[1:])
found = counters["aot_autograd"]
print("hits and misses:", found["autograd_cache_hit"], found["autograd_cache_miss"])
sys.exit(code)
"""


@pytest.mark.slow
def test_a_restarted_job_finds_its_compiled_programs(tiny, tmp_path, run_process, python):
    words = tiny(*PLAIN, "run.compile=default", f"run.compile_cache={tmp_path / 'compiled'}")
    kept = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_AUTOGRAD_CACHE": "1"}
    found = []
    for _ in range(2):
        result = run_process(python, "-c", WARM, *words, "run.overwrite=true", **kept)
        assert result.returncode == 0, result.stderr
        (line,) = [line for line in result.stdout.splitlines() if line.startswith("hits and misses:")]
        found.append([int(word) for word in line.split()[-2:]])
    (cold_hits, cold_misses), (warm_hits, warm_misses) = found
    assert cold_hits == 0
    assert cold_misses > 0
    assert (warm_hits, warm_misses) == (cold_misses, 0)
    assert rows(tmp_path / "run")[0]["timing"]["compile_time"] > 0
