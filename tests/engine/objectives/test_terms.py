"""Each term against its formula, and what it must and must not see."""

import math

import pytest
import torch
import torch.nn.functional as F
from lightly.loss.vicreg_loss import covariance_loss, variance_loss

from seqjepa.engine.config import compose
from seqjepa.engine.models.seq_jepa import Output, Reading
from seqjepa.engine.objectives.config import CosineConfig, CrossEntropyConfig
from seqjepa.engine.objectives.objective import Objective
from seqjepa.engine.objectives.prediction import Cosine, CrossEntropy
from seqjepa.kernels import sigreg

STEP = torch.tensor(0)
cosine_distance = Cosine(CosineConfig(), 6).distance
cross_entropy = CrossEntropy(CrossEntropyConfig(), 6).distance  # its temperature is 0.1


def objective(*words):
    return Objective(compose(["tests/small.yaml", *words]).config.objective, 6)


def output(batch=12, views=4, width=6, seed=0, both=False, **given):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    z = draw(batch, views - 1, width)
    fields = {
        "z": z,
        "agg": draw(batch, width + 2),
        "prediction": draw(batch, width),
        "target": draw(batch, width),
        "encoded": z,
        "target_z": draw(batch, 1, width),
        "projections": draw(batch, views, width),
        "others": (Reading(draw(batch, width + 2), draw(batch, width), draw(batch, width)),) if both else (),
    }
    return Output(**(fields | given))


def rate(features):
    """log det(I + CᵀC / B) of centred features, alpha = 1, as the reference code writes it."""
    centred = (features - features.mean(0)).double()
    return torch.logdet(torch.eye(features.shape[1]).double() + centred.T @ centred / len(features)).item()


def value(term, given, *words):
    return objective(*words)(given, STEP)[1][f"loss_{term}"].item()


PROJECTED = ("model.projector.kind=mlp", "model.projector.dim=6", "target.kind=shared", "objective.prediction.kind=mse")


def test_cross_entropy_has_its_closed_form():
    target = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    entropy = -(target * target.log()).sum(-1).mean()
    # the prediction whose softmax is the target is the best, and costs the target's entropy
    torch.testing.assert_close(cross_entropy(0.1 * target.log() + 3, target), entropy)
    uniform = cross_entropy(torch.zeros(2, 3), target)
    torch.testing.assert_close(uniform, torch.tensor(math.log(3)))


def test_predictions_are_compared_as_asked():
    given = output()
    assert value("prediction", given) == pytest.approx(cosine_distance(given.prediction, given.target).item())
    mse = (given.prediction - given.target).square().mean().item()
    assert value("prediction", given, "objective.prediction.kind=mse") == pytest.approx(mse)
    sharp = given._replace(target=given.target.softmax(-1))
    words = (
        "objective.prediction.kind=cross_entropy",
        "objective.prediction.temperature=0.5",
        "target.sharpening.kind=softmax",
    )
    expected = F.cross_entropy(given.prediction / 0.5, sharp.target).item()
    assert value("prediction", sharp, *words) == pytest.approx(expected, rel=1e-6)


def test_both_readings_count_the_same():
    given = output(both=True)
    one = value("prediction", given._replace(others=()))
    (backwards,) = given.others
    other = cosine_distance(backwards.prediction, backwards.target).item()
    assert value("prediction", given) == pytest.approx((one + other) / 2)
    words = ("objective.rate.weight=0.1",)
    expected = -(rate(given.agg) + rate(backwards.agg)) / 2
    assert value("rate", given, *words) == pytest.approx(expected, rel=1e-5)


def test_rate_of_what_it_is_asked_for():
    given = output()
    agg = rate(given.agg)
    z = sum(rate(given.z[:, view]) for view in range(3)) / 3  # all views (the reference code: only the first)
    for target, expected in (("agg", agg), ("z", z), ("both", agg + z)):
        assert value("rate", given, "objective.rate.weight=0.1", f"objective.rate.features={target}") == pytest.approx(
            -expected, rel=1e-5
        )


def test_rate_of_projections_is_the_mean_over_view_positions():
    given = output(batch=40)
    words = (*PROJECTED, "objective.rate.weight=0.1", "objective.rate.features=projections")
    expected = sum(rate(given.projections[:, view]) for view in range(4)) / 4
    assert value("rate", given, *words) == pytest.approx(-expected, rel=1e-5)


def test_rates_of_neighbourhoods_and_of_images():
    given = output(batch=20)
    words = ("objective.rate.weight=0.1", "objective.rate.features=z")
    nearest = (*words, "objective.rate.scope.kind=nearest")
    expected = 0.0
    for view in range(3):
        rows = given.z[:, view]
        members = torch.cdist(rows, rows).argsort(1)[:, :5]
        expected += sum(rate(rows[index]) for index in members) / (3 * 20)
    assert value("rate", given, *nearest, "objective.rate.scope.count=5") == pytest.approx(-expected, rel=1e-5)
    whole = value("rate", given, *words)
    assert value("rate", given, *nearest, "objective.rate.scope.count=20") == pytest.approx(whole, rel=1e-5)
    images = sum(rate(views) for views in given.z) / 20
    found = value("rate", given, *words, "objective.rate.scope.kind=images")
    assert found == pytest.approx(-images, rel=1e-5)


def test_emp_ssls_rate():
    """log det(I + d / (B eps) CᵀC) of unit rows, as EMP-SSL writes it; ours centres them first, these are centred."""
    given = output(batch=2, views=2)
    pair = torch.eye(6)[:2] * torch.tensor([[1.0], [1.0]])
    given = given._replace(projections=torch.stack([torch.cat([pair, -pair])] * 2, 1))
    words = (*PROJECTED, "objective.rate.weight=0.5", "objective.rate.features=projections")
    words += ("objective.rate.normalize=unit", "objective.rate.scale.kind=eps", "objective.rate.scale.eps=0.2")
    rows = given.projections[:, 0].double()
    expected = torch.logdet(torch.eye(6).double() + 6 / (4 * 0.2) * rows.T @ rows).item()
    assert value("rate", given, *words) == pytest.approx(-expected, rel=1e-5)


def test_invariance_is_the_distance_to_the_mean_of_the_views():
    given = output(views=5)
    mean = sum(given.projections[:, view] for view in range(5)) / 5
    cosines = [F.cosine_similarity(given.projections[:, view], mean, dim=-1).mean().item() for view in range(5)]
    words = (*PROJECTED, "objective.invariance.weight=1.0")
    assert value("invariance", given, *words) == pytest.approx(1 - sum(cosines) / 5, rel=1e-5)
    squares = [(given.projections[:, view] - mean).square().mean().item() for view in range(5)]
    words += ("objective.invariance.distance=mse",)
    assert value("invariance", given, *words) == pytest.approx(sum(squares) / 5, rel=1e-5)
    alike = given._replace(projections=given.projections[:, :1].expand(-1, 5, -1))
    assert value("invariance", alike, *words) == pytest.approx(0, abs=1e-7)


def test_the_squared_invariance_of_two_views_is_a_quarter_of_vicregs():
    given = output(views=2)
    vicreg = F.mse_loss(given.projections[:, 0], given.projections[:, 1]).item()
    words = (*PROJECTED, "objective.invariance.weight=1.0", "objective.invariance.distance=mse")
    assert value("invariance", given, *words) == pytest.approx(vicreg / 4, rel=1e-5)


def test_inverse_is_the_error_of_the_inferred_actions():
    inferred, actions = torch.randn(2, 12, 3, 4, generator=torch.Generator().manual_seed(0)).unbind()
    given = output(inferred_actions=inferred, actions=actions)
    words = ("model.inverse.kind=mlp", "objective.inverse.weight=1.0")
    assert value("inverse", given, *words) == pytest.approx((inferred - actions).square().mean().item(), rel=1e-6)
    assert value("inverse", given._replace(inferred_actions=actions), *words) == 0


def test_a_gain_inflates_the_plain_rate_alone():
    given = output(width=30, batch=20)
    louder = given._replace(agg=3 * given.agg)
    for normalize in ("unit", "fixed_gain"):
        words = ("objective.rate.weight=0.1", f"objective.rate.normalize={normalize}")
        assert value("rate", louder, *words) == pytest.approx(value("rate", given, *words), rel=1e-4)
    assert value("rate", louder, "objective.rate.weight=0.1") < 1.5 * value("rate", given, "objective.rate.weight=0.1")
    # rows of mean 0 and variance 1 have energy d: no more than this, however they lie
    rank, width = 19, 32
    bound = rank * math.log1p(width / rank)
    fixed = -value("rate", given, "objective.rate.weight=0.1", "objective.rate.normalize=fixed_gain")
    assert 0.8 * bound < fixed < bound


def test_sigreg_takes_each_view_position_by_itself():
    given = output(batch=256)
    words = (*PROJECTED, "objective.sigreg.weight=0.1", "objective.sigreg.num_slices=64")
    alone = [sigreg(given.projections[:, view], num_slices=64, seed=0).item() for view in range(4)]
    assert value("sigreg", given, *words) == pytest.approx(sum(alone) / 4, rel=1e-5)
    assert 0.3 < sum(alone) / 4 < 3  # Gaussian samples; collapsed ones give 0.4 B
    collapsed = given._replace(projections=torch.zeros(256, 4, 6))
    assert value("sigreg", collapsed, *words) == pytest.approx(0.402 * 256, rel=0.01)


def test_sigreg_draws_for_each_step():
    words = (*PROJECTED, "objective.sigreg.weight=0.1", "objective.sigreg.num_slices=8")
    term, given = objective(*words).terms["sigreg"], output()
    first = term(given, torch.tensor(1))
    assert torch.equal(first, term(given, torch.tensor(1)))
    assert not torch.equal(first, term(given, torch.tensor(2)))


def test_vicreg_is_lightlys():
    words = (*PROJECTED, "objective.variance.weight=1.0", "objective.covariance.weight=1.0")
    given = output(views=2, batch=40)
    a, b = given.projections.unbind(1)
    expected = (variance_loss(a) + variance_loss(b)).item() / 2
    assert value("variance", given, *words) == pytest.approx(expected, rel=1e-5)
    expected = (covariance_loss(a) + covariance_loss(b)).item() / 2
    assert value("covariance", given, *words) == pytest.approx(expected, rel=1e-5)
    flat = given._replace(projections=torch.ones(40, 2, 6))
    assert value("variance", flat, *words) == pytest.approx(1 - 1e-2)
    assert value("covariance", flat, *words) == 0


def test_the_total_is_the_weighted_sum():
    given = output()
    built = objective("objective.rate.weight=0.25", "objective.prediction.weight=3.0")
    total, terms = built(given, STEP)
    assert list(terms) == list(built.names) == ["loss_prediction", "loss_rate"]
    assert total.item() == pytest.approx(3 * terms["loss_prediction"].item() + 0.25 * terms["loss_rate"].item())
    built = objective(*PROJECTED, "objective.sigreg.weight=0.05", "objective.prediction.weight=0.95")
    total, terms = built(given, STEP)
    expected = 0.95 * terms["loss_prediction"].item() + 0.05 * terms["loss_sigreg"].item()
    assert total.item() == pytest.approx(expected)


def test_infonce_picks_the_own_target_among_all_of_the_batch():
    """Of both readings together; chance is the logarithm of their number."""
    given = output(both=True)
    other = given.others[0]
    predictions, targets = torch.cat([given.prediction, other.prediction]), torch.cat([given.target, other.target])
    cosines = F.normalize(predictions, dim=1) @ F.normalize(targets, dim=1).T
    log_shares = (cosines / 0.2).log_softmax(1)
    expected = -log_shares.diagonal().mean().item()
    words = ("objective.prediction.kind=infonce", "objective.prediction.scale=0.2")
    assert value("prediction", given, *words) == pytest.approx(expected, rel=1e-5)
    same = given._replace(target=torch.ones(12, 6), others=(other._replace(target=torch.ones(12, 6)),))
    assert value("prediction", same, *words) == pytest.approx(math.log(24), rel=1e-5)
    scaled = given._replace(prediction=7 * given.prediction)
    assert value("prediction", scaled, *words) == pytest.approx(expected, rel=1e-5)


def test_past_targets_are_further_negatives_and_the_oldest_leave_first():
    built = objective(
        "objective.prediction.kind=infonce", "objective.prediction.scale=0.2", "objective.prediction.queue=30"
    )
    arrived = torch.empty(0, 6)
    for step in range(4):
        parts = [output(8, seed=10 * step + number, both=step == 2) for number in range(2)]
        for given in parts:  # none of a step is a negative in the other micro-batch
            predictions = torch.cat([reading.prediction for reading in given.readings])
            targets = torch.cat([reading.target for reading in given.readings])
            cosines = F.cosine_similarity(predictions[:, None], torch.cat([targets, arrived[-30:]])[None], dim=-1)
            expected = -(cosines / 0.2).log_softmax(1)[:, : len(targets)].diagonal().mean()
            assert built(given, STEP)[1]["loss_prediction"].item() == pytest.approx(expected.item(), rel=1e-5)
        built.after_step(parts)
        arrived = torch.cat([arrived, *(reading.target for given in parts for reading in given.readings)])
        assert built.figures()["infonce_queue"].item() == pytest.approx(min(len(arrived), 30) / 30)
    built.after_step([output(50, seed=99)])  # more than it holds
    kept = {tuple(row) for row in F.normalize(output(50, seed=99).target[-30:], dim=1).tolist()}
    assert {tuple(row) for row in built.prediction.past.tolist()} == kept


def test_random_directions_lose_by_the_logarithm_of_their_number():
    words = ("objective.prediction.kind=infonce", "objective.prediction.scale=0.5", "objective.prediction.queue=512")
    built = Objective(compose(["tests/small.yaml", *words]).config.objective, 256)
    for step in range(4):
        given = output(128, width=256, seed=step)
        filled = min(step * 128, 512)
        loss = built(given, STEP)[1]["loss_prediction"].item()
        assert loss == pytest.approx(math.log(128 + filled), abs=0.1)
        built.after_step([given])


def test_a_learnt_scale_stays_within_its_limits():
    words = ("objective.prediction.kind=infonce", "objective.prediction.scale_limits=[0.05, 0.2]")
    given = output(16)
    for target, limit in ((given.prediction, 0.05), (-given.prediction, 0.2)):  # sure of itself; always wrong
        built = objective(*words)
        optimizer = torch.optim.Adam(built.parameters(), lr=0.1)
        for _ in range(30):
            loss, _ = built(given._replace(target=target), STEP)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            built.after_step([given])
        assert built.figures()["infonce_scale"].item() == pytest.approx(limit)
    unused = objective(*words, "objective.prediction.weight=0", "objective.rate.weight=1")
    assert [parameter.requires_grad for parameter in unused.parameters()] == [False]
