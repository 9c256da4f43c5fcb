"""Every kernel keeps to its budget: its binaries for every GPU, and the bytes that it moves; no GPU is needed."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import triton

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is for Linux")
HERE = Path(__file__).parent
COMMITTED = json.loads((HERE / "budget.json").read_text())
AT_MOST = {"registers": 1.1, "spills": 1.0, "shared": 1.0, "barriers": 1.0}
AT_LEAST = {"programs": 1.0, "warps": 1.0, "load": 0.9, "store": 0.9}  # one more scalar is no loss of vectors


@pytest.fixture
def aot(monkeypatch):
    monkeypatch.syspath_prepend(HERE)
    return importlib.import_module("aot")


def reported(result) -> dict:
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["missing"] == [], "kernels that the script leaves out"
    return report["measured"]


def test_every_kernel_compiles_within_its_budget(run_process):
    measured = reported(run_process(sys.executable, "tests/kernels/aot.py", timeout=1500))
    assert measured.keys() == COMMITTED["kernels"].keys()
    same_compiler = triton.__version__ == COMMITTED["triton"]
    for name, used in measured.items():
        budget = COMMITTED["kernels"][name]
        assert used["programs"] >= 1, f"{name}: a program does not fit on a multiprocessor"
        assert used["spills"] <= 24, f"{name} spills {used['spills']} bytes"
        assert used["products"] or not budget["products"], f"{name} no longer uses {budget['products']}"
        if same_compiler:
            for limits, sign, word in ((AT_MOST, 1, "at most"), (AT_LEAST, -1, "at least")):
                for what, slack in limits.items():
                    within = sign * used[what] <= sign * slack * budget[what]
                    assert within, f"{name}: {what} {used[what]}, {word} {budget[what]}"
            missing = set(budget["products"]) - set(used["products"])
            assert not missing, f"{name} no longer uses {missing}"


def test_no_kernel_moves_more_bytes_than_its_budget(run_process):
    measured = reported(run_process(sys.executable, "tests/kernels/traffic.py"))
    assert measured.keys() == COMMITTED["traffic"].keys()
    for name, used in measured.items():
        budget = COMMITTED["traffic"][name]
        assert used["bytes"] <= budget["bytes"], f"{name}: {used['bytes']} bytes, at most {budget['bytes']}"
        assert used["of_needed"] >= 1, name
    # teacher and student are read, the teacher written; and parameter, gradient, two moments and teacher are read, all
    # but the gradient written; beyond the elements there are addresses and scalars
    for name, each in (("ema._ema_kernel, average", 12), ("adamw_step._adamw_ema_kernel, step", 36)):
        assert each * 15300 < measured[f"{name} of 15,300"]["bytes"] < 1.01 * each * 15300
    causal = [
        used["of_needed"] for name, used in measured.items() if name.startswith("causal_statistics._causal_kernel")
    ]
    assert causal == [1.0], "tokens are read and written once"


@pytest.mark.parametrize(
    ("registers", "warps", "shared", "architecture", "programs"),
    [
        (32, 4, 0, 90, 16),  # all 64 warps, or all 48
        (32, 4, 0, 86, 12),
        (16, 1, 0, 90, 32),  # all programs
        (16, 1, 0, 86, 16),
        (128, 8, 0, 90, 2),  # 65,536 registers for 256 threads of 128 each
        (33, 4, 0, 90, 12),  # 40 registers a thread, because a warp gets a multiple of 256
        (255, 4, 0, 80, 2),
        (32, 4, 99 * 1024, 86, 1),  # the largest program on a GeForce, on an A100 and on an H100
        (32, 4, 99 * 1024 + 1, 120, 0),
        (32, 4, 163 * 1024, 80, 1),
        (32, 4, 227 * 1024, 90, 1),
        (32, 4, 20 * 1024, 90, 10),  # 21 KiB each
    ],
)
def test_the_occupancy_is_that_of_cudas_rules(registers, warps, shared, architecture, programs, aot):
    assert aot.occupancy(registers, warps, shared, aot.ARCHITECTURES[architecture]) == (programs, programs * warps)


def test_widths_and_products_are_read_from_instructions(aot):
    ptx = """
    @%p1 ld.global.L1::evict_last.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    ld.global.b64 { %rd2 }, [ %rd3 + 0 ];
    cp.async.cg.shared.global [ %r24 + 0 ], [ %rd30 + 0 ], 0x10, %r25;
    cp.async.ca.shared.global [ %r24 + 0 ], [ %rd30 + 0 ], 0x8, %r25;
    ld.shared.v4.b32 {%r5, %r6, %r7, %r8}, [%r9];
    @%p2 st.global.v2.b16 [ %rd4 + 0 ], { %rs1, %rs2 };
    """
    assert aot.widths(ptx) == {"load": 12.0, "store": 4.0}
    assert aot.widths("") == {"load": 0.0, "store": 0.0}
    assert aot.products(ptx) == []
    ptx = """
    wgmma.mma_async.sync.aligned.m64n32k8.f32.tf32.tf32 {%r1}, %rd1, %rd2, p, 1, 1;
    wgmma.fence.sync.aligned;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %r1 }, { %r2 }, { %r3 }, { %r4 };
    @%p1 tcgen05.mma.cta_group::1.kind::tf32 [ %r1 + 0 ], %rd1, %rd2, %r2, %p2;
    """
    assert aot.products(ptx) == ["mma bf16", "tcgen05 tf32", "wgmma tf32"]
