"""What the kernels' tests share: devices, memory that is not zero by luck, and a count of launches.

The tests marked `triton` run three times: on torch's references, on a GPU (`make test-gpu`), and under
TRITON_INTERPRET=1, where a CPU tensor takes the Triton kernels (test_interpreter.py starts that).
"""

from __future__ import annotations

import collections
import importlib
import pkgutil

import pytest
import torch
import torch._dynamo.trace_rules

import seqjepa.kernels
from seqjepa.kernels.internal import backend

# torch remembers its constructors when `with torch.device(...)` first looks at them: before a test patches one
torch.utils._device._device_constructors()

LAUNCHES: collections.Counter[str] = collections.Counter()


def kernel_names() -> set[str]:
    """Names of the kernels in the package."""
    modules = pkgutil.walk_packages(seqjepa.kernels.__path__, "seqjepa.kernels.")
    return {name for m in modules for name in vars(importlib.import_module(m.name)) if name.endswith("_kernel")}


if backend.INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self, *args, **kwargs):
        LAUNCHES[self.fn.__name__] += 1
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted


def pytest_configure(config):
    if backend.INTERPRETED:  # NumPy computes the kernels there, and says so where a test hands it a NaN
        config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning")
        config.addinivalue_line("filterwarnings", "ignore:Conversion of an array with ndim:DeprecationWarning")  # 3.6


def pytest_sessionfinish(session, exitstatus):
    """The interpreter's run fails if a kernel was not launched."""
    if backend.INTERPRETED and exitstatus == 0 and (missing := kernel_names() - LAUNCHES.keys()):
        print(f"\nnever launched: {', '.join(sorted(missing))}")
        session.exitstatus = 1


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def launches() -> collections.Counter[str]:
    """How often each kernel has been launched in Triton's interpreter."""
    return LAUNCHES


@pytest.fixture(autouse=True)
def _nothing_is_zero_by_luck(monkeypatch, request):
    """Memory that a kernel gets uninitialised holds NaN, as in production it may."""
    if "compiles" in request.node.name:
        yield  # torch.compile does not trace through the patch
        return
    empty, rules = torch.empty, torch._dynamo.trace_rules

    def poisoned(function):
        def allocate(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if type(tensor) is torch.Tensor and not torch.compiler.is_compiling():
                if tensor.is_floating_point():
                    tensor.fill_(float("nan"))
                elif tensor.dtype in (torch.int32, torch.int64):
                    tensor.fill_(-(2**30))
            return tensor

        return allocate

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    yield
    # torch.compile has its own list of torch's functions, and would miss the true one in later tests
    if rules.get_torch_obj_rule_map.cache_info().currsize and empty not in rules.get_torch_obj_rule_map():
        rules.clear_lru_cache()
