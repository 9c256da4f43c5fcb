"""A whole training step in a CUDA graph, replayed while decay, alpha, seed and learning rate change."""

import copy
import gc
import shutil
import sys
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn

from seqjepa.kernels import AdamWEMA, coding_rate, ema_update_, sigreg
from seqjepa.kernels.internal import multi_tensor

gpu = pytest.mark.gpu


class Step:
    """Loss, gradient, optimiser and teacher of a small network, driven by device scalars."""

    def __init__(self, fused: bool, set_to_none: bool = False):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 48)).cuda()
        self.teacher = copy.deepcopy(self.model).requires_grad_(False)
        self.decay = torch.tensor(0.9, dtype=torch.float64, device="cuda")
        self.alpha, self.lr = torch.tensor([1.0, 1e-2], device="cuda").unbind()
        self.seed = torch.zeros((), dtype=torch.int64, device="cuda")
        self.images = torch.randn(96, 20, device="cuda")
        self.fused, self.set_to_none = fused, set_to_none
        if fused:
            pairs = zip(self.model.parameters(), self.teacher.parameters(), strict=True)
            self.optimizer = AdamWEMA(self.model.parameters(), lr=self.lr, ema_decay=self.decay, teacher=pairs)
        else:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.lr, fused=True, capturable=True)

    def __call__(self) -> torch.Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            z = self.model(self.images)
        loss = sigreg(z, num_slices=128, seed=self.seed) - 0.01 * coding_rate(z, alpha=self.alpha)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        if not self.fused:
            ema_update_(self.teacher, self.model, self.decay)
        return loss.detach()

    def schedule(self, number: int) -> None:
        self.decay.fill_(1 - 0.1 / (number + 1))
        self.alpha.fill_(1.0 + number)
        self.lr.fill_(1e-2 / (number + 1))
        self.seed.fill_(number)


@gpu
@pytest.mark.parametrize("set_to_none", [True, False])  # gradients made in the graph's own memory, or before
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_is_captured_and_follows_its_schedules(fused, set_to_none):
    eager, captured = Step(fused, set_to_none), Step(fused, set_to_none)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for number in range(3):  # warm-up, as for any capture; the other makes the same steps
            captured.schedule(number)
            captured()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = captured()
    for number in range(3):
        eager.schedule(number)
        eager()
    for number in range(3, 8):
        for step in (eager, captured):
            step.schedule(number)
        expected = eager()
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(captured.teacher.parameters(), eager.teacher.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@gpu
def test_nothing_waits_for_the_device():
    step = Step(fused=True)
    for number in range(2):
        step.schedule(number)
        step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        for rows, width in ((300, 640), (640, 300), (40, 24)):
            z = torch.randn(rows, width, device="cuda", requires_grad=True)
            rate, _ = coding_rate(z, eps=0.05, return_info=True)
            rate.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@gpu
def test_captures_on_new_tensors():
    """The graph itself sends their addresses, from memory of its own: a step on other tensors has loaded the kernel."""
    decay = torch.tensor(0.5, dtype=torch.float64, device="cuda")
    ema_update_([torch.zeros(1, device="cuda")], [torch.ones(1, device="cuda")], decay)
    kept = []
    for size in range(1, 6):
        teacher = [torch.zeros(size, device="cuda") for _ in range(2000)]
        student = [torch.ones(size, device="cuda") for _ in range(2000)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ema_update_(teacher, student, decay)
        kept.append((graph, teacher, student))
    for expected in (0.5, 0.75):
        for graph, teacher, _ in kept:
            graph.replay()
            assert (torch.cat(teacher) == expected).all()


def test_a_capture_takes_the_table_of_the_warm_up_and_holds_it(monkeypatch):
    """One that left the cache could be overwritten while the graph is still replayed."""
    device, capturing, stream = torch.device("cuda", 0), [False], [1]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: stream[0], raising=False)
    monkeypatch.setattr(multi_tensor, "_kept", OrderedDict())
    monkeypatch.setattr(multi_tensor, "KEPT", 2)

    class Made:
        """Of which there can be weak references."""

    written = [torch.zeros(3)]

    def kept(number):
        return multi_tensor.kept((number,), device, written[0], Made)

    first, unused = kept(1), weakref.ref(kept(2))
    assert kept(1) is first
    capturing[0], stream[0] = True, 2
    assert kept(1) is first
    own = kept(3)
    assert kept(3) is not own  # each graph makes what no warm-up has made
    capturing[0] = False
    assert kept(1) is not first, "a copy is ordered on its own stream only"
    first = weakref.ref(first)
    kept(4)
    kept(5)
    gc.collect()
    assert unused() is None
    assert first() is not None
    written[0] = written[0].detach()
    gc.collect()
    assert first() is not None
    written.clear()
    gc.collect()
    assert first() is None


@gpu
@pytest.mark.skipif(shutil.which("compute-sanitizer") is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer_finds_nothing(tool, run_process):
    script = """
import torch
from seqjepa.kernels import AdamWEMA, coding_rate, ema_update_, sigreg

for shape in ((33, 40), (2, 70, 20), (200, 300), (1100, 17)):
    z = torch.randn(shape, device="cuda", requires_grad=True)
    torch.autograd.grad(coding_rate(z, eps=0.5).sum(), z)
    torch.autograd.grad(sigreg(z, num_slices=40, seed=0).sum(), z)
parameters = [torch.nn.Parameter(torch.randn(n, device="cuda")) for n in (1, 2048, 5000)]
for p in parameters:
    p.grad = torch.randn_like(p)
optimizer = AdamWEMA(parameters)
optimizer.step()
decay = torch.tensor(0.9, device="cuda")
ema_update_([optimizer.teacher_of(p) for p in parameters], parameters, decay)
torch.cuda.synchronize()
"""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", script]
    result = run_process(*command, timeout=1200)
    assert result.returncode == 0, result.stdout[-4000:]
