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
from seqjepa.kernels import adamw_ema, causal_statistics, directions, ema
from seqjepa.kernels import token_statistics as statistics
from seqjepa.kernels.internal import cholesky, matmul, multi_tensor

sigreg = importlib.import_module("seqjepa.kernels.sigreg")  # the package exports a function of that name

BUDGET = Path(__file__).with_name("budget.json")
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
TF32X3 = (80, 90, 100)  # where backend.dot_precision chooses it


def manifest(architecture: int) -> dict[str, tuple]:
    """What production launches: kernel, types of its arguments, constants, options. The names are the budget's."""
    precision = {"PRECISION": "tf32x3" if architecture in TF32X3 else "ieee"}
    lists = {"ALIGNED": True, "PIECE": multi_tensor.PIECE, "BLOCK": 1024}
    own = {"PARAMETER": tl.float32, "GRAD": tl.float32, "TEACHER": tl.float32}
    pair = {"TEACHER": tl.float32, "STUDENT": tl.float32, "LIVE": tl.bfloat16}
    gemm = {**precision, **matmul.MATMUL_BLOCKS, "stride_ak": 1, "stride_bn": 1}
    gram = {**precision, **matmul.GRAM_BLOCKS}
    factor = "*fp32 *fp32 *fp32 *i32 i32"
    average = "*i64 *i32 *fp64 *fp32"
    step = "*i64 *i32 *fp32 *fp64 *fp64 *fp64 *fp32 *fp32"
    one_stage = {"num_stages": 1}
    sizes, tile = " i32 i32 i32", statistics.blocks(4, 160)  # of the paper's tokens: features and an action
    chunk, warps = causal_statistics.plan(4, 160)
    chunk |= {"SMALLEST": statistics.SMALLEST, "FLOOR": statistics.FLOOR}
    return {
        "matmul": (matmul._matmul_kernel, "*fp32 " * 4 + "i32 " * 7, {"SCALED": True, **gemm}, matmul.OPTIONS),
        "matmul bf16": (
            matmul._matmul_kernel,
            "*bf16 *fp32 *fp32 *fp32" + " i32" * 7,
            {"SCALED": False, **gemm},
            matmul.OPTIONS,
        ),
        "gram": (
            matmul._gram_kernel,
            "*fp32 " * 3 + "i32 " * 4,
            {"IDENTITY": True, "stride_yk": 1, **gram},
            matmul.OPTIONS,
        ),
        "gram of columns": (
            matmul._gram_kernel,
            "*fp32 " * 3 + "i32 " * 4,
            {"IDENTITY": False, "stride_yn": 1, **gram},
            matmul.OPTIONS,
        ),
        "cholesky": (cholesky._cholesky_kernel, factor, {"INVERSE": True, **cholesky.BLOCKS}, one_stage),
        "cholesky alone": (cholesky._cholesky_kernel, factor, {"INVERSE": False, **cholesky.BLOCKS}, one_stage),
        "directions": (directions._directions_kernel, "*i64 *fp32 i32 i32", directions.BLOCKS, {}),
        "moments": (
            sigreg._moments_kernel,
            "*fp32 *fp32 i32 i32 i32 fp32",
            {"BETWEEN": False, "BLOCK_P": 16, **sigreg.MOMENTS_BLOCKS},
            {},
        ),
        "projection gradient": (
            sigreg._projection_gradient_kernel,
            "*fp32 *fp32 *fp32 i32 i32 i32 fp32",
            {"BETWEEN": False, **sigreg.GRADIENT_BLOCKS},
            {},
        ),
        "token moments": (statistics._moments_kernel, "*bf16 *fp32" + sizes, tile, {}),
        "token weights": (
            statistics._weights_kernel,
            "*bf16 *fp32 *fp32 *fp32 *fp32 *fp32" + sizes,
            {"SMALLEST": statistics.SMALLEST, **tile},
            {},
        ),
        "token output": (statistics._output_kernel, "*bf16 *fp32 *fp32 *bf16" + sizes, tile, {}),
        "token products": (statistics._products_kernel, "*bf16 *bf16 *fp32 *fp32" + sizes, tile, {}),
        "token scores": (statistics._scores_gradient_kernel, "*bf16 *bf16" + " *fp32" * 7 + sizes, tile, {}),
        "token gradient": (
            statistics._tokens_gradient_kernel,
            "*bf16 *bf16" + " *fp32" * 6 + " *bf16" + sizes,
            tile,
            {},
        ),
        "causal tokens": (causal_statistics._causal_kernel, "*bf16 *fp32 *bf16 *fp32 *fp32" + sizes, chunk, warps),
        "causal gradient": (
            causal_statistics._causal_gradient_kernel,
            "*bf16 *bf16 *fp32 *fp32 *fp32 *bf16 *fp32" + sizes,
            chunk,
            warps,
        ),
        "ema": (ema._ema_kernel, average, {"LISTS": 2, "SKIP": False, **pair, **lists}, {}),
        "ema and live copy": (ema._ema_kernel, average, {"LISTS": 3, "SKIP": True, **pair, **lists}, {}),
        "advance": (
            adamw_ema._advance_kernel,
            "*i64 *fp32 *fp64 *fp64 *fp32 i32",
            {"COLUMNS": 8, "FOUND_INF": True, "BLOCK": 128},
            {},
        ),
        "adamw_ema": (
            adamw_ema._adamw_ema_kernel,
            step,
            {"COLUMNS": 8, "TAUGHT": True, "FOUND_INF": False, "GRAD_SCALE": False, **own, **lists},
            {},
        ),
        "adamw_ema with a scaler": (
            adamw_ema._adamw_ema_kernel,
            step,
            {"COLUMNS": 8, "TAUGHT": True, "FOUND_INF": True, "GRAD_SCALE": True, **own, **lists},
            {},
        ),
    }


def all_kernels() -> set[str]:
    """Names of the kernels in the package."""
    found = set()
    for module in pkgutil.walk_packages(seqjepa.kernels.__path__, "seqjepa.kernels."):
        members = vars(importlib.import_module(module.name))
        found |= {name for name, value in members.items() if isinstance(value, triton.JITFunction)}
    return {name for name in found if name.endswith("_kernel")}


def resources(kernel, types: str, constants: dict, options: dict, architecture: int, aligned: bool) -> dict[str, int]:
    """Registers and bytes of spills a thread, bytes of shared memory a program.

    `aligned`: whether pointers and integers are multiples of 16, for which Triton compiles a kernel of its own.
    """
    arguments = iter(types.split())
    signature = {name: "constexpr" if name in constants else next(arguments) for name in kernel.arg_names}
    attributes = {
        (number,): [["tt.divisibility", 16]]
        for number, name in enumerate(kernel.arg_names)
        if aligned and signature[name] != "constexpr" and not signature[name].startswith("fp")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
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
        for name, (kernel, *launch) in manifest(architecture).items():
            measured[f"{name} sm_{architecture}"] = resources(kernel, *launch, architecture, aligned=True)
            covered.add(kernel.__name__)
            if architecture in (86, 90):
                odd = resources(kernel, *launch, architecture, aligned=False)
                measured[f"{name}, odd sizes sm_{architecture}"] = odd
    if "--write" in sys.argv:
        BUDGET.write_text(json.dumps({"triton": triton.__version__, "kernels": measured}, indent=1) + "\n")
    print(json.dumps({"measured": measured, "missing": sorted(all_kernels() - covered)}))


if __name__ == "__main__":
    main()
