"""EMA update against the formula in double precision."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from seqjepa.kernels import EMA, ema_update_
from seqjepa.kernels._ops import ops
from seqjepa.kernels.internal.backend import INTERPRETED
from seqjepa.kernels.internal.multi_tensor import recalled

triton = pytest.mark.triton


SHAPES = [(1,), (63,), (7, 5), (3, 2, 4, 4), (0,), (4097,), (9000,)]


def tensors(device, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in SHAPES]


@pytest.fixture(params=[False, True], ids=["number", "tensor"])
def given(request, device):
    """A decay as a number, by which torch's own loop works, or on the device, by which the kernel does."""
    return lambda decay: torch.tensor(decay, dtype=torch.float64, device=device) if request.param else decay


@triton
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.996, 1.0])
def test_matches_formula_over_many_steps(decay, given, device):
    teacher = tensors(device)
    addresses = [t.data_ptr() for t in teacher]
    exact = [t.double() for t in teacher]
    for step in range(5):
        student = tensors(device, seed=step + 1)
        ema_update_(teacher, student, given(decay))
        exact = [decay * t + (1 - decay) * s.double() for t, s in zip(exact, student, strict=True)]
    for got, expected in zip(teacher, exact, strict=True):
        # five roundings of values of order 1 to 4 in float32
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=5 * 2**-22)
    assert addresses == [t.data_ptr() for t in teacher]


@triton
def test_equal_teacher_is_a_fixed_point(given, device):
    student = [torch.randn(1000, device=device)]
    teacher = [student[0].clone()]
    for _ in range(50):
        ema_update_(teacher, student, given(0.996))
    assert torch.equal(teacher[0], student[0])


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
def test_follows_channels_last_parameters(given, device):
    """Both so: in step. One of them: still right, and neither changes its layout."""
    student = torch.randn(4, 3, 5, 5, device=device).to(memory_format=torch.channels_last)
    both = torch.zeros_like(student)
    assert both.stride() == student.stride()
    apart = torch.zeros(4, 3, 5, 5, device=device)
    ema_update_([both, apart], [student, student], given(0.75))
    for teacher in (both, apart):
        torch.testing.assert_close(teacher, 0.25 * student, rtol=1e-6, atol=0)
    assert apart.is_contiguous()


@triton
def test_a_wide_teacher_with_a_live_copy_in_half_precision(device):
    """The shadow follows a bfloat16 student in float32; where it lay in bfloat16, it would not move."""
    student = [t + 0.01 * t.abs() for t in tensors(device, torch.bfloat16)]
    shadow, live = tensors(device), tensors(device, torch.bfloat16)
    stalled = tensors(device, torch.bfloat16)
    before = [t.clone() for t in shadow]
    ema_update_(shadow, student, 0.996, live=live)
    for t, s, b, half in zip(shadow, student, before, live, strict=True):
        expected = 0.996 * b.double() + 0.004 * s.double()
        torch.testing.assert_close(t.double(), expected, rtol=1e-6, atol=1e-6)
        step = 2**-7 if INTERPRETED else 2**-8  # its conversion truncates, a GPU's and torch's rounds
        torch.testing.assert_close(half.float(), t, rtol=step, atol=0)
    ema_update_(stalled, student, 0.996)
    moved = torch.cat([(s != b).flatten() for s, b in zip(stalled, tensors(device, torch.bfloat16), strict=True)])
    assert moved.float().mean() < 0.1 or INTERPRETED


@triton
@pytest.mark.parametrize("student_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_no_dtype_of_the_two_is_cut(dtype, student_dtype, device):
    """The result has the teacher's rounding alone, and its live copy is a copy of it."""
    teacher, student = torch.randn(999, device=device).to(dtype), torch.randn(999, device=device).to(student_dtype)
    if dtype == torch.float16 and student_dtype != torch.float16:
        student[0] = 1e6  # beyond float16; a thousandth of it is not
    expected = 0.999 * teacher.double() + 0.001 * student.double()
    live = torch.zeros(999, device=device)
    ema_update_([teacher], [student], 0.999, live=[live])
    step = torch.finfo(dtype).eps * (2 if INTERPRETED else 1)  # its conversions truncate
    torch.testing.assert_close(teacher.double(), expected, rtol=step, atol=step * 0.1)  # where the two cancel
    assert torch.equal(live, teacher.float())


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_skipped_step_skips_the_teacher(dtype, device):
    """Its weights, its live copy, those of another layout and its buffers. float64 is torch's path on a GPU too."""
    teacher, student = tensors(device, dtype), tensors(device, dtype, seed=1)
    student[3] = student[3].to(memory_format=torch.channels_last)
    live = [torch.full_like(t, 7, dtype=torch.bfloat16) for t in teacher]
    before = [t.clone() for t in teacher]
    stop = torch.ones((), device=device)
    ema_update_(teacher, student, 0.5, skip=stop, live=live)
    assert all(torch.equal(t, b) for t, b in zip(teacher, before, strict=True))
    assert all((copy == 7).all() for copy in live)
    norm, other = nn.BatchNorm1d(4).to(device), nn.BatchNorm1d(4).to(device)
    other(torch.randn(8, 4, device=device))
    ema_update_(norm, other, 0.5, buffers="copy", skip=stop)
    assert norm.num_batches_tracked == 0
    assert norm.running_mean.abs().sum() == 0
    ema_update_(teacher, student, 0.5, skip=torch.zeros((), device=device), live=live)
    assert not any(torch.equal(t, b) for t, b in zip(teacher, before, strict=True) if t.numel())


def test_iterators_that_were_read_before():
    """They yield nothing the second time, and the teacher would stand still."""
    teacher, student = nn.Linear(2, 2), nn.Linear(2, 2)
    one, other = teacher.parameters(), student.parameters()
    ema_update_(one, other, 0.0)
    assert torch.equal(teacher.weight, student.weight)
    with pytest.raises(ValueError, match="teacher is an iterator that yields nothing: was it read before"):
        ema_update_(one, other, 0.0)
    with pytest.raises(ValueError, match="live is an iterator that yields nothing"):
        ema_update_(list(teacher.parameters()), list(student.parameters()), 0.0, live=one)
    ema_update_([], [], 0.5)
    ema_update_(nn.ReLU(), nn.ReLU(), 0.5)


def test_a_decay_from_numpy():
    for decay in (np.float64(0.75), np.float32(0.75), np.array(0.75), np.array(0.75, dtype=np.float32)):
        teacher = torch.zeros(2)
        ema_update_([teacher], [torch.ones(2)], decay)
        assert torch.equal(teacher, torch.full((2,), 0.25))
        assert EMA(nn.Linear(2, 2), decay).decay == 0.75


@triton
def test_layouts_that_only_look_different(given, device, recwarn):
    """A 1 x 1 kernel has two descriptions of one layout; a transposed matrix is dense; neither goes one by one."""
    kernel = torch.randn(8, 4, 1, 1, device=device)
    pairs = [
        (torch.zeros_like(kernel), kernel.to(memory_format=torch.channels_last)),
        (torch.zeros(5, 3, device=device).mT, torch.randn(5, 3, device=device).mT),
        (torch.zeros(40, device=device)[3:], torch.randn(40, device=device)[3:]),  # addresses are not aligned
    ]
    for t, s in pairs:
        ema_update_([t], [s], given(0.5))
        torch.testing.assert_close(t, 0.5 * s)
    assert not recwarn.list


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
def test_tensors_with_gaps(given, device):
    memory = torch.zeros(3, 8, device=device)
    student = torch.randn(3, 8, device=device)[:, ::2]
    ema_update_([memory[:, ::2]], [student], given(0.5))
    torch.testing.assert_close(memory[:, ::2], 0.5 * student)
    assert (memory[:, 1::2] == 0).all()


def test_opcheck(device):
    arguments = ([torch.randn(3), torch.randn(2, 2)], [torch.randn(3), torch.randn(2, 2)], [], torch.tensor(0.9), None)
    on_device = [[t.to(device) for t in a] if isinstance(a, list) else a for a in arguments]
    on_device[3] = on_device[3].to(device)
    torch.library.opcheck(ops.ema_update_.default, tuple(on_device))


def test_compiles_whole(device):
    torch._dynamo.reset()
    student = nn.Linear(4, 3).to(device)
    one, other = EMA(student, 0.9).to(device), EMA(student, 0.9).to(device)
    with torch.no_grad():
        student.weight.add_(1)
    torch.compile(lambda: one.update(student), fullgraph=True)()
    other.update(student)
    assert torch.equal(one.teacher.weight, other.teacher.weight)


@pytest.mark.parametrize(("number", "graphs"), [(float, 2), (np.float64, 1)])  # 2: the first value is a constant
def test_compiles_once_for_a_schedule_of_numbers(number, graphs):
    def lists(t, s, decay):
        ema_update_([t], [s], decay)

    def temporary(t, s, decay):
        ema_update_([t.clone()], [s], decay)

    teacher, student = nn.Linear(3, 2), nn.Linear(3, 2)

    def modules(t, s, decay):
        ema_update_(teacher, student, decay)

    for function in (lists, temporary, modules):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        t, s, expected = torch.zeros(5), torch.ones(5), 0.0
        for step in range(12):
            decay = 0.1 + 0.05 * step
            compiled(t, s, number(decay))
            expected = decay * expected + 1 - decay
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
        if function is lists:
            torch.testing.assert_close(t, torch.full((5,), expected))
        with pytest.raises(RuntimeError, match=r"decay must be in \[0, 1\]"):
            compiled(t, s, number(1.5))


class Scaled(nn.Module):
    """Holds one module, but is no mere wrapper."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(2, 2), nn.Parameter(torch.ones(()))


@pytest.mark.parametrize(
    ("teacher", "student", "arguments", "message"),
    [
        ([torch.zeros(1)], [torch.zeros(1)], {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ([torch.zeros(1)], [torch.zeros(1)], {"decay": math.nan}, r"decay must be in \[0, 1\], got nan"),
        ([torch.zeros(1)], [torch.zeros(1)], {"decay": torch.tensor(1.5)}, r"decay must be in \[0, 1\], got 1.5"),
        ([torch.zeros(1)], [torch.zeros(1)], {"decay": np.array(1.5)}, r"decay must be in \[0, 1\], got 1.5"),
        ([torch.zeros(1)], [torch.zeros(1)], {"decay": "x"}, "decay must be a number, got 'x'"),
        ([torch.zeros(1).expand(2, 3)], [torch.zeros(2, 3)], {}, r"of shape \[2, 3\] is expanded"),
        ([torch.zeros(2)], [torch.zeros(2)], {"live": [torch.zeros(1).expand(2)]}, r"of shape \[2\] is expanded"),
        ([torch.zeros(1)] * 2, [torch.zeros(1)], {}, "2 teacher tensors and 1 student"),
        ([torch.zeros(2)], [torch.zeros(3)], {}, r"teacher tensor 0 is \[2\] on cpu, its student \[3\] on cpu"),
        ([torch.zeros(2, dtype=torch.int64)], [torch.zeros(2)], {}, "tensor 0 must be floating-point"),
        (
            [torch.zeros(2).to(torch.float8_e4m3fn)],
            [torch.zeros(2)],
            {},
            "floating-point, of 16 to 64 bits",
        ),
        ([torch.zeros(2)], [torch.zeros(2)], {"buffers": "copy"}, "buffers = 'copy' needs modules"),
        ([torch.zeros(2)], [torch.zeros(2)], {"buffers": "all"}, "buffers must be 'ignore', 'copy' or 'average'"),
        ([torch.zeros(2)], [torch.zeros(2)], {"live": []}, None),
        ([torch.zeros(2)], [torch.zeros(2)], {"live": [torch.zeros(2)] * 2}, "1 teacher tensors and 2 live copies"),
        (nn.Linear(2, 2), nn.Linear(2, 2, bias=False), {}, "differ in their parameters: only one of them has bias"),
        (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {}, "differ in their parameters"),
        (nn.Linear(2, 2), Scaled(), {}, "differ in their parameters: only one of them has bias"),
        (nn.Linear(2, 2), nn.Sequential(nn.Linear(3, 2)), {}, r"teacher tensor 0 is \[2, 2\] on cpu, its student"),
        (nn.Linear(2, 2), [torch.zeros(2, 2)], {}, "must both be modules or both be tensors"),
        ([torch.zeros(2)], [torch.zeros(2)], {"decay": torch.ones(2)}, "decay must be a floating 0-dim tensor on cpu"),
    ],
)
def test_refusals(teacher, student, arguments, message):
    arguments = {"decay": 0.5, **arguments}
    if message is None:
        ema_update_(teacher, student, **arguments)
        return
    with pytest.raises(ValueError, match=message):
        ema_update_(teacher, student, **arguments)


@triton
@pytest.mark.filterwarnings("ignore:ema_update_.*other strides")
def test_what_changes_between_updates_is_seen(given, device):
    """Updates that repeat skip most checks; after each change they are still the formula, or are refused."""
    teacher, student = [torch.zeros(4, 4, device=device) for _ in range(2)], torch.randn(2, 4, 4, device=device)

    def update(students=student):
        expected = [0.5 * t.double() + 0.5 * s.double() for t, s in zip(teacher, students, strict=True)]
        ema_update_(teacher, list(students), given(0.5))
        for got, want in zip(teacher, expected, strict=True):
            torch.testing.assert_close(got.double(), want, rtol=2 * torch.finfo(got.dtype).eps, atol=1e-6)

    update()
    update()
    update(student.mT)
    teacher[1].data = teacher[1].data.mT  # in the same memory
    update()
    teacher[0].data = teacher[0].data.bfloat16()
    update()
    update(student.double())
    with pytest.raises(ValueError, match=r"teacher tensor 0 is \[4, 4\] on"):
        ema_update_(teacher, [student[0, :2], student[1]], 0.5)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        ema_update_(teacher, list(student), 1.5)
    teacher[0].data = torch.zeros(1, device=device).expand(4, 4)
    with pytest.raises(ValueError, match="is expanded"):
        update()


def test_a_plan_is_for_tensors_as_they_are():
    lists = [torch.zeros(3)], [torch.ones(3)]
    for _ in range(2):
        ema_update_(*lists, 0.5)
    assert recalled("ema_update_", lists) is not None
    found = []
    for transform in (torch.func.vmap, torch.func.functionalize):
        transform(lambda x: found.append(recalled("ema_update_", lists)) or x)(torch.ones(2))
    with FakeTensorMode():
        found.append(recalled("ema_update_", lists))
    assert found == [None] * 3


@pytest.mark.parametrize("enabled", [True, False])
def test_gradients_are_on_or_off_as_before(enabled):
    teacher, student = [torch.zeros(3, requires_grad=True)], [torch.ones(3)]
    with torch.set_grad_enabled(enabled):
        ema_update_(teacher, student, 0.5)
        assert torch.is_grad_enabled() == enabled
        with pytest.raises(ValueError, match="decay must be in"):
            ema_update_(teacher, student, 2.0)
        assert torch.is_grad_enabled() == enabled
    assert teacher[0].grad_fn is None
    assert teacher[0].tolist() == [0.5] * 3


@triton
def test_lists_of_one_length_in_all(device):
    """Three pairs, and two pairs with live copies, of the same tensors."""
    one, two, three, four, five, six = (torch.full((3,), float(n), device=device) for n in range(6))
    for _ in range(2):
        ema_update_([one, two, three], [four, five, six], 1.0)
        assert [t[0].item() for t in (one, two, three, four, five, six)] == [0, 1, 2, 3, 4, 5]
    ema_update_([one, two], [three, four], 0.5, live=[five, six])
    assert [t[0].item() for t in (one, two, three, four, five, six)] == [1, 2, 2, 3, 1, 2]


@triton
def test_what_is_written_gets_a_new_version(device):
    teacher, student, live = (torch.ones(5, device=device) for _ in range(3))
    for _ in range(3):
        before = [t._version for t in (teacher, student, live)]
        ema_update_([teacher], [student], 0.5, live=[live])
        assert teacher._version > before[0]
        assert student._version == before[1]
        assert live._version > before[2]


def test_a_model_partly_without_values():
    """Weights on the meta device have none: the others move all the same."""
    teacher = [torch.ones(3), torch.ones(3, device="meta")]
    ema_update_(teacher, [torch.zeros(3), torch.zeros(3, device="meta")], 0.5)
    assert teacher[0].tolist() == [0.5] * 3
