"""Weight decay where it belongs; the learning rate's closed form."""

import itertools
import math

import pytest
import torch

from seqjepa.engine.models.aggregators.config import TransformerConfig
from seqjepa.engine.models.config import ModelConfig
from seqjepa.engine.models.encoders.config import ConvNetConfig
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.models.targets.config import EMATargetConfig
from seqjepa.engine.training.config import OptimConfig
from seqjepa.engine.training.optimizers import build_optimizer, learning_rate, set_rate
from seqjepa.loaders.sequences import ActionSpace


def test_decay_spares_biases_norms_and_tokens():
    encoder, aggregator = ConvNetConfig(width=4), TransformerConfig(num_layers=1, time_embedding=True)
    model = SeqJEPA(
        ModelConfig(encoder=encoder, aggregator=aggregator, action_dim=8), EMATargetConfig(), ActionSpace(2)
    )
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.1), torch.tensor(0.1))
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups[0.1] | groups[0.0] == {n for n, p in model.named_parameters() if p.requires_grad}
    for name in groups[0.1]:
        assert name.endswith("weight")
        assert "norm" not in name
    assert {
        "aggregator.token",
        "aggregator.time",
        "aggregator.norm.weight",
        "predictor.layers.3.bias",
    } <= groups[0.0]
    assert not any(name.startswith("target.") for name in groups[0.1] | groups[0.0])


@pytest.mark.parametrize("kind", ["adamw", "adamw_ema"])
def test_one_step_is_adams_first(kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    before, optimizer = (
        layer.weight.detach().clone(),
        build_optimizer(layer, OptimConfig(kind=kind, weight_decay=0.5), torch.tensor(1.0, dtype=torch.float64)),
    )
    set_rate(optimizer, 0.01)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Adam's first step is lr in the sign of the gradient; the decay is decoupled
    torch.testing.assert_close(layer.weight, before * (1 - 0.01 * 0.5) - 0.01, rtol=1e-4, atol=1e-6)


def test_schedule():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_epochs=2)
    rates = [learning_rate(config, step, 10, 100) for step in range(100)]
    assert rates[:20] == pytest.approx([(step + 1) / 20 for step in range(20)])
    assert rates[20] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    middle = 0.1 + 0.9 * (1 + math.cos(math.pi * 40 / 79)) / 2
    assert rates[60] == pytest.approx(middle)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))
    in_steps = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=20)
    assert [learning_rate(in_steps, step, 10, 100) for step in range(100)] == rates
    with pytest.raises(ValueError, match=r"the warm-up lasts optim.warmup_epochs = 2 already"):
        OptimConfig(warmup_epochs=2, warmup_steps=20)


def test_constant_schedule_and_single_step():
    config = OptimConfig(lr=0.3, schedule="constant", warmup_epochs=0)
    assert {learning_rate(config, step, 10, 50) for step in range(50)} == {0.3}
    assert learning_rate(OptimConfig(lr=0.3), 0, 1, 1) == 0.3
