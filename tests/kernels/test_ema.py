"""EMA update against the formula in double precision."""

import copy
import io
import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seqjepa.kernels import EMA, cosine_decay, ema_update_
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


@triton
@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
def test_modules_and_their_batch_norm(buffers, device):
    student = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device)
    ema = EMA(student, 0.9, buffers=buffers).to(device)
    mean = ema.teacher[1].running_mean.clone()
    student(torch.randn(8, 3, 6, 6, device=device))
    with torch.no_grad():
        student[0].weight.add_(1)
    weight = ema.teacher[0].weight.clone()
    ema.update(student)
    torch.testing.assert_close(ema.teacher[0].weight, 0.9 * weight + 0.1 * student[0].weight)
    own, theirs = ema.teacher[1], student[1]
    expected = {"ignore": mean, "copy": theirs.running_mean, "average": 0.9 * mean + 0.1 * theirs.running_mean}
    torch.testing.assert_close(own.running_mean, expected[buffers])
    assert own.num_batches_tracked == (0 if buffers == "ignore" else 1)
    ema.decay.fill_(0.0)  # a schedule
    ema.update(student)
    torch.testing.assert_close(ema.teacher[0].weight, student[0].weight)
    assert not any(p.requires_grad for p in ema.teacher.parameters())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def prepared(net):
    AcceleratorState._reset_state(reset_partial_state=True)  # that of an earlier test may have another precision
    return Accelerator(cpu=True, mixed_precision="bf16").prepare(net)


def compiled_inside(net):
    net[0] = torch.compile(net[0])
    return net


def checkpointed_inside(net):
    net[0] = checkpoint_wrapper(net[0])
    return net


WRAPPERS = {
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled DDP": lambda net: torch.compile(DistributedDataParallel(net)),
    "AveragedModel": AveragedModel,
    "EMA": EMA,
    "accelerate": prepared,
    "compiled inside": compiled_inside,
    "checkpointed inside": checkpointed_inside,
    "Sequential": nn.Sequential,
}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("buffers", ["ignore", "copy", "average"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_wrapped_students(wrap, buffers):
    """Followed as the bare one is; and a teacher made of the wrapped one is followed by the bare one's copy."""
    student = network()
    student(torch.randn(8, 3))  # so that its statistics differ from a new network's
    cases = [(EMA(network(), 0.75, buffers=buffers), WRAPPERS[wrap](copy.deepcopy(student)))]
    if buffers == "ignore" or wrap not in ("AveragedModel", "EMA"):  # which have a buffer of their own
        cases.append((EMA(WRAPPERS[wrap](network()), 0.75, buffers=buffers), student))
    for teacher, follow in cases:
        start = [t.clone() for t in (*teacher.teacher.parameters(), teacher.teacher.state_dict()[norm(teacher)])]
        with torch.no_grad():
            for p in follow.parameters():
                p.add_(1)
        teacher.update(follow)
        mean = student[1].running_mean
        ends = [0.75 * b + 0.25 * s.detach() for b, s in zip(start, follow.parameters(), strict=False)]
        ends.append({"ignore": start[-1], "copy": mean, "average": 0.75 * start[-1] + 0.25 * mean}[buffers])
        got = (*teacher.teacher.parameters(), teacher.teacher.state_dict()[norm(teacher)])
        torch.testing.assert_close(got, tuple(ends), rtol=1e-6, atol=1e-7)


def norm(ema: EMA) -> str:
    return next(name for name in ema.teacher.state_dict() if name.endswith("running_mean"))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("wrap", ["DDP", "DataParallel", "compiled", "compiled DDP"])
def test_wrappers_are_not_copied(wrap):
    """So that a checkpoint does not depend on them, and a teacher's forward pass waits for no other process."""
    ema = EMA(WRAPPERS[wrap](network()))
    assert ema.state_dict().keys() == EMA(network()).state_dict().keys()
    assert type(ema.module) is nn.Sequential


def test_a_teacher_of_a_prepared_student_runs_its_own_weights():
    """Accelerate replaces a module's forward; a copy of it must not run the student's."""
    student = prepared(network())
    ema = EMA(student).eval()
    with torch.no_grad():
        for p in student.parameters():
            p.zero_()
    images = torch.randn(4, 3)
    torch.testing.assert_close(ema(images), network().eval()(images), rtol=2**-7, atol=2**-7)  # by autocast


def test_buffers_of_other_shapes_are_refused():
    """Copied, one number would become all four."""
    teacher, student = network(), network()
    student[1].running_mean = torch.ones(1)
    for buffers in ("copy", "average"):
        with pytest.raises(ValueError, match=r"is \[4\] on cpu, its student \[1\] on cpu"):
            ema_update_(teacher, student, 0.5, buffers=buffers)


class Counted(nn.Module):
    """A module round another, with a buffer of its own whose name the other may have too."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize(("buffers", "share"), [("copy", 1.0), ("average", 0.25)])
@pytest.mark.parametrize("wrap", [lambda net: net, nn.Sequential, torch.compile, AveragedModel])
def test_buffers_of_one_name_in_a_module_and_its_child(wrap, buffers, share):
    """Each follows its own; a module with a buffer of its own is no wrapper whose name could be left out."""
    teacher = Counted(Counted(nn.Sequential(Counted(nn.Linear(2, 2)))))
    student = copy.deepcopy(teacher)
    counts = [(name, number + 1.0) for number, (name, _) in enumerate(student.named_buffers())]
    for name, number in counts:
        student.get_buffer(name).fill_(number)
    ema_update_(teacher, wrap(student), 0.75, buffers=buffers)
    assert [(name, t.item()) for name, t in teacher.named_buffers()] == [(name, share * n) for name, n in counts]
    assert len(counts) == 3


def test_a_count_of_updates_inside_another():
    student = AveragedModel(AveragedModel(nn.Linear(2, 2)))
    ema = EMA(student, buffers="copy")
    student.n_averaged.fill_(7)
    student.module.n_averaged.fill_(5)
    ema.update(student)
    assert (ema.teacher.n_averaged, ema.teacher.module.n_averaged) == (7, 5)


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


def test_shared_weights_move_once():
    def tied():
        net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
        net[2].weight = net[0].weight
        return net

    student, teacher = tied(), tied()
    expected = 0.5 * teacher[0].weight.detach() + 0.5 * student[0].weight.detach()
    ema_update_(teacher, student, 0.5)
    assert torch.equal(teacher[2].weight, teacher[0].weight)
    torch.testing.assert_close(teacher[0].weight.detach(), expected)
    with pytest.raises(ValueError, match=r"only one of them has 2\.weight"):
        ema_update_(teacher, nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), 0.5)


with torch.device("meta"):  # while torch.empty is still the one that a device's context knows
    BUILT_ON_META = EMA(network(), 0.9)


@pytest.mark.parametrize(
    "ema",
    [BUILT_ON_META, copy.deepcopy(BUILT_ON_META).bfloat16(), EMA(network(), 0.9).to("meta")],
    ids=["built on it", "built on it, in bfloat16", "moved there"],
)
def test_the_meta_device_leaves_the_decay(ema):
    """There are no values there; a decay that `to_empty` left to chance would be any number."""
    assert ema.teacher[0].weight.is_meta
    ema.to_empty(device="cpu")
    assert ema.decay == 0.9
    assert ema.decay.dtype == torch.float64
    student = network().to(ema.teacher[0].weight.dtype)
    ema.teacher.load_state_dict({name: torch.zeros_like(t) for name, t in student.state_dict().items()})
    ema.update(student)
    torch.testing.assert_close(ema.teacher[0].weight, 0.1 * student[0].weight.detach())
    again = EMA(network(), 0.5)
    again.load_state_dict(ema.state_dict())
    assert again.decay == 0.9


@pytest.mark.parametrize("schedule", [None, 0.25])
def test_a_saved_ema_is_loaded_on_the_meta_device(schedule):
    """The decay that it had when it was saved comes back, whatever a schedule has made of it."""
    ema = EMA(network(), 0.9)
    if schedule is not None:
        ema.decay.fill_(schedule)
    file = io.BytesIO()
    torch.save(ema, file)
    file.seek(0)
    loaded = torch.load(file, map_location="meta", weights_only=False)
    assert loaded.teacher[0].weight.is_meta
    loaded.to_empty(device="cpu")
    assert loaded.decay == (schedule or 0.9)
    assert loaded.decay.dtype == torch.float64
    assert loaded.state_dict().keys() == ema.state_dict().keys()


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        (nn.ReLU(), {}, "the student, ReLU, has no parameters to average"),
        (nn.Linear(2, 2, dtype=torch.complex64), {}, "weight must be floating-point, of 16 to 64 bits"),
        (nn.Linear(2, 2), {"buffers": "avg"}, "buffers must be 'ignore', 'copy' or 'average', got 'avg'"),
        (nn.Linear(2, 2), {"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        (nn.Linear(2, 2), {"decay": -0.1}, r"decay must be in \[0, 1\], got -0.1"),
        (nn.Linear(2, 2), {"decay": math.nan}, r"decay must be in \[0, 1\], got nan"),
        (nn.Linear(2, 2), {"decay": torch.tensor(math.nan)}, r"decay must be in \[0, 1\], got nan"),
        (nn.Linear(2, 2), {"decay": torch.full((1,), 0.9)}, r"decay must be a floating 0-dim tensor .* got .* \[1\]"),
        (nn.Linear(2, 2), {"decay": "0.9"}, "decay must be a number, got '0.9'"),
        (nn.Linear(2, 2), {"decay": None}, "decay must be a number, got None"),
        (nn.Linear(2, 2), {"decay": 1j}, "decay must be a number, got 1j"),
        (nn.Linear(2, 2), {"decay": np.array([0.9])}, r"decay must be a number, got array\(\[0.9\]\)"),
        (nn.Linear(2, 2), {"decay": torch.tensor(1)}, r"decay must be a floating 0-dim tensor .* got torch.int64"),
    ],
)
def test_refused_at_construction(student, settings, message):
    with pytest.raises(ValueError, match=message):
        EMA(student, **settings)


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


def test_a_module_in_half_precision_keeps_its_decay():
    ema = EMA(nn.Linear(2, 2), 0.9999).bfloat16()
    assert ema.decay.dtype == torch.float64
    assert ema.decay == 0.9999
    assert ema.teacher.weight.dtype == torch.bfloat16


def test_cosine_decay(device):
    steps = [0, 25, 50, 100, 150]
    got = [cosine_decay(torch.tensor(s, device=device), start=0.99, total_steps=101).item() for s in steps]
    expected = [0.99, 1 - 0.01 * (1 + math.cos(math.pi / 4)) / 2, 0.995, 1.0, 1.0]
    assert got == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": math.nan}, r"start must be in \[0, 1\], got nan"),
        ({"start": "0.9"}, "start must be a number, got '0.9'"),
        ({"end": 1.1}, r"end must be in \[0, 1\], got 1.1"),
        ({"total_steps": 0}, "total_steps must be positive, got 0"),
        ({"total_steps": math.nan}, "total_steps must be positive, got nan"),
    ],
)
def test_cosine_decay_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        cosine_decay(torch.tensor(0), **{"start": 0.9, "total_steps": 10, **settings})


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


def test_equals_torchs_average_of_weights_and_buffers():
    """After the first update of torch's, which copies; `ema.module` is what it calls so."""
    student = network()
    theirs = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    theirs.update_parameters(student)
    ours = EMA(student, 0.9, buffers="average")
    for _ in range(3):
        student(torch.randn(8, 3))
        with torch.no_grad():
            for p in student.parameters():
                p.add_(torch.randn_like(p))
        theirs.update_parameters(student)
        ours.update(student)
    expected = theirs.module.state_dict()
    del expected["1.num_batches_tracked"]  # an integer, which is copied here and averaged there
    for name, tensor in expected.items():
        torch.testing.assert_close(ours.module.state_dict()[name], tensor, rtol=1e-6, atol=1e-6)


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
