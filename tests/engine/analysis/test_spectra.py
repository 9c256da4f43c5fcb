"""Figures of collapse against spectra that are known."""

import math

import pytest
import torch

from seqjepa.engine.analysis.config import DiagnosticsConfig
from seqjepa.engine.analysis.spectra import Moments, collapse_warnings, embedding_figures


def figures(features, parts=3):
    moments = Moments(features.shape[1]).double()
    for part in features.chunk(parts):
        moments.update(part)
    return moments.compute()


def with_spectrum(deviations, count=64):
    """Features whose covariance is exactly diagonal: balanced signs (a Hadamard matrix) times the deviations."""
    signs = torch.ones(1, 1)
    while len(signs) < count:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs[:, 1 : 1 + len(deviations)] * torch.tensor(deviations)


def test_a_known_spectrum():
    found = figures(with_spectrum([2.0, 1.0]))
    assert found["participation"] == pytest.approx((4 + 1) ** 2 / (16 + 1))
    assert found["reference_rank"] == pytest.approx((2 + 1) ** 2 / (4 + 1))
    entropy = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert found["effective_rank"] == pytest.approx(math.exp(entropy))
    assert found["rankme"] == pytest.approx(math.exp(entropy), rel=1e-5)  # the mean is zero
    assert found["isotropy"] == pytest.approx((4 + 1) ** 2 / (16 + 1) / 2)
    assert (found["variance"], found["variance_min"]) == pytest.approx((2.5, 1.0))


def test_a_sphere_and_a_line():
    ball = figures(with_spectrum([3.0] * 8))
    for name in ("participation", "reference_rank", "effective_rank"):
        assert ball[name] == pytest.approx(8)
    assert ball["isotropy"] == pytest.approx(1)
    line = figures(torch.outer(torch.linspace(-1, 1, 64), torch.ones(8)))
    for name in ("participation", "reference_rank", "effective_rank"):
        assert line[name] == pytest.approx(1, abs=1e-3)
    assert line["isotropy"] == pytest.approx(1 / 8)


def test_an_offset_is_seen_by_rankme_and_the_cosine_alone():
    spread = with_spectrum([1.0] * 8)
    shifted = figures(spread + 1000)
    assert shifted["participation"] == pytest.approx(8, rel=1e-4)
    assert shifted["rankme"] < 1.1
    assert shifted["pair_cosine"] == pytest.approx(1, abs=1e-4)
    # rows of a Hadamard matrix are orthogonal: their pairs' mean cosine is that of 64 signs in 8 columns
    rows = torch.nn.functional.normalize(spread, dim=-1)
    pairs = (rows @ rows.T)[~torch.eye(64, dtype=bool)].mean().item()
    assert figures(spread)["pair_cosine"] == pytest.approx(pairs, abs=1e-6)


def test_scale_does_not_matter_to_ranks():
    small, large = figures(with_spectrum([2e-4, 1e-4])), figures(with_spectrum([2e4, 1e4]))
    for name in ("participation", "reference_rank", "effective_rank", "rankme", "isotropy", "pair_cosine"):
        assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-6)


def test_nothing_to_say():
    constant = figures(torch.full((10, 4), 2.0))
    assert constant["participation"] == pytest.approx(0, abs=1e-6)
    assert constant["pair_cosine"] == pytest.approx(1)
    assert all(math.isnan(value) for value in figures(torch.ones(1, 4), parts=1).values())
    assert all(math.isnan(value) for value in figures(torch.full((4, 4), math.nan), parts=1).values())


def test_figures_of_embeddings():
    """Of a Gaussian with a known spectrum; of unit vectors; of a constant."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 4, generator=generator) * torch.tensor([4.0, 2.0, 1.0, 1.0]).sqrt()
    found = {name: value.item() for name, value in embedding_figures(x).items()}
    share = torch.tensor([0.5, 0.25, 0.125, 0.125])
    assert found["rank"] == pytest.approx(math.exp(-(share * share.log()).sum().item()), rel=0.02)
    assert found["isotropy"] == pytest.approx(0.25, rel=0.05)
    assert found["variance"] == pytest.approx(2.0, rel=0.02)
    assert found["gauss"] > 0.9
    unit = torch.nn.functional.normalize(torch.randn(20_000, 16, generator=generator).exp(), dim=1)
    assert embedding_figures(unit)["variance"] < 1 / 16
    assert embedding_figures(unit)["gauss"] < 0.5  # lognormal
    constant = {name: value.item() for name, value in embedding_figures(torch.full((10, 4), 2.0)).items()}
    assert constant["variance"] == 0
    assert constant["isotropy"] == 1  # of nothing in any direction
    assert all(math.isfinite(value) for value in constant.values())


def test_warnings_name_the_feature_and_the_threshold():
    healthy = {"participation_z": 9.0, "participation_agg": 9.0, "pair_cosine_z": 0.5, "pair_cosine_agg": 0.5}
    config = DiagnosticsConfig(min_rank=3.0, max_cosine=0.9)
    assert collapse_warnings(healthy, config) == []
    (line,) = collapse_warnings(healthy | {"participation_agg": 1.5}, config)
    assert "agg varies along 1.5 direction(s)" in line
    assert "min_rank = 3" in line
    (line,) = collapse_warnings(healthy | {"pair_cosine_z": 0.95}, config)
    assert "z points the same way" in line
