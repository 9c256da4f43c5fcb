"""`seqjepa export --from-reference`: a checkpoint with the names and shapes of the authors' code, made here."""

import json
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

import seqjepa
from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.evaluation.cases import read_network
from seqjepa.engine.export import main as export
from seqjepa.engine.reference import read_reference

pytestmark = pytest.mark.filterwarnings("ignore:actions.normalization=view_l2")
CIFAR = ("configs/data/cifar100_aug.yaml",)


def authors_network(*, actions=9, small=True, teacher=True, layers=2, embedded=16, hidden=32):
    """Modules under the names of the authors' code, with weights and statistics that are none of the initial ones."""
    torch.manual_seed(0)

    def encoder():
        network = resnet18()
        network.fc = nn.Identity()
        if small:
            network.conv1, network.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
        return network

    width = 512 + embedded
    parts = {"encoder": encoder()} | ({"target_encoder": encoder()} if teacher else {})
    parts["action_proj"] = nn.Sequential(
        nn.Linear(actions, embedded, bias=False), nn.BatchNorm1d(embedded, affine=False)
    )
    parts["predictor"] = nn.Sequential(
        nn.Linear(width + embedded, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 512)
    )
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    parts["transformer_encoder"] = nn.ModuleDict(
        {
            "transformer_encoder": nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
            "norm": nn.LayerNorm(width),
        }
    )
    whole = nn.ModuleDict(parts)
    whole.register_parameter("agg_token", nn.Parameter(torch.zeros(1, 1, width)))
    with torch.no_grad():
        for name, tensor in whole.state_dict().items():
            if tensor.is_floating_point():
                noise = 0.02 * torch.randn_like(tensor)
                tensor.add_(noise.abs() if name.endswith("running_var") else noise)
    return whole.eval()


def their_forward(network, views, actions):
    """Aggregate, prediction and target as the authors' code computes them, of views [B, V, C, H, W]."""
    count = views.shape[1] - 1
    features = network["encoder"](views[:, :-1].flatten(0, 1)).unflatten(0, (-1, count))
    embedded = network["action_proj"](actions.flatten(0, 1)).unflatten(0, (-1, count))
    last = embedded[:, -1]
    embedded = torch.cat([embedded[:, :-1], torch.zeros_like(embedded[:, -1:])], 1)
    tokens = torch.cat([network.agg_token.expand(len(views), -1, -1), torch.cat([features, embedded], -1)], 1)
    for layer in network["transformer_encoder"]["transformer_encoder"].layers:
        tokens = layer(tokens)
    agg = network["transformer_encoder"]["norm"](tokens)[:, 0]
    return agg, network["predictor"](torch.cat([agg, last], -1)), network["target_encoder"](views[:, -1])


@pytest.fixture(scope="module")
def authors():
    return authors_network()


@pytest.fixture
def file(authors, tmp_path):
    probes = {"online_linprobe.0.weight": torch.zeros(100, 528), "online_equiprobe.weight": torch.zeros(9, 1024)}
    weights = authors.state_dict() | probes  # as their program for CIFAR-100 saves them
    torch.save({"model": weights, "epoch": 7, "optimizer": {"state": {}}}, tmp_path / "theirs.pt")
    return tmp_path / "theirs.pt"


def test_our_network_computes_what_theirs_does(authors, file, tmp_path):
    assert export(["--from-reference", str(file), "--out", str(tmp_path / "out"), *CIFAR]) == 0
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    encoder = seqjepa.load_encoder(tmp_path / "out")
    assert (encoder.image_size, encoder.num_features) == ((32, 32), 512)
    with torch.inference_mode():
        pixels = (images / 255 - encoder.mean) / encoder.std
        torch.testing.assert_close(encoder(images), authors["encoder"](pixels), rtol=1e-5, atol=1e-5)

    checkpoint = tmp_path / "out" / "checkpoints" / "epoch-0007"
    model, state, config = read_network(checkpoint)
    model.eval()
    assert (state.position.segment, config.target.kind, config.actions.normalization) == (7, "ema", "view_l2")
    views, actions = torch.randn(3, 4, 3, 32, 32), torch.randn(3, 3, 9)
    with torch.inference_mode():
        output, expected = model(views, actions), their_forward(authors, views, actions)
        for ours, theirs in zip((output.agg, output.prediction, output.target), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert F.cosine_similarity(output.prediction, output.target).std() > 0  # they are not constant


@pytest.mark.slow
@pytest.mark.realdata
def test_it_can_be_evaluated(file, data_root, tmp_path):
    assert export(["--from-reference", str(file), "--out", str(tmp_path / "out"), *CIFAR]) == 0
    words = [
        f"data.root={data_root / 'cifar100'}",
        "data.train_subset=300",
        "data.val_subset=100",
        "eval.batch_size=50",
    ]
    assert evaluate([str(tmp_path / "out"), *words, "eval.epochs=1", "eval.lengths=[3]", "run.threads=1"]) == 0
    (found,) = (tmp_path / "out" / "eval").glob("*/eval.json")
    assert json.loads(found.read_text())["epoch"] == 7


def test_parts_are_inferred_from_shapes(tmp_path, capsys):
    """The stem of ImageNet, no teacher, one layer, actions of other data: those of 3DIEBench have four numbers."""
    theirs = authors_network(actions=4, small=False, teacher=False, layers=1, embedded=8, hidden=24)
    weights = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    weights |= {"module.rot_regressor.0.weight": torch.zeros(3), "module.agg_classifier.bias": torch.zeros(3)}
    torch.save(weights, tmp_path / "theirs.pt")
    words = ["--from-reference", str(tmp_path / "theirs.pt"), "--mean", "0.5", "0.5", "0.5"]
    words += ["--std", "0.1", "0.1", "0.1", "--size", "128", "--out", str(tmp_path / "out"), *CIFAR]
    assert export(words) == 0
    assert "its actions have 4 numbers, those of sequence.kind=augment 9" in capsys.readouterr().err
    assert not (tmp_path / "out" / "checkpoints").exists()
    encoder = seqjepa.load_encoder(tmp_path / "out")
    images = torch.rand(2, 3, 128, 128)
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), theirs["encoder"]((images - 0.5) / 0.1), rtol=1e-4, atol=1e-4)
    found = read_reference(tmp_path / "theirs.pt", [*CIFAR], {"mean": [0.5] * 3, "std": [0.1] * 3}, 128).config
    assert (found.model.action_dim, found.model.predictor.hidden, found.target.kind) == (8, 24, "stop_gradient")
    assert (found.model.aggregator.num_layers, found.model.encoder.kind) == (1, "timm")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("encoder.conv1.weight"), "no checkpoint of the authors' code"),
        (lambda weights: weights.pop("encoder.bn1.weight"), r"encoder\.bn1|bn1\.weight.* is missing"),
        (lambda weights: weights.pop("predictor.3.weight"), "its predictor is one layer"),
        (lambda weights: weights.pop("action_proj.0.weight"), "its actions are not embedded"),
        (lambda weights: weights.update(agg_token=3), "holds no weights"),
        (lambda weights: weights.update(agg_token=SimpleNamespace()), r"torch\.save\(model\.state_dict\(\), FILE\)"),
        (lambda weights: weights.update(agg_token=torch.tensor(0.0)), r"agg_token is \[\], not of 3 dimensions"),
        (lambda weights: weights.update({3: torch.zeros(1)}), "holds no weights"),
    ],
)
def test_other_files_are_refused_in_one_line(change, said, authors, tmp_path, capsys):
    weights = dict(authors.state_dict())
    change(weights)
    torch.save(weights, tmp_path / "theirs.pt")
    assert export(["--from-reference", str(tmp_path / "theirs.pt"), "--out", str(tmp_path / "out"), *CIFAR]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(said, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("old", [False, True])
def test_what_is_no_file_of_torch_is_refused(authors, tmp_path, capsys, old):
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(dict(authors.state_dict()), tmp_path / "whole.pt", _use_new_zipfile_serialization=not old)
    content = (tmp_path / "whole.pt").read_bytes()
    for number, part in enumerate((1, 100, len(content) // 2, len(content) - 10)):
        (tmp_path / f"cut{number}.pt").write_bytes(content[:part])
    for name in ("text.pt", "absent.pt", "cut0.pt", "cut1.pt", "cut2.pt", "cut3.pt"):
        assert export(["--from-reference", str(tmp_path / name), "--out", str(tmp_path / "out"), *CIFAR]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--mean", "0.5", "0.5"), "3 finite numbers"),
        (("--mean", "nan", "0", "0"), "3 finite numbers"),
        (("--mean", "125", "122", "113"), "from 0 to 1"),
        (("--std", "0", "0", "0"), "std is not 0"),
        (("--size", "-3"), "8 pixels or more"),
    ],
)
def test_impossible_statistics_are_refused(file, tmp_path, capsys, words, said):
    assert export(["--from-reference", str(file), *words, "--out", str(tmp_path / "out"), *CIFAR]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_words_that_contradict_the_file_or_are_missing_are_refused(file, tmp_path, capsys):
    for words, said in (((), "configs/data/cifar100_aug.yaml"), ((*CIFAR, "target.kind=shared"), "the file decides")):
        assert export(["--from-reference", str(file), "--out", str(tmp_path / "out"), *words]) == 2
        assert said in capsys.readouterr().err
    assert export(["run", "--size", "3", "--out", str(tmp_path / "out")]) == 2
    assert "only with --from-reference" in capsys.readouterr().err
