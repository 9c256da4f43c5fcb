"""Compile every kernel for every supported GPU, on a machine without one, and print what the binaries need and do.

Run by test_aot.py in a process of its own (it cannot work under TRITON_INTERPRET=1); by hand, with `--write`, it
renews budget.json. Of each binary are recorded:

    registers, spills  a thread's registers, and bytes that it spills
    shared             bytes of shared memory of a program
    programs, warps    that a multiprocessor holds at a time: its occupancy
    load, store        bytes that a thread moves by an access to global memory, on average over the instructions; it
                       falls if one of several tensors is no longer read or written in vectors
    barriers           instructions at which the threads of a program wait for each other
    products           kinds of tensor-core instructions; products in IEEE float32 have none
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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns where it is unset

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import ASTSource

import seqjepa.kernels
from seqjepa.kernels import adamw_step, causal_statistics, characteristic, directions, ema
from seqjepa.kernels import token_statistics as statistics
from seqjepa.kernels.internal import cholesky, matmul, multi_tensor, rows

BUDGET = Path(__file__).with_name("budget.json")


class Multiprocessor(NamedTuple):
    """What a multiprocessor holds at most: warps, programs, and bytes of shared memory."""

    warps: int
    programs: int
    shared: int


# from the CUDA C++ programming guide's table of compute capabilities; each has 65,536 registers, in four partitions
ARCHITECTURES = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}
PRODUCTS = r"(wgmma|mma|tcgen05)\.(?:(?:mma_async|sync)\S*\.m\d+n\d+k\d+(?:\.row\.col)?\.\w+\.|mma\S*kind::)(\w+)"
ACCESS = r"\b(ld|st)\.(?:\w+\.)*global(?:\.\w+::\w+)*(?:\.v(\d))?\.[a-z]+(\d+)"
BARRIER = r"\b(?:bar|barrier)\.sync\b"
COPY = r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], 0x(\w+)"


def manifest(architecture: int) -> dict[str, tuple]:
    """What production launches: kernel, types of its arguments, constants, options. The names are the budget's."""
    capability = divmod(architecture, 10)
    lists = {"ALIGNED": True, "PIECE": multi_tensor.PIECE}
    own = {"PARAMETER": tl.float32, "GRAD": tl.float32, "TEACHER": tl.float32}
    pair = {"TEACHER": tl.float32, "STUDENT": tl.float32, "LIVE": tl.bfloat16}
    factor = "*fp32 *fp32 *i32 i32"
    inverse = "*fp32 *fp32 *fp32 i32 i32"
    average = "*i64 *i32 *fp64 *fp32"
    step = "*i64 *i32 *fp32 *fp64 *fp64 *fp64 *fp32 *fp32"
    stripes, columns = dict(cholesky.STRIPES), dict(rows.COLUMNS)
    of_stripes, of_columns = ({"num_warps": shape.pop("num_warps")} for shape in (stripes, columns))
    one_stage, eight = {"num_stages": 1}, {"num_warps": 8}
    sizes, tile = " i32 i32 i32", statistics.blocks(4, 160)  # of the paper's tokens: features and an action
    chunk, warps = causal_statistics.plan(4, 160)
    chunk |= {"SMALLEST": statistics.SMALLEST, "FLOOR": statistics.FLOOR}

    def product(first: str, shape: matmul.Shape, scaled: bool) -> tuple:
        constants = {"SCALED": scaled, "stride_ak": 1, "stride_bn": 1, "HALVES": True, **shape}
        options = {"num_warps": constants.pop("num_warps")}
        return matmul._matmul_kernel, f"{first} *fp32 *fp32 *fp32" + " i32" * 9, constants, options

    def gram(first: str, **constants) -> tuple:
        constants |= {"CHECKED": not constants["IDENTITY"], "HALVES": True, **matmul.gram_shape(capability)}
        options = {"num_warps": constants.pop("num_warps")}
        return matmul._gram_kernel, f"{first} *fp32 *i32 *fp32 fp32" + " i32" * 5, constants, options

    square = "{BLOCK_M} x {BLOCK_N}".format(**matmul.gram_shape(capability))
    found = {
        f"gram, {square}": gram("*fp32", IDENTITY=True, WHOLE=True, stride_yk=1),
        f"gram of columns, {square}": gram("*fp32", IDENTITY=False, WHOLE=True, stride_yn=1),
        f"gram of bf16 columns in parts, {square}": gram("*bf16", IDENTITY=False, WHOLE=False, stride_yn=1),
        "total of parts": (
            matmul._total_kernel,
            "*fp32 *fp32 *i32 *fp32 fp32 i32 i32",
            {"IDENTITY": True, "CHECKED": False, "BLOCK_N": 32},
            {},
        ),
        "centred columns": (
            rows._centered_kernel,
            "*fp32 *fp32 *fp64 i32 i32 i32 i32",
            {"stride_zd": 1, **columns},
            of_columns,
        ),
        "sums of columns": (rows._sums_kernel, "*fp32 *fp64 i32 i32 i32 i32", {"stride_zd": 1, **rows.BLOCKS}, {}),
        "centred rows": (
            rows._rows_kernel,
            "*fp32 *fp64 *fp32 *fp32 *fp64" + " i32" * 6,
            {"stride_zd": 1, "CENTER": True, "WEIGHTED": False, "MEAN": True, "ROOT": 0, **rows.BLOCKS},
            {},
        ),
        "cholesky": (cholesky._factor_kernel, factor, cholesky.BLOCKS, one_stage),
        "leaves": (cholesky._leaves_kernel, "*fp32 *fp32 i32 i32", {"stride_row": 1}, {"num_warps": 1}),
        "inverse": (
            cholesky._inverse_kernel,
            inverse,
            {"SPAN": 0, "KNOWN": False, "ROWS": 16, "stride_column": 1, **cholesky.BLOCKS},
            one_stage,
        ),
        "inverse of a library's blocks": (
            cholesky._inverse_kernel,
            inverse,
            {"SPAN": 64, "KNOWN": False, "ROWS": 16, "stride_row": 1, **cholesky.BLOCKS},
            one_stage,
        ),
        "library's inverse by its blocks": (
            cholesky._inverse_kernel,
            inverse,
            {"SPAN": 0, "KNOWN": True, "stride_row": 1, **stripes},
            {**of_stripes, **one_stage},
        ),
        "log-determinant": (cholesky._logdet_kernel, "*fp32 *i32 *fp32 i32", {"BLOCK": 256}, {}),
        "directions": (directions._directions_kernel, "*i64 *fp32 i32 i32", directions.BLOCKS, {}),
        "moments": (
            characteristic._moments_kernel,
            "*fp32 *fp32 i32 i32 i32 fp32",
            {"BETWEEN": False, "BLOCK_P": 16, **characteristic.MOMENTS_BLOCKS},
            {},
        ),
        "statistic": (
            characteristic._statistic_kernel,
            "*fp32 *fp32 *fp32 i32 i32 i32 i32 fp32",
            {"BETWEEN": False, "BLOCK_P": 16, "BLOCK_K": characteristic.STATISTIC_BLOCK},
            {},
        ),
        "projection gradient": (
            characteristic._projection_gradient_kernel,
            "*fp32 *fp32 *fp32 *fp32 i32 i32 i32 fp32",
            {"BETWEEN": False, **characteristic.GRADIENT_BLOCKS},
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
        "ema": (ema._ema_kernel, average, {"LISTS": 2, "SKIP": False, **pair, **lists}, eight),
        "ema and live copy": (ema._ema_kernel, average, {"LISTS": 3, "SKIP": True, **pair, **lists}, eight),
        "advance": (
            adamw_step._advance_kernel,
            "*i64 *fp32 *fp64 *fp64 *fp32 i32",
            {"COLUMNS": 8, "FOUND_INF": True, "BLOCK": 128},
            {},
        ),
        "adamw_ema": (
            adamw_step._adamw_ema_kernel,
            step,
            {"COLUMNS": 8, "TAUGHT": True, "FOUND_INF": False, "GRAD_SCALE": False, **own, **lists},
            eight,
        ),
        "adamw_ema with a scaler": (
            adamw_step._adamw_ema_kernel,
            step,
            {"COLUMNS": 8, "TAUGHT": True, "FOUND_INF": True, "GRAD_SCALE": True, **own, **lists},
            eight,
        ),
    }
    for shape in matmul.product_shapes(capability):
        tile = f"{shape['BLOCK_M']} x {shape['BLOCK_N']}"
        found |= {
            f"matmul, {tile}": product("*fp32", shape, True),
            f"matmul of bf16 and fp32, {tile}": product("*bf16", shape, False),
        }
    return found


def all_kernels() -> set[str]:
    """Names of the kernels in the package, as `full_name` gives them."""
    found = set()
    for module in pkgutil.walk_packages(seqjepa.kernels.__path__, "seqjepa.kernels."):
        members = vars(importlib.import_module(module.name)).items()
        found |= {full_name(value) for name, value in members if name.endswith("_kernel") and hasattr(value, "fn")}
    return found


def full_name(kernel) -> str:
    """Name of a kernel with its module, since two modules may have kernels of one name."""
    return f"{kernel.fn.__module__.removeprefix('seqjepa.kernels.')}.{kernel.fn.__name__}"


def occupancy(registers: int, warps: int, shared: int, most: Multiprocessor) -> tuple[int, int]:
    """Programs and warps that fit on a multiprocessor at a time.

    Args:
        registers: of a thread; a warp gets them in units of 256, from the partition that it runs on.
        warps: of a program.
        shared: bytes of a program; it gets them in units of 128, and the system keeps 1 KiB more for it.
        most: what the multiprocessor holds.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (65536 // 4 // of_warp) // warps
    by_shared = most.shared // (-(-shared // 128) * 128 + 1024)
    programs = min(most.programs, most.warps // warps, by_registers, by_shared)
    return programs, programs * warps


def products(ptx: str) -> list[str]:
    """Kinds of tensor-core instructions and the types of what they multiply, such as `wgmma tf32`."""
    return sorted({" ".join(kind) for kind in re.findall(PRODUCTS, ptx)})


def widths(ptx: str) -> dict[str, float]:
    """Bytes that a thread moves by a load from global memory and by a store to it, on average; 0 if there is none."""
    found = {"ld": [int(width, 16) for width in re.findall(COPY, ptx)], "st": []}
    for way, count, bits in re.findall(ACCESS, ptx):
        found[way].append(int(count or 1) * int(bits) // 8)
    load, store = (round(sum(sizes) / max(len(sizes), 1), 1) for sizes in found.values())
    return {"load": load, "store": store}


def resources(kernel, types: str, constants: dict, options: dict, architecture: int, aligned: bool) -> dict:
    """What the module's docstring lists, of one binary.

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
    shared, ptx = compiled.metadata.shared, compiled.asm["ptx"]
    programs, warps = occupancy(registers, compiled.metadata.num_warps, shared, ARCHITECTURES[architecture])
    return {
        "registers": registers, "spills": stack + local, "shared": shared, "programs": programs, "warps": warps,
        **widths(ptx), "barriers": len(re.findall(BARRIER, ptx)), "products": products(ptx),
    }  # fmt: skip


def binaries() -> Iterator[tuple[str, int, bool]]:
    """Name in the manifest, architecture, and whether sizes are aligned, of each binary."""
    for architecture in ARCHITECTURES:
        for name in manifest(architecture):
            yield name, architecture, True
            if architecture in (86, 90):
                yield name, architecture, False


def measure(binary: tuple[str, int, bool]) -> tuple[str, dict]:
    """The binary's name in the budget, and its resources."""
    name, architecture, aligned = binary
    found = resources(*manifest(architecture)[name], architecture, aligned)
    return f"{name}{'' if aligned else ', odd sizes'} sm_{architecture}", found


def main() -> None:
    with ProcessPoolExecutor() as pool:  # Triton compiles in Python for the most part: threads would take turns
        measured = dict(pool.map(measure, binaries()))
    covered = {full_name(kernel) for architecture in ARCHITECTURES for kernel, *_ in manifest(architecture).values()}
    if "--write" in sys.argv:
        renew({"triton": triton.__version__, "kernels": measured})
    print(json.dumps({"measured": measured, "missing": sorted(all_kernels() - covered)}))


def renew(parts: dict) -> None:
    """Write these parts of budget.json."""
    BUDGET.write_text(json.dumps(json.loads(BUDGET.read_text()) | parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
