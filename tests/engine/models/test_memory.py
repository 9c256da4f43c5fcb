"""The memory of the last task's encoder: what it keeps, and what distillation from it charges."""

import torch
from torch.nn.functional import cosine_similarity

from seqjepa.engine.config import compose
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.objectives.objective import Objective
from seqjepa.loaders.sequences import ActionSpace

WORDS = ("model.memory.kind=encoder", "objective.distillation.weight=0.5", "stream.kind=classes")
WORDS += ("optim.schedule=constant", "eval.every=1")
STEP = torch.tensor(0)


def built(tiny, *more):
    config = compose(tiny(*WORDS, *more)).config
    torch.manual_seed(0)
    return (
        SeqJEPA(config.model, config.target, ActionSpace(5)),
        Objective(config.objective, config.model.prediction_width),
        config,
    )


def drawn(config):
    count = config.sequence.num_observed + 1
    return torch.randn(6, count, 3, 24, 24), torch.randn(6, count - 1, 5)


def test_nothing_is_charged_before_a_task_has_ended(tiny):
    model, objective, config = built(tiny)
    output = model(*drawn(config)).float()
    _, terms = objective(output, STEP)
    assert terms["loss_distillation"] == 0


def test_the_past_is_kept_while_the_encoder_goes_on(tiny):
    model, objective, config = built(tiny)
    views, actions = drawn(config)
    model.train()(views, actions)  # batch-norm statistics move
    model.memory.take(model.encoder)
    past = model.eval()(views, actions).z.detach()
    # the map is the identity
    assert objective(model(views, actions).float(), STEP)[1]["loss_distillation"].abs() < 1e-6
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.train()
    assert not model.memory.encoder.training
    output = model(views, actions).float()
    torch.testing.assert_close(output.recalled.past[:, : past.shape[1]], past)
    expected = 1 - cosine_similarity(output.encoded, output.recalled.past, dim=-1).mean()
    term = objective(output, STEP)[1]["loss_distillation"]
    torch.testing.assert_close(term, expected)
    assert term > 1e-3
    # gradients reach the encoder and the map, not the copy
    term.backward()
    assert model.memory.map.weight.grad.abs().sum() > 0
    assert next(model.encoder.parameters()).grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.memory.encoder.parameters())
    # a second task starts without a charge, too
    with torch.no_grad():
        model.memory.map.weight.add_(0.1)
    model.memory.take(model.encoder)
    assert objective(model.eval()(views, actions).float(), STEP)[1]["loss_distillation"].abs() < 1e-6


def test_a_memory_needs_a_stream_and_a_term(tiny, refused):
    refused(tiny("model.memory.kind=encoder"), "model.memory.kind", "nothing would read it")
    refused(tiny("objective.distillation.weight=1"), "objective.distillation.weight", "model.memory.kind=encoder")
    refused(tiny(*WORDS[:2]), "model.memory.kind", "set stream.kind")
