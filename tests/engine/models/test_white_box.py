"""CRATE and ToST: published sizes, the algorithms whose steps they are, and what they must not depend on."""

import json
import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from seqjepa.engine.config import compose
from seqjepa.engine.models.aggregators.config import CrateConfig, TostConfig
from seqjepa.engine.models.encoders.config import CrateEncoderConfig
from seqjepa.engine.models.predictors.config import CratePredictorConfig
from seqjepa.engine.models.seq_jepa import SeqJEPA
from seqjepa.engine.models.white_box.layers import ISTA, OvercompleteISTA, SubspaceAttention, subspace_rate
from seqjepa.engine.train import main
from seqjepa.engine.training.optimizers import build_optimizer
from seqjepa.loaders.sequences import ActionSpace


def count(module):
    return sum(p.numel() for p in module.parameters())


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("size", "published"),
    [("tiny", 6_090_856), ("small", 13_116_328), ("base", 22_796_008), ("large", 77_641_192)],
)
def test_crates_published_sizes(size, published):
    """Those of arXiv 2306.01129, in millions: 6.09, 13.12, 22.80, 77.64; with a head for 1000 classes."""
    config = CrateEncoderConfig(size=size, patch=16, side=224)
    with torch.device("meta"):
        encoder = config.build()
    assert count(encoder) + config.num_features * 1000 + 1000 == published


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (CrateConfig(num_layers=1), {640: 1_232_000, 160: 77_600, 96: 28_128}),
        (CrateConfig(num_layers=1, coding="overcomplete"), {640: 4_098_560, 160: 256_640, 96: 92_544}),
        (TostConfig(num_layers=1), {640: 4_104_324, 160: 258_084, 96: 93_412}),
    ],
)
def test_parameters_of_a_layer(config, sizes):
    assert {width: count(config.build(width).layers) for width in sizes} == sizes


def test_tosts_published_sizes():
    """Layers and read-out of ToST-T and S (5.8M, 22.6M), with their stem of four convolutions, positions and head."""
    for width, heads, published in ((192, 4, 5_769_328), (384, 8, 22_589_944)):
        config = TostConfig(num_layers=12, num_heads=heads, readout_layers=2)
        sizes = [3, width // 8, width // 4, width // 2, width]
        stem = sum(9 * a * b + 2 * b for a, b in pairwise(sizes))
        rest = stem + (64 * width + width) + (1000 * width + 1000)
        with torch.device("meta"):
            assert count(config.build(width)) + rest == published


def test_ista_is_a_proximal_step():
    """prox of ηλ|z|₁ over z >= 0, at a gradient step of ½ |u - z Dᵀ|² from z = u."""
    torch.manual_seed(0)
    layer = ISTA(12, 0.1, 0.3).double()
    u, dictionary = drawn(5, 12).requires_grad_(), layer.dictionary.detach()
    loss = 0.5 * (u.detach() - u @ dictionary.mT).square().sum()
    (gradient,) = torch.autograd.grad(loss, u)
    expected = (u - 0.1 * gradient - 0.1 * 0.3).clamp(min=0)
    torch.testing.assert_close(layer(u), expected, rtol=1e-12, atol=1e-12)
    assert (layer(u) >= 0).all()


def test_overcomplete_ista_descends():
    torch.manual_seed(0)
    layer = OvercompleteISTA(24, 0.1, 0.1).double()
    u, dictionary = drawn(9, 24), layer.dictionary.detach()

    def lasso(z):
        return (0.5 * (u - z @ dictionary.mT).square().sum() + 0.1 * z.abs().sum()).item()

    nothing = torch.zeros(9, 96, dtype=torch.float64)
    one = (nothing - 0.1 * ((nothing @ dictionary.mT - u) @ dictionary) - 0.01).clamp(min=0)
    two = (one - 0.1 * ((one @ dictionary.mT - u) @ dictionary) - 0.01).clamp(min=0)
    assert lasso(two) < lasso(one) < lasso(nothing)
    torch.testing.assert_close(layer.codes(u), two, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(u), two @ layer.synthesis.detach().mT, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layer", "zeros"), [(ISTA, 0.50), (OvercompleteISTA, 0.55)])
def test_sparsity_at_the_start_is_no_merit(layer, zeros):
    torch.manual_seed(0)
    codes = layer(256, 0.1, 0.1).codes(torch.randn(400, 256))
    assert (codes == 0).float().mean().item() == pytest.approx(zeros, abs=0.02)


def test_the_step_is_the_dictionarys_norm_and_can_be_limited():
    torch.manual_seed(0)
    (layer,) = CrateConfig(num_layers=1, longest_step=0.5).build(96).layers
    exact = 0.1 * torch.linalg.matrix_norm(layer.coding.dictionary.detach(), 2).square()
    assert 0.7 < exact < 0.9
    torch.testing.assert_close(layer.step_length(), exact, rtol=0.02, atol=0)  # the gap of the spectrum is small
    layer.clip()
    assert layer.step_length().item() == pytest.approx(0.5, rel=1e-3)
    before = layer.coding.dictionary.detach().clone()
    layer.longest = 0.9
    layer.clip()
    assert torch.equal(layer.coding.dictionary, before)  # shorter steps are left alone


def test_subspace_attention_is_softmax_of_one_projection():
    attention = SubspaceAttention(12, 3, 0.0).double()
    x = drawn(2, 5, 12)
    w = (x @ attention.subspaces.weight.mT).view(2, 5, 3, 4)
    mixed = torch.stack([torch.softmax(w[:, :, k] @ w[:, :, k].mT / 2, -1) @ w[:, :, k] for k in range(3)], 2)
    expected = mixed.flatten(2) @ attention.out.weight.mT + attention.out.bias
    torch.testing.assert_close(attention(x), expected, rtol=1e-10, atol=1e-10)


def test_the_rate_in_subspaces():
    """½ Σ log(1 + p / (N ε) σ²) over the singular values of unit rows; orthogonal rows have all of them equal to 1."""
    orthogonal = torch.eye(6, 8).expand(3, 2, 6, 8) * 7
    assert subspace_rate(orthogonal).item() == pytest.approx(2 * 0.5 * 6 * math.log(1 + 8 / (6 * 0.01)))
    same = torch.ones(3, 2, 6, 8)
    assert subspace_rate(same).item() == pytest.approx(2 * 0.5 * math.log(1 + 8 / 0.01))
    rows = F.normalize(drawn(4, 2, 6, 8), dim=-1)
    values = torch.linalg.svdvals(rows).square()
    expected = (0.5 * torch.log1p(8 / (6 * 0.01) * values)).sum((1, 2)).mean()
    assert subspace_rate(3 * rows).item() == pytest.approx(expected.item())


def test_attention_lowers_the_rate_of_the_convex_form_alone():
    """With orthonormal bases a convex mix of tokens and attention lowers R^c; the plain sum raises it.

    So no test asserts that the implemented layer descends at random weights.
    """
    bases = torch.linalg.qr(drawn(24, 24))[0]
    attention = SubspaceAttention(24, 4, 0.0, bias=False).double()
    with torch.no_grad():
        attention.subspaces.weight.copy_(bases.mT)
        attention.out.weight.copy_(bases)
    x = drawn(8, 16, 24, seed=3)
    mixed = attention(x)

    def rate(tokens):  # ½ log det without normalisation, as the paper's R^c
        w = attention.project(tokens)
        gram = torch.eye(16).double() + w @ w.mT * (6 / (16 * 0.25))
        return torch.linalg.slogdet(gram).logabsdet.sum(1).mean().item() / 2

    assert rate(0.9 * x + 0.1 * mixed) > rate(0.5 * x + 0.5 * mixed) > rate(mixed)
    assert rate(x) > rate(0.9 * x + 0.1 * mixed)
    assert rate(x + 0.5 * mixed) > rate(x)


@pytest.mark.parametrize("config", [CrateConfig(), CrateConfig(coding="overcomplete"), TostConfig()])
def test_aggregates_do_not_depend_on_the_order_of_views_without_positions(config):
    torch.manual_seed(0)
    x = torch.randn(3, 7, 96)
    order = torch.randperm(7)
    aggregator = config.build(96).eval()
    torch.testing.assert_close(aggregator(x[:, order]), aggregator(x), rtol=1e-4, atol=1e-5)
    timed = config.model_copy(update={"time_embedding": True}).build(96).eval()
    assert (timed(x[:, order]) - timed(x)).abs().max() > 1e-3
    # the last views keep their embeddings in a longer sequence
    torch.testing.assert_close(timed.time(x)[:, 3:], timed.time(x[:, 3:]))


def test_a_causal_layer_does_not_see_later_views():
    torch.manual_seed(0)
    layers = TostConfig(causal=True).build(96).layers
    x = torch.randn(2, 6, 96)
    changed = torch.cat([x[:, :4], torch.randn(2, 2, 96)], 1)
    torch.testing.assert_close(layers(changed)[:, :4], layers(x)[:, :4])
    both = TostConfig().build(96).layers
    assert (both(changed)[:, :4] - both(x)[:, :4]).abs().max() > 1e-4


def test_the_aggregate_token_takes_no_part_in_the_statistics():
    torch.manual_seed(0)
    aggregator = TostConfig().build(96)
    x = torch.randn(2, 6, 96)
    before = aggregator.layers(x)
    with torch.no_grad():
        aggregator.token.normal_()
    assert torch.equal(aggregator.layers(x), before)


def test_dictionaries_and_temperatures_do_not_decay():
    words = (
        "model.predictor.kind=crate",
        "model.encoder.kind=crate",
        "model.encoder.dim=32",
        "model.encoder.side=16",
    )
    for kind, spared in (("crate", ("dictionary", "token", "kinds", "positions")), ("tost", ("temperature", "token"))):
        config = compose(
            ["tests/small.yaml", "model.aggregator.kind=mean", f"model.aggregator.kind={kind}", *words]
        ).config
        model = SeqJEPA(config.model, config.target, ActionSpace(5))
        decayed, _ = build_optimizer(model, config.optim, torch.zeros((), dtype=torch.float64)).param_groups
        names = {p: name for name, p in model.named_parameters()}
        found = [names[p].rpartition(".")[2] for p in decayed["params"]]
        assert not {*spared} & {*found}
        assert "weight" in found


def test_the_predictor_reads_both_tokens():
    torch.manual_seed(0)
    predictor = CratePredictorConfig(dim=32).build(96, 8, 24)
    agg, action = torch.randn(5, 96), torch.randn(5, 8)
    told = predictor(agg, action)
    assert told.shape == (5, 24)
    assert (predictor(agg, torch.randn(5, 8)) - told).abs().max() > 1e-3
    assert (predictor(torch.randn(5, 96), action) - told).abs().max() > 1e-3
    assert CratePredictorConfig(dim=32).build(96, 0, 24)(agg, None).shape == (5, 24)


def test_the_encoders_patches_are_those_of_the_image():
    """Moving a patch with its position moves nothing else: the class token sees the same set."""
    torch.manual_seed(0)
    encoder = CrateEncoderConfig(dim=32, num_layers=2, side=16).build().eval()
    assert encoder.positions.shape == (1, 17, 32)
    image = torch.randn(2, 3, 16, 16)
    swapped = image.clone()
    swapped[..., :4, :4], swapped[..., 4:8, 8:12] = image[..., 4:8, 8:12], image[..., :4, :4]
    before = encoder.features(image)
    with torch.no_grad():
        encoder.positions[:, [1, 1 + 4 + 2]] = encoder.positions[:, [1 + 4 + 2, 1]]
    torch.testing.assert_close(encoder.features(swapped), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (
            ("model.aggregator.kind=crate", "model.aggregator.num_heads=7"),
            ("model.aggregator.num_heads", "does not divide"),
        ),
        (("model.encoder.kind=crate", "model.encoder.patch=5"), ("model.encoder.patch", "the side of 32 pixels")),
        (("model.encoder.kind=crate", "model.encoder.num_heads=5"), ("model.encoder.num_heads", "the width 192")),
        (("model.encoder.kind=crate", "model.encoder.side=28"), ("model.encoder.side", "24x24 pixels, not 28x28")),
        (
            ("model.encoder.kind=crate", "model.encoder.size=tiny", "model.encoder.num_layers=2"),
            ("model.encoder.num_layers", "only applies with size=custom"),
        ),
        (("model.predictor.kind=crate", "model.predictor.dim=50"), ("model.predictor.num_heads", "the width 50")),
    ],
)
def test_widths_that_do_not_fit(words, parts, tiny, refused):
    place = words[0].partition("=")[0].rpartition(".")[0]
    refused([word for word in tiny() if not word.startswith(f"{place}.")] + [*words], *parts)


def test_sixty_four_views_train(tiny, tmp_path):
    few = ("data.train_subset=32", "data.val_subset=8", "data.batch_size=16", "sequence.num_observed=63")
    words = tiny(*few, "run.epochs=1", "control.enabled=false", "gates.rules.digits_affine=[]")
    words = [word for word in words if not word.startswith("model.aggregator")]
    assert (
        main(
            [
                *words,
                "model.aggregator.kind=tost",
                "model.aggregator.time_embedding=true",
                "model.aggregator.positions=63",
            ]
        )
        == 0
    )
    (row,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert 0 < row["val_loss"] < 2
