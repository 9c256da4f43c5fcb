"""Exponential moving average of a teacher's tensors: t <- decay t + (1 - decay) s.

It is computed as t + (1 - decay) (s - t), so that a teacher that equals its student stays equal; `mul` and `add` would
drift in float32. A teacher in bfloat16 hardly moves: at decay 0.996 and weights 1 % apart, under 1 % of them change in
an update. Keep the teacher in float32; `live` is its copy in bfloat16, written in the same pass.

Source: momentum encoder of BYOL (arXiv 2006.07733), section 3.1; teacher of seq-JEPA (arXiv 2505.03176).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from itertools import chain
from typing import Literal, get_args

import torch
from torch import Tensor, _foreach_copy_, _foreach_lerp_, nn  # pyright: ignore[reportPrivateImportUsage]
from torch.autograd.graph import increment_version

from ._ops import add_op_namespace_prefix
from .internal.arguments import as_scalar, check_decay, check_unit, check_written, listed, on_device
from .internal.backend import jit, launch, tl, triton_dtype, uses_triton, widest
from .internal.checks import check_positive, check_tensors
from .internal.multi_tensor import (
    PIECE,
    address_table,
    find_piece,
    local,
    pointer,
    recalled,
    remember,
    same_layout,
)
from .internal.transforms import are_plain, without_gradients

__all__ = ["EMA", "cosine_decay", "ema_reference", "ema_update_"]

Buffers = Literal["ignore", "copy", "average"]
BUFFERS = get_args(Buffers)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def ema_reference(teacher: Tensor, student: Tensor, decay: float) -> Tensor:
    """The plain formula: the new teacher, in the teacher's dtype."""
    return torch.lerp(teacher, student.to(teacher.dtype), 1.0 - decay)


@jit
def lerp(b_from, b_to, weight):
    """Linear interpolation from the nearer end: exact for weights 0 and 1, and if both ends are equal."""
    near = b_from + weight * (b_to - b_from)
    far = b_to - (b_to - b_from) * (1.0 - weight)
    return tl.where(weight < 0.5, near, far)


@jit
def _ema_kernel(
    table,  # pointer to int64 [T, 2 + lists]: teacher, student, live
    pieces,  # pointer to int32: the row of each program's piece
    decay,  # pointer to a float64 or float32
    skip,  # pointer to a number: the teacher is updated only if it is zero
    LISTS: tl.constexpr,
    TEACHER: tl.constexpr,  # dtypes
    STUDENT: tl.constexpr,
    LIVE: tl.constexpr,
    SKIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
):
    _, row, first, count = find_piece(table, pieces, 2 + LISTS, PIECE)
    if SKIP:
        count = tl.where(tl.load(skip) == 0, count, 0)
    weight = (1.0 - tl.load(decay).to(tl.float64)).to(tl.float32)
    p_teacher = pointer(row, 0, first, TEACHER, ALIGNED)
    p_student = pointer(row, 1, first, STUDENT, ALIGNED)
    p_live = p_teacher
    if LISTS == 3:
        p_live = pointer(row, 2, first, LIVE, ALIGNED)
    o = tl.arange(0, PIECE)
    if count >= PIECE:  # without a mask, 16 bytes are read at once
        _ema_piece(p_teacher, p_student, p_live, o, None, weight, LISTS)
    else:
        _ema_piece(p_teacher, p_student, p_live, o, o < count, weight, LISTS)


@jit
def _ema_piece(p_teacher, p_student, p_live, o, m, weight, LISTS: tl.constexpr):
    b_teacher = tl.load(p_teacher + o, mask=m).to(tl.float32)
    b_student = tl.load(p_student + o, mask=m).to(tl.float32)
    b_teacher = lerp(b_teacher, b_student, weight).to(p_teacher.dtype.element_ty)
    tl.store(p_teacher + o, b_teacher, mask=m)
    if LISTS == 3:
        tl.store(p_live + o, b_teacher.to(p_live.dtype.element_ty), mask=m)


def _launch(lists: list[list[Tensor]], decay: Tensor, skip: Tensor | None) -> None:
    """One launch. All tensors are on one device, each list has one dtype, and the tensors of a row have one layout."""
    teacher, student, *live = lists
    table = address_table(lists, teacher[0].device, teacher[0])
    launch(
        _ema_kernel, (len(table.pieces),), table.rows, table.pieces, decay, decay if skip is None else skip,
        LISTS=len(lists), TEACHER=triton_dtype(teacher[0]), STUDENT=triton_dtype(student[0]),
        LIVE=triton_dtype(live[0][0] if live else teacher[0]), SKIP=skip is not None, ALIGNED=table.aligned,
        PIECE=PIECE, num_warps=8,
    )  # fmt: skip
    increment_version([*teacher, *live[0]] if live else teacher)


def torch_update(lists: list[list[Tensor]], decay: Tensor, skip: Tensor | None) -> None:
    """The same in torch. On a CPU scalars are read; elsewhere they stay on the device, since reading would wait."""
    teacher, student, *live = lists
    wide = torch.promote_types(teacher[0].dtype, student[0].dtype)
    if teacher[0].device.type == "cpu":
        if skip is not None and skip:
            return
        moved = teacher if teacher[0].dtype == wide else [t.to(wide) for t in teacher]
        _foreach_lerp_(moved, student if student[0].dtype == wide else [s.to(wide) for s in student], 1 - decay.item())
        if moved is not teacher:
            _foreach_copy_(teacher, moved)
        for copies in live:
            _foreach_copy_(copies, teacher)
        return
    moves = None if skip is None else skip.reshape(()) == 0
    wide = torch.promote_types(wide, torch.float32)
    for t, s, *copies in zip(*lists, strict=True):
        moved = torch.lerp(t.to(wide), s.to(wide), (1 - decay.to(widest(decay.device))).to(wide)).to(t.dtype)
        t.copy_(moved if moves is None else torch.where(moves, moved, t))
        for other in copies:
            other.copy_(t if moves is None else torch.where(moves, t.to(other.dtype), other))


Plan = list[tuple[bool, list[int] | None]]


def _plan(lists: list[list[Tensor]]) -> Plan:
    """The rows of each update, which have the same dtypes and device, and whether it is a launch; None for all rows."""
    buckets = defaultdict(list)
    odd = 0
    for number, row in enumerate(zip(*lists, strict=True)):
        flat = uses_triton(row[0]) and all(same_layout(row[0], tensor) for tensor in row)
        odd += uses_triton(row[0]) and not flat
        buckets[flat, row[0].device, *(tensor.dtype for tensor in row)].append(number)
    if odd:
        _announce_strides(odd, len(lists[0]))
    return [(flat, rows if len(buckets) > 1 else None) for (flat, *_), rows in buckets.items()]


def _carry_out(plan: Plan, lists: list[list[Tensor]], decay: float | Tensor, skip: Tensor | None) -> None:
    for flat, rows in plan:
        columns = lists if rows is None else [[tensors[n] for n in rows] for tensors in lists]
        teacher, student, *live = columns
        number = not isinstance(decay, Tensor)
        if number and skip is None and not live and teacher[0].dtype == student[0].dtype:
            _foreach_lerp_(teacher, student, 1 - float(decay))  # all that is asked for, and as few bytes
            continue
        device = teacher[0].device
        there = on_device(decay, device) if number else decay.to(device, non_blocking=True)
        stop = None if skip is None else skip.to(device, non_blocking=True)
        (_launch if flat else torch_update)(columns, there, stop)


def update_lists(
    teacher: list[Tensor], student: list[Tensor], live: list[Tensor], decay: Tensor, skip: Tensor | None
) -> None:
    """The operator's body: one launch, or one call of torch, for all tensors of the same dtypes and device."""
    lists = [teacher, student, live] if live else [teacher, student]
    _carry_out(_plan(lists), lists, decay, skip)


_update = torch.library.custom_op(add_op_namespace_prefix("ema_update_"), mutates_args=("teacher", "live"))(
    update_lists
)


@_update.register_fake
def _(teacher, student, live, decay, skip):
    return None


_announced: set[tuple[int, int]] = set()


def _announce_strides(odd: int, total: int) -> None:
    if (odd, total) not in _announced:
        _announced.add((odd, total))
        warnings.warn(
            f"ema_update_: {odd} of {total} teacher tensors have other strides than their students (channels_last on "
            "one side?) and are updated one by one",
            stacklevel=5,
        )


@without_gradients
def ema_update_(
    teacher: nn.Module | Iterable[Tensor],
    student: nn.Module | Iterable[Tensor],
    decay: float | Tensor,
    *,
    live: nn.Module | Iterable[Tensor] | None = None,
    buffers: Buffers = "ignore",
    skip: Tensor | None = None,
) -> None:
    """Move each teacher tensor towards its student, in place: no address changes, and nothing waits for the device.

    There is one launch for each combination of dtypes. It works in `torch.compile` and in a CUDA graph. DTensors (of
    FSDP2 for example) are updated shard by shard, without communication.

    Args:
        teacher: floating-point tensors of any shapes and strides, or a module, whose parameters are taken.
        student: tensors of the same shapes in the same order, of any floating dtype, or a module with the same names.
            Wrappers around a module (DistributedDataParallel, torch.compile, AveragedModel) are ignored.
        decay: weight of the teacher, a number in [0, 1] or a 0-dim tensor on the device. A tensor may change between
            replays of a CUDA graph; in float64, 1 - decay is exact.
        live: copies of the teacher, for example in a lower precision, written in the same pass.
        buffers: for modules, what happens to the teacher's buffers, such as batch-norm statistics: they are left alone
            (`ignore`), copied from the student (`copy`), or averaged like weights (`average`; integers are copied).
        skip: 0-dim tensor, such as the `found_inf` of a gradient scaler; unless it is zero, nothing is updated.

    Raises:
        ValueError: decay is out of range; teacher and student differ in number, names, shapes, devices or sharding; a
            tensor is not floating-point; a tensor to write to is expanded; `buffers` is unknown, or given without
            modules; an iterator is already exhausted.
    """
    _check_buffers(buffers)
    copied: list[tuple[Tensor, Tensor]] = []
    if isinstance(live, nn.Module):
        if buffers != "ignore":
            raise ValueError("buffers must be 'ignore' if live is a module, of which only parameters are updated")
        live = list(live.parameters())
    if isinstance(teacher, nn.Module) and isinstance(student, nn.Module):
        for module in (*teacher.modules(), *student.modules()):
            reshard = getattr(module, "reshard", None)
            if reshard is not None:  # FSDP2: after a forward pass without a backward, weights are still gathered
                reshard()
        pairs = _paired(teacher, student, "parameters")
        if buffers != "ignore":
            own = _paired(teacher, student, "buffers")
            averaged = [pair for pair in own if buffers == "average" and pair[0].is_floating_point()]
            copied = [pair for pair in own if buffers == "copy" or not pair[0].is_floating_point()]
            pairs += averaged
        teacher, student = [t for t, _ in pairs], [s for _, s in pairs]
    elif isinstance(teacher, nn.Module) or isinstance(student, nn.Module):
        raise ValueError("teacher and student must both be modules or both be tensors")
    else:
        if buffers != "ignore":
            raise ValueError(f"buffers = {buffers!r} needs modules")
        teacher, student = listed("teacher", teacher), listed("student", student)
        if len(teacher) != len(student):
            raise ValueError(f"{len(teacher)} teacher tensors and {len(student)} student tensors")
    live = [] if live is None else listed("live", live)
    if live and len(live) != len(teacher):
        raise ValueError(f"{len(teacher)} teacher tensors and {len(live)} live copies")
    for number, (t, s) in enumerate(copied):
        _check_alike(number, t, s)
    if not teacher:
        return
    lists = [teacher, student, live] if live else [teacher, student]
    plan = recalled("ema_update_", lists)
    if plan is None:
        for number, (t, *others) in enumerate(zip(*lists, strict=True)):
            for other in others:
                _check_pair(number, t, other)
            for written in (t, *others[1:]):
                check_written(written)
    if plan is not None or are_plain(chain(*lists)):
        if isinstance(decay, Tensor):
            as_scalar("decay", decay, teacher[0].device)
        else:
            check_unit("decay", decay)
        if plan is None:
            plan = _plan(lists)
            remember("ema_update_", lists, plan)
        _carry_out(plan, lists, decay, skip)
    else:
        students = [local(s, t, redistribute=True) for t, s in zip(teacher, student, strict=True)]
        copies = [local(copy, t) for copy, t in zip(live, teacher, strict=False)]
        decay = as_scalar("decay", decay, teacher[0].device)
        _update([local(t, t) for t in teacher], students, copies, decay, skip)
    for t, s in copied:
        t.copy_(s if skip is None else torch.where(skip.reshape(()) == 0, s, t))


def _check_buffers(buffers: str) -> None:
    if buffers not in BUFFERS:
        raise ValueError(f"buffers must be 'ignore', 'copy' or 'average', got {buffers!r}")


def _wrapped(module: nn.Module) -> nn.Module | None:
    """The only child of a module without parameters of its own, which is then a wrapper; else None."""
    children = list(module.children())
    return children[0] if len(children) == 1 and not module._parameters else None


def _named(module: nn.Module, kind: str, prefix: str = "", seen: set[Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters or buffers by name, without the names of wrappers."""
    seen = set() if seen is None else seen
    named = {}
    for name, tensor in getattr(module, f"_{kind}").items():
        if tensor is not None and tensor not in seen:  # shared ones are listed once
            seen.add(tensor)
            named[prefix + name] = tensor
    # a wrapper's name is left out, unless it has tensors of its own: their names could clash with its child's
    wraps = _wrapped(module) is not None and not getattr(module, f"_{kind}")
    for name, child in module.named_children():
        named |= _named(child, kind, prefix if wraps else f"{prefix}{name}.", seen)
    return named


def _paired(teacher: nn.Module, student: nn.Module, kind: str) -> list[tuple[Tensor, Tensor]]:
    own, theirs = _named(teacher, kind), _named(student, kind)
    differing = own.keys() ^ theirs.keys()
    inner = student
    while own.keys() != theirs.keys() and (inner := _wrapped(inner)) is not None:
        theirs = _named(inner, kind)  # without the buffers of a wrapper, such as AveragedModel's count of updates
    if own.keys() != theirs.keys():
        raise ValueError(f"teacher and student differ in their {kind}: only one of them has {sorted(differing)[0]}")
    return [(tensor, theirs[name]) for name, tensor in own.items()]


def _check_alike(number: int, teacher: Tensor, student: Tensor) -> None:
    if teacher.shape != student.shape or teacher.device != student.device:
        raise ValueError(
            f"teacher tensor {number} is {list(teacher.shape)} on {teacher.device}, "
            f"its student {list(student.shape)} on {student.device}"
        )


def _check_pair(number: int, teacher: Tensor, student: Tensor) -> None:
    _check_alike(number, teacher, student)
    if not (teacher.dtype in FLOATS and student.dtype in FLOATS):
        raise ValueError(
            f"tensor {number} must be floating-point, of 16 to 64 bits, got {teacher.dtype} and {student.dtype}"
        )


def cosine_decay(step: Tensor, *, start: float, end: float = 1.0, total_steps: int) -> Tensor:
    """Decay at a step: a half cosine from `start` at step 0 to `end` at step `total_steps - 1`, computed on the device.

    Args:
        step: integer, 0-dim, on any device; after the last step the decay stays at `end`.
        start, end: numbers in [0, 1].
        total_steps: number of steps of the schedule, positive.

    Returns:
        float64 (float32 on Apple's GPUs), 0-dim, on the device of `step`.

    Raises:
        ValueError: a number is out of range.

    Source: BYOL (arXiv 2006.07733), section 3.2.
    """
    check_unit("start", start)
    check_unit("end", end)
    check_positive(total_steps=total_steps)
    check_tensors(step=step)
    progress = (step.to(widest(step.device)) / max(total_steps - 1, 1)).clamp(max=1.0)
    return end - (end - start) * (1 + torch.cos(math.pi * progress)) / 2


class EMA(nn.Module):
    """A teacher that follows a student: a copy of the module, updated by `ema_update_`, and a decay on the device.

    Args:
        student: the module to copy, with its memory layout. If it is wrapped in DistributedDataParallel, DataParallel
            or torch.compile, only the module inside is copied; compile the EMA itself if it should be compiled.
        decay: weight of the teacher, in [0, 1]. A schedule writes to the buffer `decay`.
        buffers: as in `ema_update_`.

    Raises:
        ValueError: the student has no parameters, has one that is not floating-point, or cannot be copied, for example
            because FSDP has sharded it; decay is out of range; `buffers` is unknown.
    """

    decay: Tensor

    def __init__(self, student: nn.Module, decay: float | Tensor = 0.996, *, buffers: Buffers = "ignore"):
        super().__init__()
        _check_buffers(buffers)
        check_decay("decay", decay)
        parameters = dict(student.named_parameters())
        if not parameters:
            raise ValueError(f"the student, {type(student).__name__}, has no parameters to average")
        for name, parameter in parameters.items():
            if parameter.dtype not in FLOATS:
                raise ValueError(f"{name} must be floating-point, of 16 to 64 bits, got {parameter.dtype}")
        while True:
            if isinstance(student, nn.parallel.DistributedDataParallel | nn.DataParallel):
                student = student.module
            elif isinstance(compiled := getattr(student, "_orig_mod", None), nn.Module):
                student = compiled
            else:
                break
        try:
            self.teacher = copy.deepcopy(student)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(
                f"the student, {type(student).__name__}, cannot be copied ({error}); "
                "if FSDP has sharded it, make the EMA first and then shard both alike"
            ) from error
        self.teacher.requires_grad_(False)
        self.buffers_policy: Buffers = buffers
        device = next(iter(parameters.values())).device
        device = torch.device("cpu") if device.type == "meta" else device
        self.register_buffer("decay", as_scalar("decay", decay, device))

    @property
    def module(self) -> nn.Module:
        """The teacher, under the name that timm's ModelEmaV3 and torch's AveragedModel use."""
        return self.teacher

    def forward(self, *args, **kwargs):
        """The teacher's output."""
        return self.teacher(*args, **kwargs)

    def _apply(self, function, recurse: bool = True):
        """Keep the decay in float64 when the module is cast: in bfloat16, 0.9999 is 1 and the teacher would not move.

        If the module moves to the meta device, which holds no values, the decay stays where it was.
        """
        decay = self.decay
        super()._apply(function, recurse)
        device = self.decay.device
        self.decay = decay if device.type == "meta" else decay.to(device)
        return self

    def __getstate__(self) -> dict:
        """Save the decay as a number too: `torch.load(map_location="meta")` restores the buffer without a value."""
        known = type(self.decay) is Tensor and not self.decay.is_meta
        return {**self.__dict__, "_saved_decay": self.decay.item() if known else None}

    def __setstate__(self, state: dict) -> None:
        saved = state.pop("_saved_decay", None)
        super().__setstate__(state)
        if self.decay.is_meta and saved is not None:
            self.decay = torch.full_like(self.decay, saved, device="cpu")

    def update(self, student: nn.Module, skip: Tensor | None = None) -> None:
        """Move the teacher one step towards the student, which may be wrapped; call it after the optimiser's step."""
        ema_update_(self.teacher, student, self.decay, buffers=self.buffers_policy, skip=skip)
