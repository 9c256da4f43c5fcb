"""A step can be replayed: all that changes between two steps is a tensor that is written in place."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from variants import OBJECTIVES

from seqjepa.engine.models.encoders import grid_objects
from seqjepa.engine.train import main
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.validation import validate
from seqjepa.loaders.grids.objects import find_objects


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: notes the operations of a step with their memory, and repeats them there.

    Whatever Python computed in between, such as a learning rate that is a number, stays as it was.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        made = [r.alias_info is None for r in func._schema.returns]  # neither a view nor what was written in place
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not views:
            self.calls.append((func, args, kwargs, result if any(made) else None))
        return result

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, places in self.calls:
            again = func(*args, **kwargs)
            if places is not None:
                for place, value in zip(tree_leaves(places), tree_leaves(again), strict=True):
                    if isinstance(place, torch.Tensor):
                        place.copy_(value)


def state(training: TrainingStep) -> list[torch.Tensor]:
    optimizers = (training.optimizer, training.probe_optimizer)
    moments = [value for o in optimizers for values in o.state.values() for value in values.values()]
    modules = (training.losses, training.train_losses, training.train_metrics)
    weights = [value for module in modules for value in module.state_dict().values()]
    return [x.clone() for x in (*weights, *moments, training.device_step, training.divergence)]


VARIANTS = {
    "ema": ("target.schedule=cosine", "optim.clip_norm=0.1"),
    **OBJECTIVES,
    "symmetric": (*OBJECTIVES["symmetric"], "optim.accumulate=2"),
    "bf16": ("run.precision=bf16",),
    "grids": (
        *("sequence.kind=program", "data.dataset=object_grids", "actions.normalization=none"),
        *("model.encoder.kind=grid_objects", "model.encoder.dim=16", "model.encoder.num_layers=1"),
        *("model.encoder.quantiser.kind=ema", "model.encoder.quantiser.place=path", "objective.commitment.weight=0.1"),
        *("model.projector.kind=mlp", "model.projector.dim=8", "model.projector.hidden=16", "optim.clip_norm=0.5"),
        *("objective.prediction.kind=infonce", "objective.prediction.queue=64", "objective.relational.weight=0.1"),
        *("objective.prediction.scale_limits=[0.05,0.2]", "objective.reading.kind=windows"),
        *("objective.reading.length=2", "model.aggregator.kind=weighted", "objective.sigreg.weight=0.01"),
        *(f"objective.{term}.weight=0.1" for term in ("recoloured", "shifted", "mirrored")),
    ),
}


class RecordedStep:
    """Stands in for `GraphedStep`."""

    def __init__(self, work, before: int):
        self.work, self.left, self.recording = work, before, None

    def __call__(self, batch):
        self.left -= 1
        if self.left >= 0:
            self.work(batch)
        elif self.recording is None:
            self.batch = type(batch)(*(field.clone() for field in batch))
            with Recording() as self.recording:
                self.work(self.batch)
        else:
            for place, field in zip(self.batch, batch, strict=True):
                place.copy_(field)
            self.recording.replay()


def five_steps(training, loaders, *, recorded: bool, factor: float = 1.0) -> list[torch.Tensor]:
    """State after five steps; where they are recorded, the last two repeat the third.

    Before each of them the prediction's weight, which is a number, is multiplied by `factor`.
    """
    training.graphed = RecordedStep(training._step, before=2) if recorded else None
    for number, batch in enumerate(loaders.train.epoch(0)):
        training.objective.terms["prediction"].weight *= factor
        training.step(batch, number)
    assert number == 4
    return state(training)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_is_replayed_as_if_it_were_run(build, variant, monkeypatch):
    # objects are searched in as many rounds as in a compiled step, instead of until nothing changes
    searched = lambda *given: find_objects(*given[:-1], grid_objects.ROUNDS)  # noqa: E731
    monkeypatch.setattr(grid_objects, "find_objects", searched)
    words = ("run.deterministic=false", "run.log_every=1000", "optim.warmup_epochs=1", *VARIANTS[variant])
    run = five_steps(*build(*words), recorded=False)
    replayed = five_steps(*build(*words), recorded=True)
    assert all(torch.equal(a, b) for a, b in zip(run, replayed, strict=True))


def test_the_recording_notices_a_number(build):
    """A weight of the objective is no tensor: a replay goes on with that of the recorded step."""
    words = ("run.log_every=1000", "optim.warmup_epochs=1")
    run = five_steps(*build(*words), recorded=False, factor=0.5)
    replayed = five_steps(*build(*words), recorded=True, factor=0.5)
    assert not all(torch.equal(a, b) for a, b in zip(run, replayed, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_losses_are_one_region(build, variant):
    """Dynamo traces model, objective and probes without a break."""
    training, loaders = build(*VARIANTS[variant], "optim.accumulate=1")
    given = training.step_inputs(next(loaders.train.epoch(0)))
    eager = training.losses(given, training.device_step)
    traced = torch.compile(training.losses, backend="eager", fullgraph=True, dynamic=False)
    torch._dynamo.reset()
    assert traced(given, training.device_step).total.shape == eager.total.shape


def test_a_padded_tail_changes_nothing(build):
    """70 test images in batches of 32: the last has 6, which a compiled network sees as 32."""
    training, loaders = build("run.deterministic=false")
    plain = validate(training, loaders.validation).metrics
    training.compiled = True
    seen = []
    training.model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    padded = validate(training, loaders.validation).metrics
    assert seen == [32, 32, 32]
    assert set(plain) == set(padded)
    for name, value in plain.items():
        assert padded[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name


def test_compiled_loaders_give_the_same_batches(build, monkeypatch):
    shapes = []
    compile = torch.compile

    def traced(function, **how):
        program = compile(function, backend="eager", fullgraph=True, **how)

        def call(loader, pixels, *rest):
            shapes.append(len(pixels))
            return program(loader, pixels, *rest)

        return call

    _, plain = build()
    monkeypatch.setattr(torch, "compile", traced)
    _, compiled = build(compiled=True)
    pairs = (
        (plain.train, compiled.train),
        (plain.validation, compiled.validation),
        (plain.validation.redrawn(), compiled.validation.redrawn()),
    )
    for loader, other in pairs:
        for epoch in range(2):
            for batch, again in zip(loader.epoch(epoch), other.epoch(epoch), strict=True):
                assert torch.equal(batch.params, again.params)
                torch.testing.assert_close(batch.views, again.views, rtol=0, atol=1e-5)
    assert set(shapes) == {32}  # the tail among them


def test_a_graph_needs_a_gpu(tiny, refused):
    refused(
        tiny("run.deterministic=false", "run.compile=graph"),
        "run.compile",
        "graph needs one process on cuda, here: 1 on cpu; default is allowed",
    )


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
def test_gpu_graph_is_the_compiled_step(build, variant):
    """With measurements of the terms' gradients, and validations, between the replays."""
    words = ("run.device=cuda", "run.deterministic=false", "run.log_every=4")
    if variant != "grids":  # whose weighted mean has no dropout
        words += ("model.aggregator.dropout=0.0",)
    found = []
    for mode in ("default", "graph"):
        torch.compiler.reset()  # else variants share one limit of recompilations, beyond which nothing is compiled
        training, loaders = build(*words, *VARIANTS[variant], f"run.compile={mode}", device="cuda", compiled=True)
        number, epochs = 0, []
        for epoch in range(4):
            for batch in loaders.train.epoch(epoch):
                training.step(batch, number)
                number += 1
            epochs.append(training.epoch_metrics() | validate(training, loaders.validation).metrics)
        found.append(epochs)
    assert training.graphed.graph is not None
    for compiled, graphed in zip(*found, strict=True):
        for name in ("ep_loss", "val_loss", "grad_norm", "online_linloss_train"):
            assert graphed[name] == pytest.approx(compiled[name], rel=1e-3), name


@pytest.mark.gpu
def test_gpu_run_by_graph_resumes(tiny):
    words = tiny("run.device=cuda", "run.precision=bf16", "run.deterministic=false", "run.compile=graph")
    assert main(words) == 0
    assert main([*words, "run.epochs=3", "run.resume=auto"]) == 0
