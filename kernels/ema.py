"""Exponential moving average of a teacher's tensors: t <- decay t + (1 - decay) s.

A linear interpolation, t + (1 - decay) (s - t), so that a teacher that equals its student stays equal: in float32,
`mul` and `add` drift. A teacher in bfloat16 hardly moves at all (at decay 0.996 and weights 1 % apart, under 1 % of
them change in an update): keep it in float32, and let `live` be its copy in bfloat16, written in the same pass.

Source: momentum encoder of BYOL (arXiv 2006.07733), section 3.1; teacher of seq-JEPA (arXiv 2505.03176).
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from .backend import jit, launch, tl, triton, triton_dtype, uses_triton
from .multi_tensor import PIECE, address_table, find_piece, pointer, same_layout

__all__ = ["EMA", "cosine_decay", "ema_reference", "ema_update_"]

Buffers = Literal["ignore", "copy", "average"]


def ema_reference(teacher: Tensor, student: Tensor, decay: float) -> Tensor:
    """The formula as it stands: the new teacher, in the teacher's dtype."""
    return torch.lerp(teacher, student.to(teacher.dtype), 1.0 - decay)


@jit
def lerp(b_from, b_to, weight):
    """Linear interpolation, from the nearer end: exact at weights 0 and 1, and where both are equal."""
    near = b_from + weight * (b_to - b_from)
    far = b_to - (b_to - b_from) * (1.0 - weight)
    return tl.where(weight < 0.5, near, far)


@jit
def _ema_kernel(
    table,  # pointer to int64 [T, 2 + lists]: teacher, student, live
    decay,  # pointer to a float64 or float32
    skip,  # pointer to a number: nothing moves unless it is zero
    T,
    LISTS: tl.constexpr,
    TEACHER: tl.constexpr,  # dtypes
    STUDENT: tl.constexpr,
    LIVE: tl.constexpr,
    SKIP: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    _, row, first = find_piece(table, T, 2 + LISTS, PIECE, BLOCK_T)
    count = tl.load(row) - first
    if SKIP:
        count = tl.where(tl.load(skip) == 0, count, 0)
    weight = (1.0 - tl.load(decay).to(tl.float64)).to(tl.float32)
    for start in range(0, PIECE, BLOCK):
        o = start + tl.arange(0, BLOCK)
        m = o < count
        p_teacher = pointer(row, 0, first, TEACHER, ALIGNED) + o
        p_student = pointer(row, 1, first, STUDENT, ALIGNED) + o
        b_teacher = tl.load(p_teacher, mask=m, other=0.0).to(tl.float32)
        b_student = tl.load(p_student, mask=m, other=0.0).to(tl.float32)
        b_teacher = lerp(b_teacher, b_student, weight)
        tl.store(p_teacher, b_teacher.to(TEACHER), mask=m)
        if LISTS == 3:
            tl.store(pointer(row, 2, first, LIVE, ALIGNED) + o, b_teacher.to(LIVE), mask=m)


def _launch(
    teacher: list[Tensor], student: list[Tensor], live: list[Tensor], decay: Tensor, skip: Tensor | None
) -> None:
    """One launch over tensors of one device and layout by pairs, and one dtype in each list."""
    device = teacher[0].device
    lists = [teacher, student, live] if live else [teacher, student]
    table = address_table(lists, device)
    launch(
        _ema_kernel, (table.num_pieces,), table.rows, decay, decay if skip is None else skip, table.num_tensors,
        LISTS=len(lists), TEACHER=triton_dtype(teacher[0]), STUDENT=triton_dtype(student[0]),
        LIVE=triton_dtype(live[0] if live else teacher[0]), SKIP=skip is not None, ALIGNED=table.aligned,
        PIECE=PIECE, BLOCK=1024, BLOCK_T=triton.next_power_of_2(table.num_tensors),
    )  # fmt: skip


def _torch_update(
    teacher: list[Tensor], student: list[Tensor], live: list[Tensor], decay: Tensor, skip: Tensor | None
) -> None:
    """The same in torch; on a CPU the scalars are at hand, elsewhere they stay on the device."""
    if teacher[0].device.type == "cpu":
        if skip is not None and skip:
            return
        student = [s.to(t.dtype) for t, s in zip(teacher, student, strict=True)]
        torch._foreach_lerp_(teacher, student, 1 - decay.item())
        if live:
            torch._foreach_copy_(live, teacher)
        return
    moves = None if skip is None else skip.reshape(()) == 0
    for number, (t, s) in enumerate(zip(teacher, student, strict=True)):
        wide = torch.promote_types(t.dtype, torch.float32)
        moved = torch.lerp(t.to(wide), s.to(wide), (1 - decay.double()).to(wide)).to(t.dtype)
        t.copy_(moved if moves is None else torch.where(moves, moved, t))
        if live:
            live[number].copy_(t if moves is None else torch.where(moves, t.to(live[number].dtype), live[number]))


@torch.library.custom_op("seqjepa::ema_update_", mutates_args=("teacher", "live"))
def _update(
    teacher: list[Tensor], student: list[Tensor], live: list[Tensor], decay: Tensor, skip: Tensor | None
) -> None:
    buckets = defaultdict(lambda: ([], [], []))
    odd = 0
    for number, (t, s) in enumerate(zip(teacher, student, strict=True)):
        row = (t, s, live[number]) if live else (t, s)
        flat = uses_triton(t) and all(same_layout(t, tensor) for tensor in row)
        odd += uses_triton(t) and not flat
        for column, tensor in zip(buckets[flat, *(x.dtype for x in row), t.device], row, strict=False):
            column.append(tensor)
    for (flat, *_, device), columns in buckets.items():
        there = [None if scalar is None else scalar.to(device, non_blocking=True) for scalar in (decay, skip)]
        (_launch if flat else _torch_update)(*columns, *there)
    if odd:
        _announce_strides(odd, len(teacher))


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
            stacklevel=6,
        )


@torch.no_grad()
def ema_update_(
    teacher: nn.Module | Iterable[Tensor],
    student: nn.Module | Iterable[Tensor],
    decay: float | Tensor,
    *,
    live: nn.Module | Iterable[Tensor] | None = None,
    buffers: Buffers = "ignore",
    skip: Tensor | None = None,
) -> None:
    """Move each teacher tensor towards its student, in place: no address changes, nothing waits for the device.

    One launch for each combination of dtypes. Works in `torch.compile` and, after one call on the same tensors, in a
    CUDA graph.

    Args:
        teacher: floating-point tensors of any shapes and strides, or a module, whose parameters they are.
        student: tensors of the same shapes in the same order, of any floating dtype, or a module with the same names.
        decay: weight of the teacher in [0, 1], a number, or a 0-dim tensor on the device, which may change between
            the replays of a graph: float64 keeps 1 - decay exact.
        live: copies of the teacher, in a lower precision say, written in the same pass.
        buffers: with modules, what becomes of the teacher's buffers (batch-norm statistics): stay its own (`ignore`),
            become the student's (`copy`), or are averaged like weights (`average`; integers are copied).
        skip: 0-dim tensor, `found_inf` of a gradient scaler say; where it is not zero, the teacher stays as it is.

    Raises:
        ValueError: decay is out of range; the two differ in number, names, shapes or devices; a tensor is not
            floating-point; `buffers` is unknown, or given without modules.
    """
    if buffers not in ("ignore", "copy", "average"):
        raise ValueError(f"buffers must be 'ignore', 'copy' or 'average', got {buffers!r}")
    copied: list[tuple[Tensor, Tensor]] = []
    if isinstance(teacher, nn.Module) != isinstance(student, nn.Module):
        raise ValueError("teacher and student must both be modules or both be tensors")
    if isinstance(teacher, nn.Module):
        pairs = _paired(teacher.named_parameters(), student.named_parameters(), "parameters")
        if buffers != "ignore":
            own = _paired(teacher.named_buffers(), student.named_buffers(), "buffers")
            averaged = [pair for pair in own if buffers == "average" and pair[0].is_floating_point()]
            copied = [pair for pair in own if buffers == "copy" or not pair[0].is_floating_point()]
            pairs += averaged
        if isinstance(live, nn.Module):
            live = live.parameters()
            if buffers != "ignore":
                raise ValueError("live modules hold parameters alone: buffers must be 'ignore'")
    else:
        if buffers != "ignore":
            raise ValueError(f"buffers = {buffers!r} needs modules")
        teacher, student = list(teacher), list(student)
        if len(teacher) != len(student):
            raise ValueError(f"{len(teacher)} teacher tensors and {len(student)} student tensors")
        pairs = list(zip(teacher, student, strict=True))
    live = [] if live is None else list(live)
    if live and len(live) != len(pairs):
        raise ValueError(f"{len(pairs)} teacher tensors and {len(live)} live copies")
    for number, (t, s) in enumerate(pairs):
        _check_pair(number, t, s)
        if live:
            _check_pair(number, t, live[number])
    if not pairs:
        return
    decay = as_scalar("decay", decay, pairs[0][0].device)
    _update([t for t, _ in pairs], [s for _, s in pairs], live, decay, skip)
    for t, s in copied:
        t.copy_(s if skip is None else torch.where(skip.reshape(()) == 0, s, t))


def as_scalar(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """A number in [0, 1] as a 0-dim float64 tensor on the device, without waiting for it."""
    if isinstance(value, Tensor):
        if value.ndim or value.device != device or not value.is_floating_point():
            raise ValueError(
                f"{name} must be a floating 0-dim tensor on {device} like the teacher, "
                f"got {value.dtype} {list(value.shape)} on {value.device}"
            )
        return value
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return torch.full((), value, dtype=torch.float64, device=device)


def _paired(teacher, student, what: str) -> list[tuple[Tensor, Tensor]]:
    teacher, student = dict(teacher), dict(student)
    if teacher.keys() != student.keys():
        only = sorted(teacher.keys() ^ student.keys())[0]
        raise ValueError(f"teacher and student differ in their {what}: only one of them has {only}")
    return [(tensor, student[name]) for name, tensor in teacher.items()]


def _check_pair(number: int, teacher: Tensor, student: Tensor) -> None:
    if teacher.shape != student.shape or teacher.device != student.device:
        raise ValueError(
            f"teacher tensor {number} is {list(teacher.shape)} on {teacher.device}, "
            f"its student {list(student.shape)} on {student.device}"
        )
    if not (teacher.is_floating_point() and student.is_floating_point()):
        raise ValueError(f"tensor {number} must be floating-point, got {teacher.dtype} and {student.dtype}")


def cosine_decay(step: Tensor, *, start: float, end: float = 1.0, total_steps: int) -> Tensor:
    """Decay at a step: from `start` at 0 to `end` at `total_steps - 1` along half a cosine, on the device.

    Args:
        step: integer, 0-dim, on any device; what lies beyond the last step stays at `end`.

    Returns:
        float64, 0-dim, on the device of `step`.

    Source: BYOL (arXiv 2006.07733), section 3.2.
    """
    progress = (step.double() / max(total_steps - 1, 1)).clamp(max=1.0)
    return end - (end - start) * (1 + torch.cos(math.pi * progress)) / 2


class EMA(nn.Module):
    """A teacher that follows a student: `ema_update_` with its settings, and a decay on the device.

    Args:
        student: whose copy the teacher is at first; the copy keeps its layout in memory.
        decay: weight of the teacher; write on the buffer `decay` to schedule it.
        buffers: as `ema_update_` takes it.
    """

    def __init__(self, student: nn.Module, decay: float = 0.996, *, buffers: Buffers = "ignore"):
        super().__init__()
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.buffers_policy = buffers
        device = next(student.parameters()).device
        self.register_buffer("decay", as_scalar("decay", decay, device))

    def forward(self, *args, **kwargs):
        """The teacher's output."""
        return self.teacher(*args, **kwargs)

    def _apply(self, function, recurse: bool = True):
        """Move with the rest, but keep float64: in bfloat16 a decay of 0.9999 is 1, and the teacher stands still."""
        decay = self.decay
        super()._apply(function, recurse)
        self.decay = decay.to(self.decay.device)
        return self

    def update(self, student: nn.Module, skip: Tensor | None = None) -> None:
        """Follow the student by one step; call after the optimiser's."""
        ema_update_(self.teacher, student, self.decay, buffers=self.buffers_policy, skip=skip)
