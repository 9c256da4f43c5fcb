"""Encoders of timm: shapes, stems, what is refused, and the way out by export."""

import importlib
import json

import pytest
import timm
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

import seqjepa
from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.engine.encoder import Description, Encoder
from seqjepa.engine.export import main as export
from seqjepa.engine.export import write
from seqjepa.engine.models.config import ModelConfig
from seqjepa.engine.models.encoders.config import TimmConfig
from seqjepa.engine.models.encoders.from_timm import build, width
from seqjepa.engine.models.heads import build_encoder
from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runs.state import PixelFacts
from seqjepa.engine.train import main

AUTO = ("model.encoder.kind=timm", "model.encoder.name=test_resnet")


def encoder(**settings):
    return ModelConfig.model_validate({"encoder": {"kind": "timm", **settings}})


@pytest.mark.parametrize(
    ("name", "side"),
    [("test_resnet", 32), ("test_vit", 32), ("test_convnext", 64), ("test_efficientnet", 32), ("resnet18", 32)],
)
def test_the_width_is_that_of_the_features(name, side):
    config = encoder(name=name, input_size=side)
    features = build_encoder(config)(torch.rand(2, 3, 3, side, side))
    assert features.shape == (2, 3, config.num_features)


def test_parameters_are_timms_own():
    ours = build_encoder(encoder(name="test_vit", input_size=32))
    theirs = timm.create_model("test_vit", num_classes=0, img_size=32)
    assert {name: tensor.shape for name, tensor in ours.exported.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }


def test_the_stem_for_small_images_keeps_the_resolution():
    """Four maps of 32 pixels: three halvings are left of five, so the last maps have 4 x 4 places, not 1 x 1."""
    last = {}
    for stem in ("cifar", "imagenet"):
        network = build("resnet18", stem, 32).eval()
        last[stem] = network.forward_features(torch.rand(1, 3, 32, 32)).shape[-1]
    assert last == {"cifar": 4, "imagenet": 1}
    small, large = (build("resnet18", "auto", side) for side in (32, 96))
    assert (small.conv1.stride, large.conv1.stride) == ((1, 1), (2, 2))


def test_resnet18_with_the_small_stem_is_ours_bit_for_bit():
    ours = build_encoder(ModelConfig()).eval()
    theirs = build_encoder(encoder(name="resnet18", stem="cifar")).eval()
    theirs.exported.load_state_dict(ours.state_dict())
    views = torch.rand(2, 2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(ours(views), theirs(views))


def test_resnet18_is_drawn_and_computes_as_torchvisions_to_the_bit():
    """Earlier versions were torchvision's class; their runs and checkpoints stay what they were."""
    torch.manual_seed(5)
    theirs = torchvision.models.ResNet(BasicBlock, [2, 2, 2, 2], zero_init_residual=True)
    theirs.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
    theirs.maxpool, theirs.fc = nn.Identity(), nn.Identity()
    after = torch.rand(1)
    torch.manual_seed(5)
    ours = build_encoder(ModelConfig())
    assert torch.equal(torch.rand(1), after)  # as many random numbers were drawn
    weights, others = ours.state_dict(), theirs.state_dict()
    assert list(weights) == list(others)
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    images = torch.rand(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    features, expected = ours.features(images), theirs(images)
    assert torch.equal(features, expected)
    features.square().sum().backward()
    expected.square().sum().backward()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("name=resnet5",), "did you mean"),
        (("name=xyzzy",), "timm.list_models"),
        (("name=test_vit", "stem=cifar"), "has no stem"),
        (("name=test_vit", "input_size=17"), "test_vit"),
        (("name=test_vit", "input_size=4"), "input_size"),
    ],
)
def test_what_timm_cannot_build_is_one_line(words, said):
    with pytest.raises(InputError, match=said) as raised:
        compose(["model.encoder.kind=timm", *(f"model.encoder.{word}" for word in words)])
    assert "\n" not in str(raised.value)


def test_a_vit_must_know_the_size_of_the_images(tiny, refused):
    other = ("model.encoder.kind=timm", "model.encoder.name=test_vit")
    refused(tiny(other=other), "model.encoder.input_size", "the images are 24x24")
    refused(tiny("model.encoder.input_size=32", other=other), "images are 24x24 pixels, not 32x32")


def test_images_that_are_too_small_are_refused_before_a_folder_is_made(tiny, refused, tmp_path):
    for name in ("convnext_atto", "densenet121"):
        words = tiny(other=("model.encoder.kind=timm", f"model.encoder.name={name}"))
        refused(words, "model.encoder.name", f"{name} cannot see images of 24x24 pixels")
    assert not (tmp_path / "run").exists()


def test_auto_is_settled_by_the_size_of_the_images():
    auto = TimmConfig(name="resnet18")
    stems = [auto.settled(size).stem for size in ((24, 24), (64, 64), (64, 65), (96, 96))]
    assert stems == ["cifar", "cifar", "imagenet", "imagenet"]
    assert TimmConfig(name="test_vit").settled((24, 24)).stem == "imagenet"
    assert TimmConfig(name="resnet18", stem="imagenet").settled((24, 24)).stem == "imagenet"


def test_a_run_keeps_the_stem_that_auto_was(tiny, folder_of, refused, blank_figures):
    words = tiny("run.epochs=1", "run.overwrite=false", "run.resume=auto", other=AUTO)
    assert main(words) == 0
    network = seqjepa.load_encoder(folder_of(words))
    assert network.description.model.encoder.stem == "cifar"
    assert isinstance(network.network.exported.maxpool, nn.Identity)
    assert compose([str(folder_of(words) / "config.yaml")]).config.model.encoder.stem == "cifar"
    assert main([*words, "run.epochs=2"]) == 0
    refused([*words, "run.epochs=3", "model.encoder.stem=imagenet"], "trained with 'cifar'")


def test_a_checkpoint_of_before_auto_was_settled_stays_what_it_is(tiny, folder_of, blank_figures):
    """Without an `input_size` it had timm's own stem, whatever the images."""
    words = tiny("run.epochs=1", "run.overwrite=false", "run.resume=auto", other=AUTO)
    assert main([*words, "model.encoder.stem=imagenet"]) == 0
    path = find_checkpoint(folder_of(words)) / "state.json"
    state = json.loads(path.read_text())
    state["config"]["model"]["encoder"]["stem"] = "auto"
    path.write_text(json.dumps(state))
    (path.parent / "manifest.json").unlink()
    seal(path.parent)
    assert main([*words, "run.epochs=2"]) == 0
    network = seqjepa.load_encoder(folder_of(words))
    assert network.description.model.encoder.stem == "auto"
    assert isinstance(network.network.exported.maxpool, nn.MaxPool2d)


def test_the_width_takes_no_memory():
    assert width("vit_giant_patch14_224", "auto", 224) == 1408  # a billion parameters


def test_it_trains_and_timm_loads_what_is_exported(tiny, tmp_path):
    other = ("model.encoder.kind=timm", "model.encoder.name=test_resnet", "model.encoder.stem=imagenet")
    result = seqjepa.train(*tiny("run.epochs=1", other=other))
    out = tmp_path / "out"
    assert export([str(result.folder), "--out", str(out), "--format", "timm"]) == 0
    same_by_timm(out, 24)


@pytest.mark.parametrize("settings", [{"name": "test_vit", "input_size": 32}, {"name": "test_resnet", "stem": "cifar"}])
def test_timm_loads_what_is_written(settings, tmp_path):
    """A ViT for images of its size, and a network whose stem is not timm's own."""
    pixels = PixelFacts(mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4], size=[32, 32], classes=[])
    model = encoder(**settings)
    write(Encoder(build_encoder(model), Description(model=model, pixels=pixels)).eval(), tmp_path, ["timm"])
    same_by_timm(tmp_path, 32)


def same_by_timm(folder, side):
    """The features of a folder by timm are those by seqjepa; training moved none of timm's names."""
    ours, theirs = seqjepa.load_encoder(folder), timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.rand(3, 3, side, side)
    with torch.inference_mode():
        torch.testing.assert_close(theirs((images - ours.mean) / ours.std), ours(images), rtol=1e-5, atol=1e-5)


def test_timms_other_ways_to_make_a_network_with_the_small_stem():
    importlib.import_module("seqjepa.engine.timm_models")  # which registers it
    made = timm.create_model("resnet_cifar", network="test_resnet", num_classes=7, in_chans=1).eval()
    maps = timm.create_model("resnet_cifar", network="test_resnet", features_only=True).eval()
    with torch.inference_mode():
        assert made(torch.rand(2, 1, 32, 32)).shape == (2, 7)
        sides = [found.shape[-1] for found in maps(torch.rand(2, 3, 32, 32))]
    assert sides == [32 // reduction for reduction in maps.feature_info.reduction()]
    assert sides[0] == 32
