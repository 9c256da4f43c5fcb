"""Apple's GPUs have no float64: no operation of a run asks them for it. Here the CPU plays such a device."""

import os

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqjepa.configs.errors import InputError
from seqjepa.engine.analysis.accumulators import MetricBank
from seqjepa.engine.analysis.regressions import held_out_rows, ridge_regression
from seqjepa.engine.config import compose
from seqjepa.engine.evaluation.frozen import rows_of
from seqjepa.engine.reports.console import Reporter
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.runtime.interrupts import Interrupts
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.untrained_control import untrained_control
from seqjepa.engine.training.validation import validate
from seqjepa.kernels.internal import backend


class WithoutFloat64(TorchDispatchMode):
    """Fails an operation that gives float64, as a device that does not have it.

    What `Tensor.cpu` returned, and what is computed from that alone, has left the device. Numbers (0-dim) may meet
    tensors of either side.
    """

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if operation is torch.ops.aten.scalar_tensor.default:
            return result  # a number beside a tensor in `torch.where`, which torch leaves on the CPU
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = [x for x in given if x.ndim] or given
        away = bool(given) and all(getattr(x, "away", False) for x in given)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                if operation is torch.ops.aten.lift_fresh.default and x.shape == (4,):
                    continue  # AdamWEMA's settings, which are on the CPU on purpose, and are read there
                assert away or x.dtype != torch.float64, operation
                x.away = away
        return result


def _cpu(x):
    x = x.detach().clone()
    x.away = True
    return x


@pytest.fixture
def apple(monkeypatch):
    monkeypatch.setattr(backend, "WITHOUT_FLOAT64", {"cpu"})
    monkeypatch.setattr(torch.Tensor, "cpu", _cpu)
    monkeypatch.setattr(MetricBank, "double", lambda bank: bank)  # before it goes to the device
    with WithoutFloat64():
        yield


def test_the_mode_notices_float64(apple):
    x = torch.ones(2)
    with pytest.raises(AssertionError):
        x.double()
    wide = x.cpu().double() + 1
    with pytest.raises(AssertionError):
        x + wide


@pytest.mark.parametrize(
    "other",
    [
        (),
        ("target.kind=ema", "target.schedule=cosine"),
        ("target.kind=ema", "optim.kind=adamw"),
        ("objective.sigreg.weight=1.0", "model.projector.kind=mlp"),
        ("model.aggregator.kind=crate",),
        ("model.aggregator.kind=tost", "optim.accumulate=2"),
    ],
    ids=" ".join,
)
def test_a_step_needs_no_float64(tiny, other, apple):
    """Nor do its figures, a validation, and the regressions that validations of grids and streams fit."""
    config = compose(tiny("run.log_every=2", other=other)).config
    accelerator = build_accelerator(config.run, config.optim.accumulate)
    loaders = open_loaders(config, accelerator)
    training = TrainingStep(config, loaders, accelerator)
    for number, batch in zip(range(2), loaders.train.epoch(0), strict=False):
        training.step(batch, number)
    embeddings, metrics = training.embeddings(), training.epoch_metrics()
    assert metrics == metrics | {name: pytest.approx(value) for name, value in embeddings.items()}
    found = metrics | validate(training, loaders.validation).metrics
    assert all(found[name] == found[name] for name in ("val_loss", "rankme_z", *training.objective.names))
    rows = rows_of(loaders.validation, 1, lambda batch: {"first": batch.views[:, 0].flatten(1)[:, ::50]}, lambda: None)
    ridge_regression(rows["first"], rows["actions"], held_out_rows(rows["index"]), rows["first"])


def test_the_control_needs_no_float64(tiny, apple):
    config = compose(tiny()).config
    accelerator = build_accelerator(config.run, 1)
    loaders = open_loaders(config, accelerator)
    with Interrupts(os.getppid()) as interrupts, Reporter(False) as reporter:
        metrics = untrained_control(config, loaders, accelerator, reporter, interrupts)
    assert metrics["target_rank"] >= 1


def test_what_mps_cannot_do_is_one_line():
    for words, said in ((("run.precision=bf16",), "trains in fp32"), (("run.compile=default",), "does not compile")):
        with pytest.raises(InputError, match=said):
            compose(["run.device=mps", *words])


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device here")
def test_a_machine_without_it_says_so():
    with pytest.raises(InputError, match="mps is not there"):
        build_accelerator(compose(["run.device=mps"]).config.run, 1)
