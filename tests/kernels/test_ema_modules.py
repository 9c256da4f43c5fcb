"""The moving average of modules: parameters, buffers, wrappers, what is saved, and the schedule of the decay."""

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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from seqjepa.kernels import EMA, cosine_decay, ema_update_

triton = pytest.mark.triton


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
