"""Compile every kernel for every supported GPU, on a machine without one, and print what the binaries need.

Run by test_aot.py in a process of its own (it cannot work under TRITON_INTERPRET=1); by hand, with `--write`, it
renews budget.json.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is unset

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

import seqjepa.kernels
from seqjepa.kernels import adamw_ema, cholesky, directions, ema, matmul, multi_tensor

sigreg = importlib.import_module("seqjepa.kernels.sigreg")  # the package exports a function of that name

BUDGET = Path(__file__).with_name("budget.json")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TF32X3 = (80, 90, 100)  # where backend.dot_precision chooses it


def manifest(architecture: int) -> list[tuple]:
    """What production launches: kernel, types of its arguments, constants, options."""
    precision = {"PRECISION": "tf32x3" if architecture in TF32X3 else "ieee"}
    lists = {"ALIGNED": True, "PIECE": multi_tensor.PIECE, "BLOCK": 1024}
    own, live = tl.float32, tl.bfloat16
    gemm = "*bf16 *fp32 *fp32 *fp32" + " i32" * 9
    waves = "i32 i32 i32 fp32"
    return [
        (matmul._matmul_kernel, gemm, {"SCALED": True, **precision, **matmul.MATMUL_BLOCKS}, {}),
        (matmul._gram_kernel, "*fp32 " * 3 + "i32 " * 5, {"IDENTITY": True, **precision, **matmul.GRAM_BLOCKS}, {}),
        (
            cholesky._cholesky_kernel,
            "*fp32 *fp32 *fp32 *i32 i32",
            {"INVERSE": True, **cholesky.BLOCKS},
            {"num_stages": 1},
        ),
        (directions._directions_kernel, "*i64 *fp32 i32 i32", directions.BLOCKS, {}),
        (
            sigreg._moments_kernel,
            "*fp32 *fp32 " + waves,
            {"BETWEEN": False, "BLOCK_P": 16, **sigreg.MOMENTS_BLOCKS},
            {},
        ),
        (
            sigreg._projection_gradient_kernel,
            "*fp32 *fp32 *fp32 " + waves,
            {"BETWEEN": False, **sigreg.GRADIENT_BLOCKS},
            {},
        ),
        (
            ema._ema_kernel,
            "*i64 *i64 *fp64 *fp32",
            {"LISTS": 3, "TEACHER": own, "STUDENT": own, "LIVE": live, "SKIP": True, **lists},
            {},
        ),
        (
            adamw_ema._advance_kernel,
            "*i64 *fp32 *fp64 *fp32 i32 fp32 fp32",
            {"FOUND_INF": True, "BLOCK": 128},
            {},
        ),
        (
            adamw_ema._adamw_ema_kernel,
            "*i64 *i64 *fp32 *fp64 *fp64 *fp32 *fp32 fp32 fp32 fp32 fp32 fp32",
            {"PARAMETER": own, "GRAD": own, "TEACHER": own, "FOUND_INF": True, "GRAD_SCALE": True, **lists},
            {},
        ),
    ]


def all_kernels() -> set[str]:
    """Names of the kernels in the package."""
    found = set()
    for module in pkgutil.iter_modules(seqjepa.kernels.__path__):
        members = vars(importlib.import_module(f"seqjepa.kernels.{module.name}"))
        found |= {name for name, value in members.items() if isinstance(value, triton.JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


def resources(kernel, types: str, constants: dict, options: dict, architecture: int) -> dict[str, int]:
    """Registers and bytes of spills a thread, bytes of shared memory a program."""
    arguments = iter(types.split())
    signature = {name: "constexpr" if name in constants else next(arguments) for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(inspect.getfile(CUDABackend)).parent / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text.stdout + text.stderr)
    registers, stack, local = map(int, usage.groups())
    return {"registers": registers, "spills": stack + local, "shared": compiled.metadata.shared}


def main() -> None:
    measured, covered = {}, set()
    for architecture in ARCHITECTURES:
        for kernel, *launch in manifest(architecture):
            measured[f"{kernel.__name__} sm_{architecture}"] = resources(kernel, *launch, architecture)
            covered.add(kernel.__name__)
    if "--write" in sys.argv:
        BUDGET.write_text(json.dumps({"triton": triton.__version__, "kernels": measured}, indent=1) + "\n")
    print(json.dumps({"measured": measured, "missing": sorted(all_kernels() - covered)}))


if __name__ == "__main__":
    main()
