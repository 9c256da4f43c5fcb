"""Several copies of the package in one process: each runs its own operators."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
LINE = "    rate, factor, info = factor_logdet(matrix, alone=alone)\n"

# a copy's operators multiply the rate by a factor, its gradient and its shapes stay; so all can be told apart
PROGRAM = """
import importlib, sys, torch
import seqjepa.kernels
sys.path.insert(0, "first")
import vendored, other
sys.path[0] = "second"
for name in [name for name in sys.modules if name.split(".")[0] == "vendored"]:
    del sys.modules[name]
reloaded = importlib.import_module("vendored")
copies = {1: seqjepa.kernels, 2: vendored, 3: other, 5: reloaded}
z = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
plain = seqjepa.kernels.coding_rate(z, eps=0.5)
for factor, kernels in copies.items():
    for function in (kernels.coding_rate, torch.compile(kernels.coding_rate, fullgraph=True, backend="aot_eager")):
        rate = function(z, eps=0.5)
        torch.testing.assert_close(rate, factor * plain)
        (gradient,) = torch.autograd.grad(rate.sum(), z)
        assert gradient.abs().max() > 0
names = {kernels.coding_rate.__globals__["_forward"]._qualname for kernels in copies.values()}
assert len(names) == 4, names
print("each its own")
"""


RELOADED = """
import gc, sys, torch
from torch import func
import seqjepa.kernels as first
from seqjepa.kernels._ops import ops

z = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))

def outcome(kernels):
    def rate(z):
        return kernels.coding_rate(z, eps=0.5).sum()

    leaf = z.clone().requires_grad_()
    return [
        rate(z), func.grad(rate)(z), *torch.autograd.grad(rate(leaf), leaf), func.vmap(rate)(z[None])[0],
        torch.compile(rate, fullgraph=True, backend="aot_eager")(z), kernels.sigreg(z, num_slices=4, seed=1),
    ]

expected = outcome(first)
for number in range(3):
    for name in [name for name in sys.modules if name.split(".")[0] == "seqjepa"]:
        del sys.modules[name]
    import seqjepa.kernels as kernels
    from seqjepa.kernels._ops import ops as new
    assert kernels is not first and new.name != ops.name
    gc.collect()
    torch._dynamo.reset()
    for which in (kernels, first):
        torch.testing.assert_close(outcome(which), expected)
print("old and new")
"""


@pytest.fixture
def copies(tmp_path):
    """A folder with copies whose rate is multiplied: `vendored` by 2, `other` by 3, a second `vendored` by 5."""
    text = (KERNELS / "coding_rate.py").read_text()
    assert LINE in text
    for name, factor in (("first/vendored", 2), ("first/other", 3), ("second/vendored", 5)):
        shutil.copytree(KERNELS, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        changed = text.replace(LINE, f"{LINE}    rate = {factor} * rate\n")
        (tmp_path / name / "coding_rate.py").write_text(changed)
    return tmp_path


def test_copies_and_versions_do_not_clash(copies, run_process):
    program = f"import os; os.chdir({str(copies)!r})\n{PROGRAM}"
    result = run_process(sys.executable, "-c", program)
    assert result.stdout == "each its own\n", result.stderr


def test_functions_of_before_an_import_anew_still_run(run_process):
    """As where a notebook purges sys.modules: somebody holds the functions of the first import."""
    result = run_process(sys.executable, "-c", RELOADED)
    assert result.stdout == "old and new\n", result.stderr


def test_names_are_a_function_of_the_source(copies):
    """So that graphs that torch keeps on disk are found again, and those of another version are not."""

    def name(folder):
        spec = importlib.util.spec_from_file_location("vendored._ops", folder / "_ops.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module.add_op_namespace_prefix("sigreg")

    moved = shutil.copytree(copies / "first" / "vendored", copies / "third")
    assert name(moved) == name(copies / "first" / "vendored")
    (moved / "drop_in" / "common.py").write_text("# another version\n")
    assert name(moved) != name(copies / "first" / "vendored")
