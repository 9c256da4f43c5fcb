"""AdamW with its teacher in one pass, against torch.optim.AdamW and the average's formula in float64."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from networks import give_gradients, parameters
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from seqjepa.kernels._ops import ops
from seqjepa.kernels.adamw_ema import AdamWEMA
from seqjepa.kernels.adamw_step import adamw_ema_, adamw_ema_reference
from seqjepa.kernels.internal.backend import INTERPRETED

triton = pytest.mark.triton


@triton
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_equals_adamw_and_lerp(betas, device):
    settings = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1}
    ours, exact = parameters(device), [p.detach().double().requires_grad_() for p in parameters(device)]
    teacher = [p.detach().clone() for p in ours]
    exact_teacher = [t.double() for t in teacher]
    optimizer = AdamWEMA(ours, **settings, ema_decay=0.9, teacher=zip(ours, teacher, strict=True))
    torchs = torch.optim.AdamW(exact, **settings)
    addresses = [t.data_ptr() for t in teacher]
    for step in range(6):
        give_gradients(ours, step)
        for p, e in zip(ours, exact, strict=True):
            e.grad = p.grad.double()
        optimizer.step()
        torchs.step()
        exact_teacher = [0.9 * t + 0.1 * e.detach() for t, e in zip(exact_teacher, exact, strict=True)]
    for p, e, t, et in zip(ours, exact, teacher, exact_teacher, strict=True):
        # a step moves by lr at most; its float32 quotient is good to some roundings, the sum to one of the parameter
        torch.testing.assert_close(p.double(), e, rtol=0, atol=6 * (1e-2 * 1e-5 + 2**-22))
        torch.testing.assert_close(t.double(), et, rtol=0, atol=6 * (1e-2 * 1e-5 + 2**-22))
    assert addresses == [t.data_ptr() for t in teacher]


@triton
def test_one_step_is_the_formula(device):
    p, t = nn.Parameter(torch.randn(50, device=device)), torch.randn(50, device=device)
    p.grad = torch.randn(50, device=device)
    expected = adamw_ema_reference(
        p.detach().double(), p.grad.double(), 0.0, 0.0, 1, t.double(),
        lr=0.1, beta1=0.9, beta2=0.999, eps=1e-3, weight_decay=0.5, ema_decay=0.25,
    )  # fmt: skip
    optimizer = AdamWEMA([p], lr=0.1, eps=1e-3, weight_decay=0.5, ema_decay=0.25, teacher=[(p, t)])
    optimizer.step()
    state = optimizer.state[p]
    for got, want in zip((p, state["exp_avg"], state["exp_avg_sq"], t), expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-7)


@triton
def test_the_first_correction_does_not_cancel(device):
    """1 - 0.999 in float32 has four digits; the step would be off by 3e-5."""
    p = nn.Parameter(torch.zeros(8, device=device))
    p.grad = torch.full((8,), 0.5, device=device)
    AdamWEMA([p], lr=1.0, eps=0.0, weight_decay=0.0).step()
    torch.testing.assert_close(p.detach(), -torch.ones(8, device=device), rtol=1e-6, atol=0)


@triton
def test_half_precision_parameters_with_a_wide_teacher(device):
    ours = parameters(device, torch.bfloat16)
    optimizer = AdamWEMA(ours, lr=1e-2, ema_decay=0.99)
    give_gradients(ours, 0)
    before = [p.detach().clone() for p in ours]
    optimizer.step()
    for p, b in zip(ours, before, strict=True):
        teacher = optimizer.teacher_of(p)
        assert teacher.dtype == torch.float32
        torch.testing.assert_close(teacher, 0.99 * b.float() + 0.01 * p.detach().float(), rtol=1e-6, atol=1e-6)
        step = 2**-7 if INTERPRETED else 2**-8  # its conversion truncates, a GPU's and torch's rounds
        exact = b.double() * (1 - 1e-4) - 1e-2 * p.grad.double().sign()
        torch.testing.assert_close(p.detach().double(), exact, rtol=step, atol=1e-2 * 2 * step)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert optimizer.teacher_of(ours[0]).dtype == torch.float32  # torch's loading would have narrowed it
    assert torch.equal(optimizer.teacher_of(ours[4]), saved["state"][4]["ema"])


@triton
def test_gradient_scaler(device):
    """Unscales in the step; an infinite gradient skips parameters, moments, step count and teacher."""
    ours, plain = parameters(device), parameters(device)
    optimizer = AdamWEMA(ours, lr=1e-2, ema_decay=0.5)
    reference = AdamWEMA(plain, lr=1e-2, ema_decay=0.5)
    scaler = torch.amp.GradScaler(device.type, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=device))  # it makes its scale where it first sees a tensor
    for step in range(3):
        give_gradients(ours, step, scale=1024.0)
        give_gradients(plain, step)
        if step == 1:
            ours[2].grad[0, 0] = float("inf")
            before = [(p.detach().clone(), optimizer.teacher_of(p).clone()) for p in ours]
        scaler.step(optimizer)
        if step == 1:
            for p, (value, teacher) in zip(ours, before, strict=True):
                assert torch.equal(p, value)
                assert torch.equal(optimizer.teacher_of(p), teacher)
                assert optimizer.state[p]["step"] == 1
        else:
            reference.step()
        scaler.update(1024.0)
    for p, q in zip(ours, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(optimizer.teacher_of(p), reference.teacher_of(q), rtol=1e-6, atol=1e-7)


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
def test_layouts(device):
    """Channels-last parameters; a teacher in another layout; a gradient in another layout."""
    torch.manual_seed(0)
    weight = torch.randn(4, 3, 5, 5, device=device)
    grad = torch.randn(4, 3, 5, 5, device=device)
    outcomes = []
    for parameter_format, teacher_format, grad_format in (
        (torch.contiguous_format, torch.contiguous_format, torch.contiguous_format),
        (torch.channels_last, torch.channels_last, torch.channels_last),
        (torch.channels_last, torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.channels_last, torch.contiguous_format),
    ):
        p = nn.Parameter(weight.clone(memory_format=parameter_format))
        t = weight.clone(memory_format=teacher_format)
        p.grad = grad.clone(memory_format=grad_format)
        AdamWEMA([p], lr=0.1, ema_decay=0.5, teacher=[(p, t)]).step()
        outcomes.append((p.detach().contiguous(), t.contiguous()))
        assert t.is_contiguous(memory_format=teacher_format)
    for p, t in outcomes[1:]:
        torch.testing.assert_close(p, outcomes[0][0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(t, outcomes[0][1], rtol=1e-6, atol=1e-7)


@triton
def test_parameters_without_gradient_or_teacher(device):
    frozen, taught, plain = (nn.Parameter(torch.randn(5, device=device)) for _ in range(3))
    teachers = [(frozen, torch.zeros(5, device=device)), (taught, torch.zeros(5, device=device))]
    optimizer = AdamWEMA([frozen, taught, plain], lr=0.1, ema_decay=0.75, teacher=teachers)
    before = frozen.detach().clone()
    taught.grad, plain.grad = torch.ones(5, device=device), torch.ones(5, device=device)
    optimizer.step()
    assert torch.equal(frozen, before)
    torch.testing.assert_close(teachers[0][1], 0.25 * frozen.detach())  # follows, as a separate update would
    torch.testing.assert_close(teachers[1][1], 0.25 * taught.detach())
    assert optimizer.teacher_of(plain) is None
    assert frozen not in optimizer.state


@triton
def test_device_scalars_are_the_numbers(device):
    ours, other = parameters(device), parameters(device)
    lr, decay = (torch.tensor(value, dtype=torch.float64, device=device) for value in (0.0, 0.0))
    scheduled = AdamWEMA(ours, lr=lr, ema_decay=decay)
    plain = AdamWEMA(other)
    for step, (rate, weight) in enumerate([(1e-3, 0.5), (1e-2, 0.99)]):
        lr.fill_(rate)
        decay.fill_(weight)
        for group in plain.param_groups:
            group["lr"], group["ema_decay"] = rate, weight
        for params, optimizer in ((ours, scheduled), (other, plain)):
            give_gradients(params, step)
            optimizer.step()
    for p, q in zip(ours, other, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(scheduled.teacher_of(p), plain.teacher_of(q))


def arguments(device):
    make = lambda: [torch.randn(5, device=device), torch.randn(2, 3, device=device)]  # noqa: E731
    steps = [torch.tensor(1.0, device=device), torch.tensor(2.0, device=device)]
    teachers = make()
    scalars = [torch.tensor(value, device=device) for value in (0.01, 0.9)]
    second = [t.abs() for t in make()]
    settings = torch.tensor([0.9, 0.999, 1e-8, 0.1], dtype=torch.float64)
    return (make(), make(), make(), second, steps, teachers, *scalars, None, None, settings)


def test_opcheck(device):
    torch.library.opcheck(ops.adamw_ema_.default, arguments(device))


def test_compiles_whole(device):
    torch._dynamo.reset()
    one = arguments(device)
    other = tuple([t.clone() for t in a] if isinstance(a, list) else a for a in one)
    torch.compile(lambda *a: adamw_ema_(*a), fullgraph=True)(*one)
    adamw_ema_(*other)
    for ours, theirs in zip(one[:6], other[:6], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("number", [float, np.float64, np.float32])
def test_compiles_once_for_a_schedule_of_numbers(number):
    """The first step makes the state. With numbers of NumPy that is all that is compiled anew, and with floats the
    second graph, which takes any number, comes with it.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ours, theirs = parameters("cpu"), parameters("cpu")
    compiled, eager = AdamWEMA(ours), AdamWEMA(theirs)
    step = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    for count in range(12):
        give_gradients(ours, count)
        give_gradients(theirs, count)
        for group in (*compiled.param_groups, *eager.param_groups):
            group["lr"], group["ema_decay"] = number(1e-3 * (count + 1)), number(0.9 - 0.05 * count)
            group["eps"], group["weight_decay"] = number(1e-8 * (count + 1)), number(0.02 * count)
            group["betas"] = (number(0.95 - 0.01 * count), number(0.999 - 1e-3 * count))
        step()
        eager.step()
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)
        assert torch.equal(compiled.teacher_of(p), eager.teacher_of(q))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
def test_a_skipped_step_skips_every_teacher(device):
    """Those of parameters without a gradient, and those of another layout, too."""
    idle, apart = nn.Parameter(torch.ones(3, device=device)), nn.Parameter(torch.ones(2, 3, 2, 2, device=device))
    teachers = [torch.zeros(3, device=device), torch.zeros(2, 3, 2, 2, device=device)]
    teachers[1] = teachers[1].to(memory_format=torch.channels_last)
    optimizer = AdamWEMA([idle, apart], ema_decay=0.5, teacher=zip([idle, apart], teachers, strict=True))
    apart.grad = torch.ones_like(apart)
    optimizer.found_inf = torch.ones((), device=device)
    optimizer.step()
    assert all((t == 0).all() for t in teachers)
    assert (apart == 1).all()
    optimizer.found_inf = torch.zeros((), device=device)
    optimizer.step()
    assert all((t != 0).all() for t in teachers)


@triton
def test_views_of_other_memory(device):
    """Parameters and gradients that have gaps, or start anywhere, are stepped in place all the same."""
    dense = nn.Parameter(torch.randn(6, 4, device=device))
    dense.grad = torch.randn(6, 4, device=device)
    gaps, shifted = torch.zeros(6, 8, device=device), torch.zeros(25, device=device)
    views = [nn.Parameter(gaps[:, ::2]), nn.Parameter(shifted[1:].view(6, 4))]
    for p in views:
        p.data.copy_(dense.data)
        p.grad = torch.zeros(6, 8, device=device)[:, 1::2]
        p.grad.copy_(dense.grad)
    optimizers = [AdamWEMA([p], lr=0.1, ema_decay=0.5) for p in (dense, *views)]
    for _ in range(2):
        for optimizer in optimizers:
            optimizer.step()
    for got in (gaps[:, ::2], shifted[1:].view(6, 4)):
        torch.testing.assert_close(got, dense.detach(), rtol=1e-6, atol=1e-7)
    for p, optimizer in zip(views, optimizers[1:], strict=True):
        torch.testing.assert_close(optimizer.teacher_of(p), optimizers[0].teacher_of(dense), rtol=1e-6, atol=1e-7)
    assert (gaps[:, 1::2] == 0).all()


@triton
@pytest.mark.parametrize("teacher_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_dtype_of_teacher_or_parameter_is_cut(dtype, teacher_dtype, device):
    """The teacher differs from the formula by its own rounding, the parameter by its own."""
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(64, device=device, dtype=dtype))
    teacher = torch.randn(64, device=device, dtype=teacher_dtype)
    expected, moments = p.detach().double(), (0.0, 0.0)
    rate = 1e-2
    if device.type == "cuda" and dtype == torch.float64:  # there torch's step is used, which reads the rate in float32
        rate = torch.tensor(rate, dtype=torch.float32).item()
    optimizer = AdamWEMA([p], lr=1e-2, ema_decay=0.75, teacher=[(p, teacher)])
    step = torch.finfo(dtype).eps * (2 if INTERPRETED else 1)  # its conversions truncate
    teacher_step = torch.finfo(teacher_dtype).eps * (2 if INTERPRETED else 1)
    p.grad = torch.randn(64, device=device).to(dtype)
    followed = 0.75 * teacher.double()
    expected, *_ = adamw_ema_reference(
        expected, p.grad.double(), *moments, 1, teacher.double(),
        lr=rate, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=1e-2, ema_decay=0.75,
    )  # fmt: skip
    optimizer.step()
    torch.testing.assert_close(p.detach().double(), expected, rtol=step, atol=max(step * 1e-2, 1e-12))
    torch.testing.assert_close(
        teacher.double(), followed + 0.25 * p.detach().double(), rtol=teacher_step, atol=teacher_step
    )


@triton
@pytest.mark.parametrize("scaled", [False, True])
def test_gradients_that_are_expanded_or_laid_out_otherwise(scaled, device):
    """Stepped like a dense copy; only a scale is taken out of them in place."""
    column = torch.randn(6, 1, device=device)
    dense = torch.randn(4, 6, device=device)
    for grad in (column.expand(6, 4), column[0].expand(6, 4), dense.mT, torch.ones((), device=device).expand(6, 4)):
        p, q = (nn.Parameter(torch.zeros(6, 4, device=device)) for _ in range(2))
        p.grad, q.grad = grad, grad.clone(memory_format=torch.contiguous_format)
        before, pointer = grad.clone(), grad.data_ptr()
        for one in (p, q):
            optimizer = AdamWEMA([one])
            if scaled:
                optimizer.grad_scale, optimizer.found_inf = (torch.tensor(x, device=device) for x in (4.0, 0.0))
            optimizer.step()
        assert torch.equal(p, q)
        assert p.grad.data_ptr() == pointer
        assert torch.equal(p.grad, before / 4 if scaled else before)


@triton
def test_a_gradient_in_a_dtype_of_its_own(device):
    """Where the parameter allows it; the step and the scale that is taken out are those of the values."""
    p, q = (nn.Parameter(torch.ones(6, device=device)) for _ in range(2))
    p.grad_dtype = torch.bfloat16
    p.grad = 2 * torch.arange(6, device=device).bfloat16()
    q.grad = p.grad.float()
    for one in (p, q):
        optimizer = AdamWEMA([one], lr=0.1)
        optimizer.grad_scale = torch.tensor(2.0, device=device)
        optimizer.step()
    assert torch.equal(p, q)
    assert p.grad.dtype == torch.bfloat16
    assert torch.equal(p.grad, torch.arange(6, device=device).bfloat16())


@triton
def test_what_is_written_gets_a_new_version(device):
    """At the first step and at those that repeat it; else backward would use what it saved before the step."""
    p = nn.Parameter(torch.ones(5, device=device))
    optimizer = AdamWEMA([p])
    p.grad = torch.ones(5, device=device)
    for _ in range(3):
        product = (p * p).sum()
        written = [p, *(tensor for tensor in optimizer.state[p].values())]
        before = [tensor._version for tensor in written]
        optimizer.step()
        assert all(tensor._version > version for tensor, version in zip(written, before, strict=True))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
        p.grad = torch.ones(5, device=device)


class Seen(TorchDispatchMode):
    """Lists the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.append(operation)
        return operation(*args, **(kwargs or {}))


def test_a_mode_sees_the_operator():
    """A tracer that missed it would take the kernel's effect for none."""
    ours = parameters("cpu")
    optimizer = AdamWEMA(ours)
    give_gradients(ours, 0)
    optimizer.step()
    with Seen() as seen:
        optimizer.step()
    assert ops.adamw_ema_.default in seen.names


def test_fake_tensors_are_stepped():
    """They have no values, and the real tensors of the same shapes that were stepped before are no plan for them."""
    real = parameters("cpu")
    give_gradients(real, 0)
    AdamWEMA(real).step()
    with FakeTensorMode() as mode:
        fake = parameters("cpu")
        for p in fake:
            p.grad = torch.ones_like(p)
        optimizer = AdamWEMA(fake)
        for _ in range(2):
            optimizer.step()
        assert all(mode.is_our_fake(optimizer.teacher_of(p)) for p in fake)


# of each kernel for each dtype: how often it reads and writes 16 bytes at once, aligned and not
VECTORS = """
import json, re, sys
sys.path.insert(0, "tests/kernels")
import aot, triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

found = {}
for name in ("ema", "adamw_ema"):
    kernel, types, constants, options = aot.manifest(80)[name]
    arguments = iter(types.split())
    signature = {key: "constexpr" if key in constants else next(arguments) for key in kernel.arg_names}
    for dtype in (tl.float32, tl.bfloat16):
        own = {key: dtype if isinstance(value, tl.dtype) else value for key, value in constants.items()}
        for architecture in (80, 90):
            for aligned in (True, False):
                source = ASTSource(kernel, signature, own | {"ALIGNED": aligned})
                ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["ptx"]
                counts = [len(re.findall(rf"{way}\\.global[.a-z0-9:]*\\.v4\\.b32", ptx)) for way in ("ld", "st")]
                found[f"{name} {dtype} {architecture} {aligned}"] = [*counts, len(re.findall(r"\\.v[248]\\.b", ptx))]
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton's compiler is for Linux")
def test_memory_is_read_by_16_bytes(run_process):
    """Whole pieces, by the 128 threads of a program, of all lists; nothing wide where addresses are not aligned."""
    result = run_process(sys.executable, "-c", VECTORS)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 16
    for case, (loads, stores, wide) in found.items():
        name, dtype, _, aligned = case.split()
        each = 1024 * (4 if dtype == "fp32" else 2) // (128 * 16)  # of a block, in one list
        read, written = (5, 4) if name == "adamw_ema" else (2, 1)
        if aligned == "True":
            assert loads >= read * each, case
            assert stores >= written * each, case
        else:
            assert wide == 0, case
