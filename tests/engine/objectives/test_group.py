"""Factors as representations of their groups: closed forms, invariances, and that wrong actions cannot pass."""

import json
import math

import pytest
import torch

from seqjepa.engine.analysis.groups import GroupReadings
from seqjepa.engine.config import compose
from seqjepa.engine.models.config import GroupSubspacesConfig
from seqjepa.engine.models.seq_jepa import Output, SeqJEPA
from seqjepa.engine.models.subspaces import GroupSubspaces, orthonormal, turned
from seqjepa.engine.objectives.objective import Objective
from seqjepa.engine.train import main
from seqjepa.loaders.config import ActionsConfig, AffineConfig, RotationConfig
from seqjepa.loaders.sequences import build_sequence

STEP = torch.tensor(0)
SPLIT = ("model.subspaces.kind=group", "objective.prediction.weight=0", "objective.equivariance.radius=2")
D, B, N = 12, 400, 4


def sequence(normalization="standard", **ranges):
    return build_sequence(AffineConfig(**ranges), (28, 28), ActionsConfig(normalization=normalization))


def drawn(sequence, count=B, seed=0):
    """Absolute parameters [count, N, 4] of views, none of them the unchanged image, and the actions between them."""
    words = torch.randint(2**32, (count, N + 1, sequence.num_draws), generator=torch.Generator().manual_seed(seed))
    params = sequence.params(words)[:, 1:]
    return params, sequence.actions(params)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(split, params, extent=1.0):
    """z whose every factor is represented as its group asks for, beside noise that is each image's own."""
    circles, lines = len(split.circles), len(split.lines)
    basis = orthonormal(split.basis.detach())
    content = noise(len(params), 1, D).expand(-1, params.shape[1], -1)
    rest = content - content @ basis @ basis.mT
    variance = extent * rest.flatten(0, 1).var(0, correction=0).sum()
    angle = torch.deg2rad(params[..., :1]) + noise(len(params), 1, 1, seed=2)  # each image has a phase of its own
    points = variance.sqrt() * torch.stack([angle.cos(), angle.sin()], -1)[:, :, :circles] + split.centre.detach()
    # positions whose differences are the moves, in standard deviations
    moves = split.moves(actions_of(params)).shifts.cumsum(1) * (2 * variance).sqrt()
    positions = torch.cat([torch.zeros(len(params), 1, lines), moves], 1)
    inside = torch.cat([points.flatten(2), positions], -1)
    return inside @ basis.mT + rest


def actions_of(params):
    return sequence().actions(params)


def split_of(sequence, seed=3):
    torch.manual_seed(seed)
    split = GroupSubspaces(GroupSubspacesConfig(), D, sequence.action_space)
    with torch.no_grad():
        split.centre.normal_()
    return split


def losses(coordinates, *words):
    terms = ("objective.equivariance.weight=1", "objective.rest.weight=1")
    config = compose(["tests/small.yaml", *SPLIT, *terms, *words]).config
    empty = torch.zeros(1)
    objective = Objective(config.objective, config.model.prediction_width)
    return objective(Output(*[empty] * 6, coordinates=coordinates), STEP)[1]


@pytest.mark.parametrize("normalization", ["standard", "none"])
def test_moves_are_read_from_actions(normalization):
    moved = sequence(normalization)
    params, actions = drawn(moved)
    found = split_of(moved).moves(actions)
    angle = torch.deg2rad(params[..., 0].diff(dim=1))
    torch.testing.assert_close(found.turns[..., 0, :], torch.stack([angle.sin(), angle.cos()], -1), atol=1e-6, rtol=0)
    shifts = params[..., 1:].diff(dim=1)
    expected = shifts / shifts.flatten(0, 1).std(0)
    ratio = found.shifts.flatten(0, 1) / expected.flatten(0, 1)
    spread = ratio[expected.flatten(0, 1).abs() > 0.5]
    # another sample of the moves has the same deviation, nearly
    assert spread.min() > 0.9
    assert spread.max() < 1.1


def test_factors_that_do_not_vary_have_no_group():
    assert list(AffineConfig().groups) == ["rotation", "translation_x", "translation_y", "scale"]
    still = AffineConfig(translation=[0, 0], scale=[1.0, 1.0])
    assert still.groups == {"rotation": "circle"}
    assert AffineConfig(rotation=[0.0, 0.0], translation=[0, 0]).groups == {"scale": "line"}
    assert RotationConfig().groups == {"rotation": "circle"}
    assert RotationConfig(angles=[0, 360]).groups == {}


def test_the_basis_is_orthonormal_and_moves_without_jumps():
    near = noise(D, 1) + 1e-3 * noise(D, 5, seed=2)  # nearly parallel columns
    basis = orthonormal(near)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis @ (basis.mT @ near), near, atol=1e-5, rtol=0)
    # where LAPACK's would change its sign: the first entry passes through zero
    before, after = noise(D, 2), noise(D, 2)
    before[0, 0], after[0, 0] = 1e-4, -1e-4
    assert (orthonormal(before) - orthonormal(after)).abs().max() < 1e-3
    assert (torch.linalg.qr(before)[0] - torch.linalg.qr(after)[0]).abs().max() > 0.1


@pytest.mark.parametrize("extent", [1.0, 0.3])
def test_a_planted_representation_costs_nothing_and_is_left_alone(extent):
    moved = sequence()
    params, actions = drawn(moved)
    split = split_of(moved)
    z = planted(split, params, extent).requires_grad_()
    coordinates = split(z, actions)
    found = losses(coordinates, f"objective.equivariance.extent={extent}")
    assert found["loss_equivariance"].item() == pytest.approx(0, abs=1e-5)
    assert found["loss_rest"].item() == pytest.approx(0, abs=1e-6)
    parameters = [z, *split.parameters()]
    gradients = torch.autograd.grad(sum(found.values()), parameters)
    assert max(gradient.abs().max().item() for gradient in gradients) < 1e-4
    # in batches of any size, the first view being the unchanged image or not, moves are read exactly
    readings, others = GroupReadings(split, extent), GroupReadings(split, 2 * extent)
    for rows in torch.arange(B).split(150):
        readings.update(split(z[rows].detach(), actions[rows]), actions[rows])
        others.update(split(z[rows].detach(), actions[rows].roll(1, 0)), actions[rows].roll(1, 0))
    assert list(readings.r2()) == ["rotation", "translation_x", "translation_y", "scale"]
    assert list(readings.r2().values()) == pytest.approx([1] * 4, abs=1e-4)
    assert max(others.r2().values()) < 0  # the moves of other images
    first = sequence().params(torch.randint(2**32, (B, 3, 4), generator=torch.Generator().manual_seed(9)))
    assert first[:, 0].abs().max() == 0
    readings = GroupReadings(split, extent)
    planted_first = split(planted(split, first, extent), moved.actions(first))
    readings.update(planted_first, moved.actions(first))
    assert list(readings.r2().values()) == pytest.approx([1] * 4, abs=1e-4)
    constant = GroupReadings(split, extent)
    constant.update(planted_first._replace(lines=0 * planted_first.lines), moved.actions(first))
    assert constant.r2()["scale"] <= 0


def test_losses_do_not_depend_on_the_axes_of_z():
    moved = sequence()
    _, actions = drawn(moved)
    split = split_of(moved)
    z = noise(B, N, D, seed=5)
    before = losses(split(z, actions))
    turn = torch.linalg.qr(noise(D, D, seed=6))[0]
    with torch.no_grad():
        split.basis.copy_(turn @ split.basis)
    after = losses(split(z @ turn.mT, actions))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-5)


def test_rotations_compose():
    """ρ(0) = I, ρ(g) ρ(h) = ρ(g h), as read from points that are turned twice."""
    angles = torch.tensor([0.3, 2.0, 0.0])
    points = torch.stack([angles.cumsum(0).cos(), angles.cumsum(0).sin()], -1)[None, :, None]
    sine, cosine = turned(points)[0, :, 0].unbind(-1)
    torch.testing.assert_close(torch.atan2(sine, cosine), angles[1:])
    both = turned(points[:, ::2])[0, 0, 0]
    torch.testing.assert_close(torch.atan2(both[0], both[1]), angles[1:].sum())


def test_what_a_constant_costs():
    """1 - E cos of the turn for the angle, 1 for each line, (0 - 1)² for the radius of a point in the centre."""
    moved = sequence(rotation=[-180.0, 180.0])
    params, actions = drawn(moved, 4000)
    split = split_of(moved)
    still = split(planted(split, params)[:, :1].expand(-1, N, -1), actions)
    cosine = torch.deg2rad(params[..., 0].diff(dim=1)).cos().mean().item()
    shifts = split.moves(actions).shifts.square().mean((0, 1)).sum().item()
    words = ("objective.equivariance.radius=0",)
    assert losses(still, *words)["loss_equivariance"].item() == pytest.approx(1 - cosine + shifts, abs=1e-4)
    assert abs(cosine) < 0.03
    centred = still._replace(circles=torch.zeros_like(still.circles) + 1e-9)
    difference = losses(centred)["loss_equivariance"] - losses(centred, *words)["loss_equivariance"]
    assert difference.item() == pytest.approx(2)  # the weight of the radius


def test_the_share_of_the_rest_within_images():
    moved = sequence()
    _, actions = drawn(moved)
    split = split_of(moved)
    coordinates = split(noise(B, N, D), actions)
    assert losses(coordinates)["loss_rest"].item() == pytest.approx(1, abs=0.03)  # independent views
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None]
    flipping = coordinates._replace(rest=noise(B, 1, D) * signs)
    assert losses(flipping)["loss_rest"].item() == pytest.approx(2, abs=1e-5)  # |2c|² / (2 |c|²)


def test_regularisers_of_the_rest_see_the_rest():
    moved = sequence()
    _, actions = drawn(moved)
    coordinates = split_of(moved)(3 * noise(B, N, D), actions)
    rest = coordinates.rest
    words = ("objective.covariance.weight=1", "objective.covariance.features=rest")
    covariance = torch.stack([torch.cov(rest[:, view].T) for view in range(N)])
    expected = (covariance.square().sum() - covariance.diagonal(dim1=1, dim2=2).square().sum()) / (N * D)
    assert losses(coordinates, *words)["loss_covariance"].item() == pytest.approx(expected.item(), rel=1e-4)
    words = ("objective.variance.weight=1", "objective.variance.features=rest")
    small = coordinates._replace(rest=rest / rest.std(0) / 4)
    assert losses(small, *words)["loss_variance"].item() == pytest.approx(0.75, abs=1e-3)


def test_the_neck_belongs_to_the_encoder_and_its_teacher():
    words = ("model.neck.kind=linear", "model.neck.dim=24", "target.kind=ema")
    config = compose(["tests/small.yaml", *words]).config
    torch.manual_seed(0)
    model = SeqJEPA(config.model, config.target, sequence().action_space)
    views, actions = torch.rand(16, 4, 3, 16, 16), torch.randn(16, 3, 5)
    output = model.train()(views, actions)
    assert output.z.shape == (16, 3, 24)
    assert output.prediction.shape == output.target.shape == (16, 24)
    rows = output.z.flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(24), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.var(0, correction=0), torch.ones(24), atol=1e-2, rtol=0)
    assert len(model.target.pairs(model.encoder)) == len(list(model.encoder.parameters()))
    assert any(p.shape == (24, 64) for p, _ in model.target.pairs(model.encoder))


GROUP = ("model.subspaces.kind=group", "objective.equivariance.weight=1")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["objective.rest.weight=1"], ["objective.rest.weight = 1", "set model.subspaces.kind=group"]),
        (["model.subspaces.kind=group"], ["model.subspaces.kind = 'group'", "set objective.equivariance.weight"]),
        (
            ["model.subspaces.kind=group", "objective.rest.weight=1"],
            ["model.subspaces.kind = 'group'", "set objective.equivariance.weight"],
        ),
        (
            [*GROUP, "actions.normalization=view_l2"],
            ["actions.normalization = 'view_l2'", "standard or none is allowed"],
        ),
        ([*GROUP, "sequence.num_observed=1"], ["sequence.num_observed = 1", "set it to at least 2"]),
        (
            [*GROUP, "model.neck.kind=linear", "model.neck.dim=4"],
            ["model.neck.dim = 4", "it has 4 numbers, and the factors take 5", "at least 6"],
        ),
        ([*GROUP, "sequence.kind=augment"], ["model.subspaces.kind = 'group'", "sequence.kind=augment has none"]),
        (
            ["sequence.rotation=[0.0,0.0]", "sequence.translation=[0,0]", "sequence.scale=[1.0,1.0]", *GROUP],
            ["model.subspaces.kind = 'group'", "sequence.kind=affine has none"],
        ),
    ],
)
def test_what_cannot_work_is_refused(words, parts, tiny, refused):
    refused(tiny(*words), *parts)


@pytest.mark.slow
def test_wrong_actions_do_not_pass(tmp_path):
    """Variance in a plane, and even a circle, can be had with wrong actions; the turn cannot be read from it."""
    found = {}
    for name, words in (("told", ()), ("shuffled", ("ablation.shuffle_actions=true",))):
        run = (
            f"run.dir={tmp_path / name}",
            "run.epochs=12",
            "run.threads=1",
            "control.enabled=false",
            "gates.rules.digits_turns=[]",
        )
        short = ("eval.every=12", "diagnostics.every=0", "optim.warmup_epochs=1", "gates.enforce=false")
        assert main(["configs/circle.yaml", *run, *short, *words]) == 0
        found[name] = json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[-1])
    assert found["told"]["group_r2_rotation_test"] > 0.5
    assert found["shuffled"]["group_r2_rotation_test"] < -0.5
    assert math.isfinite(found["shuffled"]["val_loss"])
