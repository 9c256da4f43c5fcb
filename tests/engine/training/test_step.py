"""The step: no host sync, and numbers that the formula gives."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from variants import OBJECTIVES

from seqjepa.engine.config import compose
from seqjepa.engine.models.aggregators.base import Aggregator
from seqjepa.engine.objectives.objective import Objective
from seqjepa.engine.training.validation import validate
from seqjepa.loaders.loader import build_loaders


class CountReads(TorchDispatchMode):
    """Counts the operations that bring a value to the host."""

    reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back(build):
    training, loaders = build("optim.clip_norm=1.0", "optim.accumulate=2")
    batches = list(loaders.train.epoch(0))
    training.step(batches[0], 0)  # optimisers make their state in the first step
    with CountReads() as counter:
        training.step(batches[1], 1)
        # the same instrument does see a read
        assert counter.reads == 0
        batches[0].labels.sum().item()
    assert counter.reads == 1


def test_drawing_reads_nothing_back(build):
    _, loaders = build("sequence.kind=rotation", "gates.rules.digits_affine=[]")
    with CountReads() as counter:
        next(loaders.train.epoch(0))
    assert counter.reads == 0


def test_a_step_is_adamw_and_then_the_teacher(build):
    """Adam's first step moves each weight by the learning rate; then the teacher follows the new weights."""
    training, loaders = build("optim.lr=0.01", "optim.warmup_epochs=0", "optim.weight_decay=0.0", "target.decay=0.9")
    batch = next(loaders.train.epoch(0))
    encoder, teacher = training.model.encoder, training.model.target.teacher
    before = encoder[0].weight.detach().clone()
    training.step(batch, 0)
    moved = encoder[0].weight - before
    torch.testing.assert_close(moved.abs(), torch.full_like(moved, 0.01), rtol=0.05, atol=0)
    torch.testing.assert_close(teacher[0].weight, 0.9 * before + 0.1 * encoder[0].weight)


def test_probes_do_not_touch_the_model(build):
    """The model's gradient and weights are the same whatever the probes learn."""
    weights = []
    for lr in (1e-3, 1.0):
        training, loaders = build(f"probes.lr={lr}", "model.aggregator.dropout=0.0")
        for step, batch in enumerate(loaders.train.epoch(0)):
            training.step(batch, step)
        weights.append([p.detach().clone() for p in training.model.parameters()])
        probe = training.probes.heads["online_linacc"].weight.detach().clone()
        weights[-1].append(probe)
    assert all(torch.equal(a, b) for a, b in zip(weights[0][:-1], weights[1][:-1], strict=True))
    assert not torch.equal(weights[0][-1], weights[1][-1])


def test_shuffled_actions_reach_the_model_but_not_the_probes(build):
    training, loaders = build("ablation.shuffle_actions=true")
    batch = next(loaders.train.epoch(0))
    given = training.step_inputs(batch)
    assert torch.equal(given.actions, torch.roll(batch.actions, 1, 0))
    assert torch.equal(given.views, batch.views)
    seen = {}
    original = training.probes.losses

    def losses(outputs, labels, actions):
        seen.setdefault("actions", actions)  # the first are those of the forward pass
        return original(outputs, labels, actions)

    training.probes.losses = losses
    training.step(batch, 0)
    assert torch.equal(seen["actions"], batch.actions)


VARIANTS = {
    "ema": (),
    **OBJECTIVES,
    "contrastive": (
        *("target.kind=ema", "objective.prediction.kind=infonce", "objective.prediction.queue=70"),
        *("objective.prediction.scale_limits=[0.05, 0.2]", "model.projector.kind=mlp", "model.projector.dim=8"),
        *("objective.sigreg.weight=0.1", "objective.sigreg.num_slices=8", "optim.accumulate=2"),
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_term_gradient_norms_are_measured_without_side_effects(build, variant):
    """The step is the same whether the terms' gradients are looked at or not."""
    states = []
    for log_every in (1, 1000):
        training, loaders = build(f"run.log_every={log_every}", *VARIANTS[variant])
        for step, batch in zip(range(3), loaders.train.epoch(0), strict=False):
            training.step(batch, step)
        states.append(training.model.state_dict())
        assert set(training.term_grad_norms) == (
            {name.replace("loss_", "z_grad_norm_") for name in training.objective.names} if log_every == 1 else set()
        )
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_term_gradient_norms_are_the_slopes_of_the_terms(build):
    """Against finite differences along the gradient of the total."""
    training, loaders = build("run.log_every=1", "model.aggregator.dropout=0.0", "objective.rate.weight=0.1")
    batch = next(loaders.train.epoch(0))
    given = training.step_inputs(batch)
    model = training.model.double().train()
    given = given._replace(views=given.views.double(), actions=given.actions.double())
    output = model(given.views, given.actions)
    term_grad_norms = training._term_grad_norms(output, given)
    for name in ("prediction", "rate"):

        def value(z, name=name):
            read = model.predict(z, output.target_z, given.actions)
            return training.objective.terms[name](read, training.device_step).double()

        z = output.encoded.detach().requires_grad_()
        (direction,) = torch.autograd.grad(value(z), z)
        direction = direction / direction.norm()
        with torch.no_grad():
            slope = (value(z + 1e-2 * direction) - value(z - 1e-2 * direction)).item() / 2e-2
        assert term_grad_norms[f"z_grad_norm_{name}"].item() == pytest.approx(
            training.objective.terms[name].weight * slope, rel=0.02
        )


def test_symmetric_training_is_told_the_way_back(build):
    training, loaders = build("objective.reading.kind=both", "ablation.shuffle_actions=true")
    batch = next(loaders.train.epoch(0))
    given = training.step_inputs(batch)
    inverse = loaders.sequence.inverse_actions(batch.params)
    assert torch.equal(given.inverse_actions, inverse.roll(1, 0))
    two = given.split(2)
    assert torch.equal(torch.cat([part.inverse_actions for part in two]), given.inverse_actions)


def test_a_gain_is_told_from_a_rank(build):
    """Doubling the LayerNorm's gain raises the rate and `agg_gain`; the other figures hardly move."""
    training, loaders = build()
    before = validate(training, loaders.validation).metrics
    with torch.no_grad():
        training.model.aggregator.norm.weight.mul_(2)
        training.model.aggregator.norm.bias.mul_(2)
    after = validate(training, loaders.validation).metrics
    assert after["agg_gain"] == pytest.approx(2 * before["agg_gain"])
    growth = after["rate_agg"] / before["rate_agg"]
    assert growth > 1.3
    assert after["rate_fraction_agg"] / before["rate_fraction_agg"] < 1 + (growth - 1) / 2
    for name in ("participation_agg", "effective_rank_agg", "rank_inv_eff", "pair_cosine_agg", "rank_eq_eff"):
        assert after[name] == pytest.approx(before[name], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["rotation", "affine"])
def test_gpu_step_never_waits_and_draws_as_the_cpu(build, tiny, kind, variant):
    words = (f"sequence.kind={kind}", "gates.rules.digits_affine=[]", "run.deterministic=false", *VARIANTS[variant])
    training, loaders = build(*words, "run.device=cuda", device="cuda")
    config = compose(tiny(*words)).config
    on_cpu = build_loaders(config.data, config.sequence, config.actions, seed=0, device=torch.device("cpu"))
    batches = loaders.train.epoch(0)
    for step, expected in enumerate(on_cpu.train.epoch(0)):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set up
        batch = next(batches)
        training.step(batch, step)
        torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(batch.params.cpu(), expected.params)
        torch.testing.assert_close(batch.views.cpu(), expected.views, rtol=0, atol=1e-3)
    assert training.diverged() is None


@pytest.mark.gpu
def test_gpu_run_in_bf16_compiled(tiny, tmp_path):
    from seqjepa.engine.train import main

    words = tiny("run.device=cuda", "run.precision=bf16", "run.deterministic=false", "run.compile=default")
    words += ["diagnostics.every=1"]
    assert main(words) == 0
    assert main([*words, "run.epochs=3", "run.resume=auto"]) == 0


class MeanOfViews(Aggregator):
    """An aggregator without weights, norms or tokens of its own."""

    def forward(self, tokens):
        return tokens.mean(1)


def test_any_aggregator_can_be_validated(build):
    """Nothing but calling it is asked of it: figures of its weights are its own to give."""
    training, loaders = build()
    assert "agg_gain" in validate(training, loaders.validation).metrics
    training.model.aggregator = MeanOfViews()
    metrics = validate(training, loaders.validation).metrics
    assert "agg_gain" not in metrics
    assert math.isfinite(metrics["val_loss"])


class Masked(NamedTuple):
    """Views of two tensors: images and what of them counts."""

    images: torch.Tensor  # [B, V, C, H, W]
    mask: torch.Tensor  # [B, V, 1]


class MaskedEncoder(nn.Module):
    """Features of the images, times their mask."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, views):
        return self.encoder(views.images) * views.mask


@pytest.mark.parametrize("target", ["ema", "stop_gradient"])
def test_views_may_be_several_tensors(build, target):
    """With a mask of ones a step and a validation are those of the images alone; with one of zeros no feature is left.

    The validation's last batch is smaller than the others.
    """
    words = (f"target.kind={target}", "optim.accumulate=2", "model.aggregator.dropout=0.0", "optim.kind=adamw")
    (plain, loaders), (masked, _) = build(*words), build(*words)
    masked.model.encoder = MaskedEncoder(masked.model.encoder)
    if target == "ema":
        masked.model.target.teacher = MaskedEncoder(masked.model.target.teacher)
    batch = next(loaders.train.epoch(0))

    def with_mask(batch, value):
        return batch._replace(views=Masked(batch.views, torch.full((*batch.views.shape[:2], 1), value)))

    assert torch.equal(masked.step(with_mask(batch, 1.0), 0), plain.step(batch, 0))
    for ours, theirs in zip(masked.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)

    expected = validate(plain, loaders.validation).metrics
    original = loaders.validation.epoch
    loaders.validation.epoch = lambda number: (with_mask(batch, 1.0) for batch in original(number))
    assert validate(masked, loaders.validation).metrics == pytest.approx(expected, nan_ok=True)
    loaders.validation.epoch = lambda number: (with_mask(batch, 0.0) for batch in original(number))
    assert validate(masked, loaders.validation).metrics["variance_z"] == 0 < expected["variance_z"]


class TwiceThePull(Objective):
    """An objective with a backward pass of its own."""

    def backward(self, total, terms, send):
        send(total + terms["loss_prediction"])


def test_the_objective_does_the_backward_pass(build):
    """A second pull of the prediction doubles its gradient in the predictor, and leaves the probes' as they are."""
    norms = []
    for kind in (Objective, TwiceThePull):
        training, loaders = build(
            "optim.clip_norm=null", "model.aggregator.dropout=0.0", "optim.lr=0", "optim.min_lr=0"
        )
        training.objective.__class__ = kind
        kept = {}
        for name, layer in (("predictor", training.model.predictor), ("probe", training.probes.heads["online_linacc"])):
            (weight, *_) = layer.parameters()
            weight.register_hook(lambda gradient, name=name, kept=kept: kept.update({name: gradient.clone()}))
        training.step(next(loaders.train.epoch(0)), 0)
        norms.append(kept)
    one, two = norms
    torch.testing.assert_close(two["predictor"], 2 * one["predictor"])
    torch.testing.assert_close(two["probe"], one["probe"])
