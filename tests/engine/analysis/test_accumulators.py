"""Metrics on the device against scikit-learn and closed forms."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import r2_score

from seqjepa.engine.analysis.accumulators import R2, Mean, MetricBank, centred_cosine
from seqjepa.engine.evaluation.config import ProbesConfig
from seqjepa.engine.evaluation.probes import PROBES, OnlineProbes, probe_features
from seqjepa.engine.models.seq_jepa import Output


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def test_r2_is_scikit_learns():
    rng = np.random.default_rng(0)
    target = rng.normal(3, [0.1, 1, 10], (501, 3)).astype(np.float32)
    predicted = (target + rng.normal(0, [0.05, 2, 1], (501, 3))).astype(np.float32)
    metric = R2(3).double()
    for t, p in zip(np.array_split(target, 7), np.array_split(predicted, 7), strict=True):
        metric.update(torch.from_numpy(p), torch.from_numpy(t))
    np.testing.assert_allclose(metric.compute(), r2_score(target, predicted, multioutput="raw_values"), rtol=1e-6)


def test_constant_dimensions_have_no_r2():
    target = torch.stack([torch.linspace(0, 1, 50), torch.full((50,), 0.3), torch.zeros(50)], dim=1)
    metric = R2(3).double()
    metric.update(target + 0.1, target)
    scores = metric.compute()
    assert scores[0] == pytest.approx(1 - 0.01 * 50 / (50 * target[:, 0].var(unbiased=False).item()), rel=1e-4)
    assert math.isnan(scores[1])
    assert math.isnan(scores[2])
    metric.update(target + 0.1, target)
    noise = torch.tensor([0.0, 1e-7, 1e-7]) * torch.randn(50, 1)  # what float32 makes of a constant
    metric.update(target, target + noise)
    assert math.isnan(metric.compute()[1])
    assert math.isnan(metric.compute()[2])


def test_means_and_collect(accelerator):
    bank = MetricBank({"a": Mean(100.0), "b": R2(2), "empty": Mean()})
    bank["a"].update(torch.tensor(3.0), 4)
    bank["a"].update(torch.tensor(1.0), 4)
    bank["b"].update(torch.ones(5, 2), torch.arange(10.0).view(5, 2))
    host = bank.collect(accelerator)
    assert host["a"].compute() == 50.0
    assert host["b"].compute() == bank["b"].compute()
    assert math.isnan(host["empty"].compute())
    bank.reset()
    assert math.isnan(bank["a"].compute())
    assert host["a"].compute() == 50.0


def test_centred_cosine_closed_forms(accelerator):
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(400, 32, generator=generator) + 5
    constant = target.mean(0).expand(400, -1)
    # plain cosine calls the constant prediction nearly perfect; centred it has no direction at all
    assert torch.cosine_similarity(constant, target).mean() > 0.99
    assert centred_cosine(constant, target, accelerator) == pytest.approx(0, abs=1e-6)
    assert centred_cosine(3 * target - 7, target, accelerator) == pytest.approx(1, abs=1e-6)
    assert centred_cosine(-target, target, accelerator) == pytest.approx(-1, abs=1e-6)
    shuffled = target[torch.randperm(400, generator=generator)]
    assert abs(centred_cosine(shuffled, target, accelerator)) < 5 / math.sqrt(400 * 32)


def test_features_are_those_of_the_reference_code():
    z = torch.randn(5, 3, 4, requires_grad=True)
    features = probe_features(
        Output(z, torch.randn(5, 6), torch.randn(5, 4), torch.randn(5, 4), z, torch.randn(5, 1, 4))
    )
    assert torch.equal(features["pair"], torch.cat([z[:, 0], z[:, 1]], 1))
    assert torch.equal(features["first"], z[:, 0])
    torch.testing.assert_close(features["mean"], (z[:, 0] + z[:, 1] + z[:, 2]) / 3)
    assert not any(feature.requires_grad for feature in features.values())
    target = torch.randn(5, 4)
    single = probe_features(
        Output(z[:, :1], torch.randn(5, 6), torch.randn(5, 4), torch.randn(5, 4), z, target[:, None])
    )
    assert torch.equal(single["pair"], torch.cat([z[:, 0], target], 1))


def test_probes_learn_what_is_there_and_only_that():
    torch.manual_seed(0)
    factors = {"turn": slice(0, 1), "still": slice(1, 2)}
    probes = OnlineProbes(ProbesConfig(hidden=32), num_features=8, token_width=12, num_classes=3, factors=factors)
    optimizer = torch.optim.Adam(probes.parameters(), lr=1e-2)
    banks = {}
    for split, steps in (("train", 300), ("test", 1)):
        bank = banks[split] = probes.metric_bank()
        for _ in range(steps):
            z, agg = torch.randn(64, 3, 8), torch.randn(64, 12)
            labels = agg[:, :3].argmax(1)  # the class is in agg alone, the action in z alone
            actions = torch.stack([z[:, 0, 0] - z[:, 1, 0], torch.ones(64)], dim=1)[:, None].expand(-1, 2, -1)
            features = probe_features(Output(z, agg, torch.randn(64, 8), torch.randn(64, 8), z, torch.randn(64, 1, 8)))
            outputs = probes(features)
            optimizer.zero_grad()
            sum(probes.losses(outputs, labels, actions).values()).backward()
            optimizer.step()
        probes.update(bank, outputs, labels, actions)
    values = probes.values(banks["test"], "test")
    assert values["online_linacc_test"] > 80
    assert values["leakage_linacc_test"] < 60
    assert values["matched_z_linacc_test"] < 60
    assert values["online_r2_turn_test"] > 0.9
    assert values["matched_z_r2_turn_test"] > 0.9
    assert values["leakage_r2_turn_test"] < 0.2
    assert values["matched_agg_r2_turn_test"] < 0.2
    # a factor that never moves has no R², and the mean leaves it out
    assert math.isnan(values["online_r2_still_test"])
    assert values["online_r2_test"] == values["online_r2_turn_test"]
    assert {f"{probe.name}_test" for probe in PROBES} <= set(values)


@pytest.mark.parametrize("standardize", [True, False])
def test_standardised_probes_see_features_that_hardly_vary(standardize):
    """Features with one large common value, as a ReLU gives: only probes that standardise them find the class."""
    torch.manual_seed(0)
    config = ProbesConfig(hidden=32, standardize=standardize)
    probes = OnlineProbes(config, 8, 12, num_classes=3, factors={"turn": slice(0, 1)})
    optimizer = torch.optim.Adam(probes.parameters(), lr=1e-2)

    def batch(count):
        z, agg = torch.randn(count, 3, 8), torch.randn(count, 12)
        labels, actions = agg[:, :3].argmax(1), (z[:, 0, :1] - z[:, 1, :1])[:, None].expand(-1, 2, -1)
        z, agg = 5 + 1e-3 * z, 5 + 1e-3 * agg
        output = Output(z, agg, torch.randn(count, 8), torch.randn(count, 8), z, torch.randn(count, 1, 8))
        return probe_features(output), labels, actions

    for _ in range(300):
        features, labels, actions = batch(64)
        optimizer.zero_grad()
        sum(probes.losses(probes(features), labels, actions).values()).backward()
        optimizer.step()
    probes.eval()
    bank = probes.metric_bank()
    features, labels, actions = batch(500)
    probes.update(bank, probes(features), labels, actions)
    values = probes.values(bank, "test")
    assert (values["online_linacc_test"] > 80) == standardize
    assert (values["online_r2_turn_test"] > 0.9) == standardize
    alone = probes({name: rows[:1] for name, rows in features.items()})  # running moments, not those of the batch
    torch.testing.assert_close(alone["online_linacc"], probes(features)["online_linacc"][:1])
