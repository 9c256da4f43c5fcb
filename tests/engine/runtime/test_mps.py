"""Apple's GPUs have no float64: no operation of a step asks them for it. Here the CPU plays such a device."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.validation import validate
from seqjepa.kernels.internal import backend


class WithoutFloat64(TorchDispatchMode):
    """Fails an operation that gives float64, as a device that does not have it."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        found = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
        if operation is torch.ops.aten.lift_fresh.default and found[:1] and found[0].shape == (4,):
            return result  # AdamWEMA's settings, which are on the CPU on purpose, and are read there
        assert not found, operation
        return result


def test_the_mode_notices_float64():
    with WithoutFloat64(), pytest.raises(AssertionError):
        torch.ones(2).double()


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
def test_a_step_needs_no_float64(tiny, other, monkeypatch):
    monkeypatch.setattr(backend, "WITHOUT_FLOAT64", {"cpu"})
    config = compose(tiny(other=other)).config
    accelerator = build_accelerator(config.run, config.optim.accumulate)
    loaders = open_loaders(config, accelerator)
    training = TrainingStep(config, loaders, accelerator)
    with WithoutFloat64():
        for number, batch in zip(range(2), loaders.train.epoch(0), strict=False):
            training.step(batch, number)
    assert all(value == value for name, value in training.epoch_metrics().items() if name.startswith("loss"))
    metrics = validate(training, loaders.validation).metrics
    assert metrics["val_loss"] == metrics["val_loss"]


def test_what_mps_cannot_do_is_one_line():
    for words, said in ((("run.precision=bf16",), "trains in fp32"), (("run.compile=default",), "does not compile")):
        with pytest.raises(InputError, match=said):
            compose(["run.device=mps", *words])


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device here")
def test_a_machine_without_it_says_so():
    with pytest.raises(InputError, match="mps is not there"):
        build_accelerator(compose(["run.device=mps"]).config.run, 1)
