"""The network: the paper's sizes, and what may and may not depend on what."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from seqjepa.configs.errors import InputError
from seqjepa.configs.section import by_kind
from seqjepa.engine.config import compose
from seqjepa.engine.evaluation.probes import OnlineProbes
from seqjepa.engine.models.aggregators.config import MeanConfig, TransformerConfig, WeightedConfig
from seqjepa.engine.models.config import MLPInverseConfig, MLPProjectorConfig, ModelConfig, Span
from seqjepa.engine.models.encoders.config import ConvNetConfig
from seqjepa.engine.models.predictors.config import MLPPredictorConfig
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.models.targets.config import (
    AnyTarget,
    EMATargetConfig,
    SoftmaxSharpeningConfig,
    StopGradientTargetConfig,
)
from seqjepa.engine.objectives.config import (
    BothReadingConfig,
    CosineConfig,
    ForwardReadingConfig,
    PrefixesReadingConfig,
    WindowsReadingConfig,
)
from seqjepa.engine.objectives.prediction import Cosine
from seqjepa.loaders.sequences import ActionSpace

cosine_distance = Cosine(CosineConfig(), 16).distance
SMALL = ModelConfig(
    encoder=ConvNetConfig(width=4),
    aggregator=TransformerConfig(num_layers=2),
    predictor=MLPPredictorConfig(hidden=16),
    action_dim=8,
)


def small(model=SMALL, kind="ema", **target):
    torch.manual_seed(0)
    return SeqJEPA(model, by_kind(AnyTarget)[kind](**target), ActionSpace(2))


def changed(**settings):
    return SMALL.model_copy(update=settings)


MNIST = {"action_dim": 64, "aggregator": TransformerConfig(num_layers=2), "predictor": MLPPredictorConfig(hidden=512)}


def inputs(batch=6, views=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, views, 3, 16, 16, generator=generator), torch.randn(
        batch, views - 1, 2, generator=generator
    )


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("action_dim", "settings", "trainable", "with_teacher"),
    [  # CIFAR-10 rotations, CIFAR-100 augmentations, MNIST affine
        (2, {}, 27_254_848, 38_423_680),
        (9, {}, 27_255_744, 38_424_576),
        (5, MNIST, 19_739_840, 30_908_672),
    ],
)
def test_parameter_counts_are_those_of_the_reference_code(action_dim, settings, trainable, with_teacher):
    model = SeqJEPA(ModelConfig(**settings), EMATargetConfig(), ActionSpace(action_dim))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    assert count(model) == with_teacher
    assert count(model.encoder) == 11_168_832
    without = SeqJEPA(ModelConfig(**settings), StopGradientTargetConfig(), ActionSpace(action_dim))
    assert count(without) == trainable


def test_probe_parameter_counts_are_those_of_the_reference_code():
    from seqjepa.engine.evaluation.config import ProbesConfig

    probes = OnlineProbes(ProbesConfig(), 512, 640, 10, {"rotation": slice(0, 2)})
    sizes = {name: count(head) for name, head in probes.heads.items()}
    expected = {"online_linacc": 6_410, "online_r2": 2_101_250, "leakage_linacc": 5_130, "leakage_r2": 1_282}
    assert {name: sizes[name] for name in expected} == expected


def test_shapes():
    views, actions = inputs()
    output = small()(views, actions)
    assert [tuple(part.shape) for part in output[:6]] == [
        *((6, 3, 16), (6, 24), (6, 16), (6, 16)),
        *((6, 3, 16), (6, 1, 16)),
    ]
    assert (output.projections, output.others, output.inferred_actions) == (None, (), None)


def test_aggregate_sees_neither_the_target_nor_the_last_action():
    model = small().eval()
    views, actions = inputs()
    before = model(views, actions)
    changed_views, changed_actions = views.clone(), actions.clone()
    changed_views[:, -1] += 1
    after = model(changed_views, actions)
    assert torch.equal(before.agg, after.agg)
    assert torch.equal(before.prediction, after.prediction)
    assert not torch.allclose(before.target, after.target)
    changed_actions[:, -1] += 1
    after = model(views, changed_actions)
    assert torch.equal(before.agg, after.agg)
    assert not torch.allclose(before.prediction, after.prediction)
    changed_actions = actions.clone()
    changed_actions[:, 0] += 1
    assert not torch.allclose(before.agg, model(views, changed_actions).agg)


def test_order_shows_only_through_actions_and_time():
    views, actions = inputs()
    swapped = views[:, [1, 0, 2, 3]]
    moved = actions[:, [1, 0, 2]]  # each view keeps its action
    model = small().eval()
    torch.testing.assert_close(model(views, actions).agg, model(swapped, moved).agg, rtol=1e-4, atol=1e-5)
    timed = small(changed(aggregator=TransformerConfig(num_layers=2, time_embedding=True))).eval()
    assert not torch.allclose(timed(views, actions).agg, timed(swapped, moved).agg, atol=1e-3)


def test_gradient_reaches_all_but_the_teacher():
    views, actions = inputs()
    for kind in ("ema", "stop_gradient"):
        model = small(kind=kind)
        output = model(views, actions)
        assert not output.target.requires_grad
        cosine_distance(output.prediction, output.target).backward()
        for name, parameter in model.named_parameters():
            if name.startswith("target."):
                assert parameter.grad is None
            else:
                assert parameter.grad.abs().sum() > 0, name


def test_actions_are_normalised_once_over_real_rows():
    model = small()
    views, actions = inputs(batch=50)
    linear, norm = model.action_embedding.linear, model.action_embedding.norm
    model(views, actions)
    rows = linear(actions.flatten(0, 1))
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(0), rtol=1e-4, atol=1e-6)


def test_layers_start_apart():
    layers = small().aggregator.layers
    assert not torch.equal(layers[0].linear1.weight, layers[1].linear1.weight)


def batch_norm(module):
    return next(m for m in module.modules() if isinstance(m, nn.BatchNorm2d))


def test_stop_gradient_shares_batch_statistics():
    model = small(kind="stop_gradient")
    views, actions = inputs()
    views[:, -1] *= 5  # a target from another distribution, as under the reference code's augmentations
    encoder = copy.deepcopy(model.encoder)
    output = model(views, actions)
    together = encoder(views)
    torch.testing.assert_close(output.z, together[:, :-1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.target, together[:, -1], rtol=1e-4, atol=1e-5)
    assert batch_norm(model.encoder).num_batches_tracked == 1


def test_own_statistics_are_a_batch_of_their_own():
    model = small(kind="stop_gradient", batch_statistics="own")
    views, actions = inputs()
    views[:, -1] *= 5
    encoder = copy.deepcopy(model.encoder)
    output = model(views, actions)
    torch.testing.assert_close(output.z, encoder(views[:, :-1]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(output.target, encoder(views[:, -1:])[:, 0], rtol=1e-4, atol=1e-5)
    assert batch_norm(model.encoder).num_batches_tracked == 2


def test_shared_targets_have_a_gradient_and_the_same_values():
    views, actions = inputs()
    shared, stopped = (small(kind=kind)(views, actions) for kind in ("shared", "stop_gradient"))
    assert torch.equal(shared.target, stopped.target)
    assert shared.target.requires_grad
    assert not stopped.target.requires_grad
    (gradient,) = torch.autograd.grad(shared.target.sum(), shared.encoded)
    assert gradient[:, :-1].abs().sum() == 0
    assert torch.equal(gradient[:, -1], torch.ones_like(gradient[:, -1]))


@pytest.mark.parametrize("kind", ["ema", "stop_gradient"])
def test_sharpened_targets_are_centred_softmaxes(kind):
    plain, sharp = small(kind=kind), small(kind=kind, sharpening=SoftmaxSharpeningConfig(temperature=0.5))
    views, actions = inputs()
    raw = plain(views, actions).target
    center = 0.1 * raw.mean(0)  # from zero, and before it is used
    torch.testing.assert_close(sharp(views, actions).target, ((raw - center) / 0.5).softmax(-1))
    torch.testing.assert_close(sharp.sharpening.center, center)
    sharp.eval()(views, actions)
    torch.testing.assert_close(sharp.sharpening.center, center)  # it moves in training alone


@pytest.mark.parametrize("kind", ["ema", "stop_gradient", "shared"])
def test_the_backward_reading_is_that_of_the_sequence_turned_round(kind):
    model = small(kind=kind).eval()
    views, actions = inputs()
    inverse = torch.randn(6, 3, 2, generator=torch.Generator().manual_seed(2))
    both = model(views, actions, inverse, (Span(0, 3), Span(3, 0)))
    turned = model(views.flip(1), inverse.flip(1))
    for ours, expected in zip(both.others[0], (turned.agg, turned.prediction, turned.target), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    for ours, expected in zip(both[:4], model(views, actions)[:4], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_forward_and_inverse_actions_are_normalised_together():
    model = small()
    views, actions = inputs(batch=20)
    linear, norm = model.action_embedding.linear, model.action_embedding.norm
    model(views, actions, 2 * actions)
    rows = linear(torch.cat([actions, 2 * actions]).flatten(0, 1))
    assert norm.num_batches_tracked == 1
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["ema", "stop_gradient", "shared"])
@pytest.mark.parametrize(
    "reading", [PrefixesReadingConfig(), WindowsReadingConfig(length=1), WindowsReadingConfig(length=2)]
)
def test_a_reading_is_that_of_its_views_alone(kind, reading):
    """Each reading is what the model makes of the part of the sequence that it spans, whatever the other views are."""
    model = small(kind=kind).eval()
    views, actions = inputs()
    spans = tuple(reading.spans(3))
    output = model(views, actions, spans=spans)
    assert len(output.readings) == len(spans) == len(set(spans))
    assert {span.target for span in spans} == set(range(getattr(reading, "length", 1), 4))
    assert output.z.shape == (6, 3, 16)
    for span, ours in zip(spans, output.readings, strict=True):
        part = model(views[:, span.first : span.target + 1], actions[:, span.first : span.target])
        for found, expected in zip(ours, (part.agg, part.prediction, part.target), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_first_reading_ends_with_the_last_view():
    assert ForwardReadingConfig().spans(3) == [Span(0, 3)]
    assert BothReadingConfig().spans(3) == [Span(0, 3), Span(3, 0)]
    assert PrefixesReadingConfig().spans(3) == [Span(0, 3), Span(0, 2), Span(0, 1)]
    assert WindowsReadingConfig(length=2).spans(3) == [Span(1, 3), Span(0, 2)]
    assert WindowsReadingConfig(length=4).spans(3) == []


def test_parts_that_no_term_reads():
    model = small(
        changed(inverse=MLPInverseConfig(hidden=8), projector=MLPProjectorConfig(dim=5, hidden=8)), kind="shared"
    )
    everything = [model.inverse, model.predictor, model.aggregator, model.action_embedding]
    views, actions = inputs()
    output = model(views, actions)
    for name in ("prediction", "agg", "z", "projections", "inferred_actions"):
        unread = model.unread(frozenset({name}))
        read = [part for part in everything if not any(part is other for other in unread)]
        model.zero_grad()
        getattr(output, name).square().sum().backward(retain_graph=True)
        reached = {part: any(p.grad is not None for p in part.parameters()) for part in everything}
        assert all(reached[part] for part in read), name
        assert not any(reached[part] for part in unread), name


def test_inferred_actions_are_of_successive_views():
    model = small(changed(inverse=MLPInverseConfig(hidden=8)), kind="stop_gradient").eval()
    views, actions = inputs()
    output = model(views, actions)
    assert torch.equal(output.actions, actions)
    for step in range(3):
        pair = torch.cat([output.encoded[:, step], output.encoded[:, step + 1]], dim=-1)
        torch.testing.assert_close(output.inferred_actions[:, step], model.inverse(pair))
    with_teacher = small(changed(inverse=MLPInverseConfig(hidden=8))).eval()(views, actions)
    assert with_teacher.inferred_actions.shape == (6, 2, 2)  # the last view is the teacher's alone
    assert torch.equal(with_teacher.actions, actions[:, :2])


def test_thirty_two_views():
    views, actions = inputs(views=32)
    for aggregator in (MeanConfig(), TransformerConfig(num_layers=1, time_embedding=True, positions=31)):
        output = small(changed(aggregator=aggregator))(views, actions)
        assert output.agg.shape == (6, 24)


def test_weighted_views_are_a_softmax_in_each_channel():
    """Against a loop; equal tokens stay, a new network takes the mean, and a shorter sequence uses the last weights."""
    aggregator = WeightedConfig(longest=5).build(6)
    tokens = torch.randn(3, 4, 6)
    torch.testing.assert_close(aggregator(tokens), tokens.mean(1))
    with torch.no_grad():
        for parameter in aggregator.parameters():
            parameter.normal_()
    assert sum(parameter.numel() for parameter in aggregator.parameters()) == 5 * 5 + 5
    found = aggregator(tokens)
    for row, channel in itertools.product(range(3), range(6)):
        values = tokens[row, :, channel]
        scores = [(aggregator.map[1 + w, 1:] * values).sum() + aggregator.bias[1 + w] for w in range(4)]
        expected = (torch.stack(scores).softmax(0) * values).sum()
        torch.testing.assert_close(found[row, channel], expected)
    torch.testing.assert_close(aggregator(tokens[:, :1].expand(-1, 4, -1)), tokens[:, 0])
    with pytest.raises(InputError, match="is less than the 3 observed views"):
        compose(["model.aggregator.kind=weighted", "model.aggregator.longest=2"])


def test_the_mean_aggregator_is_the_mean_of_the_tokens():
    model = small(changed(aggregator=MeanConfig())).eval()
    views, actions = inputs()
    output = model(views, actions)
    torch.testing.assert_close(output.agg[:, :16], output.z.mean(1))
    embedded = model.embed(actions)[:, :2].sum(1) / 3  # the last view's token carries none
    torch.testing.assert_close(output.agg[:, 16:], embedded)


@pytest.mark.parametrize("unit", [False, True])
def test_projections_are_of_all_views_and_predicted(unit):
    model = small(changed(projector=MLPProjectorConfig(dim=5, hidden=8, unit=unit)), kind="shared")
    views, actions = inputs()
    output = model(views, actions)
    assert output.projections.shape == (6, 4, 5)
    assert output.prediction.shape == (6, 5)
    assert torch.equal(output.target, output.projections[:, -1])
    lengths = output.projections.norm(dim=-1)
    assert torch.allclose(lengths, torch.ones_like(lengths)) == unit
    plain = small(kind="shared")  # all but predictor and projector starts the same
    assert torch.equal(plain(views, actions).z, output.z)


def test_actions_reach_only_the_parts_that_are_told():
    views, actions = inputs()
    other = actions + torch.randn(actions.shape, generator=torch.Generator().manual_seed(3))
    for told in ((True, True), (True, False), (False, True), (False, False)):
        aggregator, predictor = told
        model = small(changed(aggregator_action=aggregator, predictor_action=predictor)).eval()
        one, two = model(views, actions), model(views, other)
        assert torch.equal(one.agg, two.agg) == (not aggregator)
        assert torch.equal(one.prediction, two.prediction) == (not any(told))
        last = actions.clone()
        last[:, -1] += 1
        assert torch.equal(one.prediction, model(views, last).prediction) == (not predictor)
        assert (model.action_embedding is None) == (not any(told))
        assert model.token_width == (24 if aggregator else 16)


@pytest.mark.parametrize("num_observed", [1, 2, 3, 4])
def test_any_number_of_observed_views(num_observed):
    views, actions = inputs(views=num_observed + 1)
    output = small()(views, actions)
    assert output.z.shape == (6, num_observed, 16)
    cosine_distance(output.prediction, output.target).backward()


@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
def test_teacher_follows_the_encoder(buffers):
    model = small(decay=0.9, buffers=buffers)
    teacher, encoder = model.target.teacher, model.encoder
    model(*inputs())
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(1.0)
    before_weight = teacher[0].weight.clone()
    before_mean, student_mean = batch_norm(teacher).running_mean.clone(), batch_norm(encoder).running_mean
    model.target.update(torch.tensor(0.9), encoder)
    torch.testing.assert_close(teacher[0].weight, 0.9 * before_weight + 0.1 * encoder[0].weight)
    expected = {
        "ignore": before_mean,
        "copy": student_mean,
        "average": 0.9 * before_mean + 0.1 * student_mean,
    }
    torch.testing.assert_close(batch_norm(teacher).running_mean, expected[buffers])
    assert batch_norm(teacher).num_batches_tracked == 1

    weights, mean = teacher[0].weight.clone(), batch_norm(teacher).running_mean.clone()
    model.target.update(torch.tensor(0.9), encoder, weights=False)  # the optimiser moved them
    assert torch.equal(teacher[0].weight, weights)
    assert torch.equal(batch_norm(teacher).running_mean, mean) == (buffers != "average")


def test_teacher_starts_as_the_encoder():
    model = small()
    for ours, theirs in zip(model.target.teacher.parameters(), model.encoder.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.data_ptr() != theirs.data_ptr()


def test_decay_schedules():
    constant = small(decay=0.99).target
    cosine = small(decay=0.99, schedule="cosine").target
    steps = [torch.tensor(step) for step in (0, 25, 50, 100)]
    assert [constant.decay(step, 101).item() for step in steps] == [0.99] * 4
    expected = [0.99, 1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2, 0.995, 1.0]
    assert [cosine.decay(step, 101).item() for step in steps] == pytest.approx(expected, abs=1e-15)


def test_cosine_distance_has_its_closed_form():
    a = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    b = torch.tensor([[3.0, 3.0], [0.0, -1.0]])
    expected = ((1 - math.sqrt(0.5)) + 2) / 2
    assert cosine_distance(a, b).item() == pytest.approx(expected, abs=1e-6)
    assert cosine_distance(a.bfloat16(), b.bfloat16()).dtype == torch.float32
