"""The folder for Hugging Face's Hub, loaded by its library without a network: each copy computes the plain formulas."""

import ast
import json
import re
import runpy
import socket
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from torch import nn

import kernels
import seqjepa.kernels
from seqjepa.kernels.coding_rate import coding_rate_reference
from seqjepa.kernels.sigreg import directions, sigreg_reference

PACKAGE = Path(seqjepa.kernels.__file__).parent
VARIANTS = ("torch-cpu", "torch-cuda")


def run(folder):
    """Run `python -m seqjepa.kernels.hub FOLDER`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["hub", str(folder)])
        patch.delitem(sys.modules, "seqjepa.kernels.hub", raising=False)
        runpy.run_module("seqjepa.kernels.hub", run_name="__main__")


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    run(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket, "socket", refuse)


def gradient_of(function, x):
    leaf = x.detach().clone().requires_grad_()
    value = function(leaf)
    return value, *torch.autograd.grad(value.sum(), leaf)


def assert_computes_the_formulas(kernel):
    """Values and gradients in float64 against the plain formulas, in float32 against those of this package."""
    z = torch.randn(3, 12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    unit = directions(torch.tensor(7), 5, 16).double()
    functions = {
        lambda z: coding_rate_reference(z, torch.tensor(5 / 0.5)): lambda of, z: of.coding_rate(z, eps=0.5),
        lambda z: sigreg_reference(z, unit): lambda of, z: of.sigreg(z, num_slices=16, seed=7),
    }
    for formula, function in functions.items():
        torch.testing.assert_close(gradient_of(lambda z, f=function: f(kernel, z), z), gradient_of(formula, z))
        ours = gradient_of(lambda z, f=function: f(seqjepa.kernels, z), z.float())
        theirs = gradient_of(lambda z, f=function: f(kernel, z), z.float())
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)


def test_the_folder_holds_the_package_and_nothing_else(layout):
    assert {path.name for path in layout.iterdir()} == {"README.md", "LICENSE", "build"}
    assert {path.name for path in (layout / "build").iterdir()} == set(VARIANTS)
    package = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")} - {"hub.py"}
    for variant in VARIANTS:
        root = layout / "build" / variant
        found = [path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        assert {path.relative_to(root).as_posix() for path in found} == package | {"metadata.json"}
        for path in found:
            nodes = list(ast.walk(ast.parse(path.read_text()))) if path.suffix == ".py" else []
            names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
            names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
            assert {name.split(".")[0] for name in names} <= {*sys.stdlib_module_names, "torch", "triton"}, path


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "notes").write_text("mine")
    for folder in (tmp_path, tmp_path / "notes"):
        with pytest.raises(SystemExit) as error:
            run(folder)
        assert error.value.code == f"{folder} is not an empty folder"
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_the_same_source_gives_the_same_folder(layout, tmp_path):
    run(tmp_path / "new" / "folder")
    for variant in VARIANTS:
        name = Path("build", variant, "metadata.json")
        assert (tmp_path / "new/folder" / name).read_text() == (layout / name).read_text()


@pytest.mark.parametrize("backend", [None, "cpu"])
def test_local_kernel(layout, backend):
    assert_computes_the_formulas(kernels.get_local_kernel(layout, backend=backend))


def test_metadata(layout):
    """As the library reads it: what it says of the variant, and hashes of its files."""
    for variant in VARIANTS:
        module = kernels.get_local_kernel(layout / "build" / variant)
        (known,) = (k.metadata for k in kernels.get_loaded_kernels() if k.module is module)
        assert known.id.startswith(f"_seqjepa_kernels_{variant.removeprefix('torch-')}_")
        assert (str(known.name), known.version, known.license) == ("seqjepa-kernels", 0, "apache-2.0")
        assert (known.python_depends, known.backend.archs) == ([], ["8.0+PTX"] if "cuda" in variant else None)
        known.digest.validate(type(known.digest).hash_variant(known.digest.algorithm, layout / "build" / variant))


def test_copies_in_one_process_have_their_own_operators(layout):
    copies = [seqjepa.kernels, *(kernels.get_local_kernel(layout / "build" / variant) for variant in VARIANTS)]
    names = [copy.coding_rate.__globals__["_forward"]._qualname for copy in copies]
    assert len(set(names)) == 3
    for variant, name in zip(VARIANTS, names[1:], strict=True):  # what the Hub asks for
        identity = json.loads((layout / "build" / variant / "metadata.json").read_text())["id"]
        assert name == f"{identity}::coding_rate"
    for copy in copies:
        assert_computes_the_formulas(copy)


def test_the_snippet_of_the_card_runs_with_local_kernels(layout, monkeypatch):
    monkeypatch.setenv("LOCAL_KERNELS", f"OWNER/seqjepa-kernels={layout}")
    (snippet,) = re.findall(r"```python\n(.*?)```", (layout / "README.md").read_text(), re.DOTALL)
    space = {}
    exec(snippet, space)
    assert_computes_the_formulas(space["kernels"])
    value, gradient = gradient_of(lambda z: coding_rate_reference(z, torch.tensor(64 / 0.5)), space["z"].double())
    torch.testing.assert_close(space["rate"].double(), value, rtol=1e-5, atol=0)  # in float32
    torch.testing.assert_close(space["z"].grad.double(), gradient, rtol=1e-4, atol=1e-6)


@kernels.use_kernel_forward_from_hub("CodingRate")
class PlainRate(nn.Module):
    def __init__(self):
        super().__init__()
        self.eps, self.center = 0.25, False

    def forward(self, features):
        return coding_rate_reference(features, torch.tensor(features.shape[-1] / self.eps), center=self.center)


@kernels.use_kernel_forward_from_hub("SIGReg")
class PlainSIGReg(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_slices, self.t_max, self.num_points = 16, 4.0, 9

    def forward(self, samples):
        unit = directions(torch.randint(2**62, ()), samples.shape[-1], self.num_slices).to(samples.dtype)
        return sigreg_reference(samples, unit, t_max=self.t_max, num_points=self.num_points)


@kernels.use_kernel_forward_from_hub("AttentionTSSA")
class PlainAttention(nn.Module):
    """The attributes and the formula of ToST's AttentionTSSA."""

    def __init__(self, drop=0.0):
        super().__init__()
        self.heads = 2
        self.temp = nn.Parameter(torch.tensor([[0.5], [2.0]]))
        self.qkv, self.attn_drop = nn.Linear(6, 6, bias=False), nn.Dropout(drop)
        self.to_out = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.0))

    def forward(self, x):
        w = self.qkv(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, h, N, p]
        scores = nn.functional.normalize(w, dim=-2).square().sum(-1) * self.temp
        weights = scores.softmax(1)[..., None]
        second = (weights / (weights.sum(-2, keepdim=True) + 1e-8) * w.square()).sum(-2, keepdim=True)
        y = -w * weights * self.attn_drop(1 / (1 + second))
        return self.to_out(y.transpose(1, 2).flatten(-2))


def kernelized(layer, layout):
    name = type(layer).kernel_layer_name
    repository = kernels.LocalLayerRepository(layout, layer_name=name)
    mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
    with kernels.use_kernel_mapping({name: {"cpu": repository}}):
        return kernels.kernelize(layer, mode=mode, device="cpu", use_fallback=False)


@pytest.mark.parametrize("plain", [PlainRate, PlainSIGReg, PlainAttention])
def test_a_kernelized_layer_compiles_and_equals_the_plain_one(layout, plain):
    torch.manual_seed(0)
    layer, x = plain().double(), torch.randn(2, 10, 6, dtype=torch.float64)

    def outcome(function):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        value = function(leaf)
        return value, *torch.autograd.grad(value.square().sum(), [leaf, *layer.parameters()])

    before = outcome(layer)
    layer = kernelized(layer, layout)
    assert layer.forward.__func__ is not plain.forward
    torch.testing.assert_close(outcome(layer), before)
    torch.testing.assert_close(outcome(torch.compile(layer, fullgraph=True, backend="aot_eager")), before)


def test_attention_without_its_dropout_is_refused_in_training(layout):
    layer, x = kernelized(PlainAttention(drop=0.1), layout), torch.randn(1, 4, 6)
    with pytest.raises(ValueError, match=r"attn_drop must be 0 in training, got 0\.1"):
        layer(x)
    torch.testing.assert_close(layer.eval()(x), PlainAttention.forward(layer, x))
