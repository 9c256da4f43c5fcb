"""AdamW and the teacher's moving average in one pass over memory: 36 bytes per parameter instead of 40 in two passes.

    θ <- (1 - lr λ) θ
    m <- β₁ m + (1 - β₁) g        v <- β₂ v + (1 - β₂) g²
    θ <- θ - lr / (1 - β₁ᵏ) m / (√v / √(1 - β₂ᵏ) + ε)
    t <- decay t + (1 - decay) θ

k counts the steps of a parameter, λ is the weight decay, and t is the teacher of θ.

Source: AdamW (arXiv 1711.05101), algorithm 2, in torch.optim.AdamW's order of operations; ema.py for the last line.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, TypeAlias

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sub_,  # pyright: ignore[reportPrivateImportUsage]
    _fused_adamw_,  # pyright: ignore[reportPrivateImportUsage]
    nn,
)
from torch.autograd.graph import increment_version
from torch.optim import Optimizer

from ._ops import add_op_namespace_prefix
from .ema import FLOATS, ema_update_, lerp, torch_update, update_lists
from .internal.arguments import as_number, as_scalar, check_decay, check_unit, check_written, listed, on_device
from .internal.backend import jit, launch, tl, triton, triton_dtype, uses_triton
from .internal.checks import readable
from .internal.multi_tensor import (
    PIECE,
    address_table,
    are_plain,
    find_piece,
    kept,
    local,
    pointer,
    recalled,
    remember,
    same_layout,
    sent,
)

__all__ = ["AdamWEMA", "adamw_ema_", "adamw_ema_reference"]

Settings: TypeAlias = tuple[float, ...] | Tensor  # betas, eps and weight decay


def adamw_ema_reference(
    parameter: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int, teacher: Tensor,
    *, lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, ema_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The plain formulas: parameter, moments and teacher after step number `step`, counted from 1."""
    parameter = (1 - lr * weight_decay) * parameter
    m = beta1 * m + (1 - beta1) * grad
    v = beta2 * v + (1 - beta2) * grad**2
    parameter = parameter - lr / (1 - beta1**step) * m / ((v / (1 - beta2**step)).sqrt() + eps)
    return parameter, m, v, ema_decay * teacher + (1 - ema_decay) * parameter


@jit
def _advance_kernel(
    table,  # pointer to int64 [T, 2 + lists], as in _adamw_ema_kernel; the steps are float32
    scalars,  # pointer to float32 [T, 2]: lr / (1 - β₁ᵏ) and 1 / √(1 - β₂ᵏ)
    lr,  # pointer to a float64 or float32
    settings,  # pointer to float64 [4]: β₁, β₂, ε, λ
    found_inf,  # pointer to a number: the step is counted only if it is zero
    T,
    COLUMNS: tl.constexpr,
    FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = o < T
    p_step = tl.load(table + COLUMNS * o + 6, mask=m, other=0).to(tl.pointer_type(tl.float32))
    b_step = tl.load(p_step, mask=m, other=0.0)
    if FOUND_INF:
        b_step += tl.where(tl.load(found_inf) == 0, 1.0, 0.0)
    else:
        b_step += 1.0
    tl.store(p_step, b_step, mask=m)
    b_step = tl.maximum(b_step, 1.0).to(tl.float64)  # float32 would cancel in 1 - βᵏ; at 0 steps it is not used
    b_bias1 = 1.0 - tl.exp2(b_step * tl.log2(tl.load(settings)))
    b_bias2 = 1.0 - tl.exp2(b_step * tl.log2(tl.load(settings + 1)))
    tl.store(scalars + 2 * o, (tl.load(lr).to(tl.float64) / b_bias1).to(tl.float32), mask=m)
    tl.store(scalars + 2 * o + 1, (1.0 / tl.sqrt(b_bias2)).to(tl.float32), mask=m)


@jit
def _adamw_ema_kernel(
    table,  # pointer to int64 [T, 2 + lists]: parameter, gradient, m, v, step, and teacher if there are teachers
    pieces,  # pointer to int32: the row of each program's piece
    scalars,  # pointer to float32 [T, 2], from _advance_kernel
    lr,  # pointer to a float64 or float32
    settings,  # pointer to float64 [4]: β₁, β₂, ε, λ
    ema_decay,  # pointer to a float64 or float32
    found_inf,  # pointer to a number: nothing is written unless it is zero
    grad_scale,  # pointer to a number; gradients are divided by it in place
    COLUMNS: tl.constexpr,
    TAUGHT: tl.constexpr,
    PARAMETER: tl.constexpr,  # dtypes; the moments have the parameter's
    GRAD: tl.constexpr,
    TEACHER: tl.constexpr,
    FOUND_INF: tl.constexpr,
    GRAD_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_tensor, row, first, count = find_piece(table, pieces, COLUMNS, PIECE)
    if FOUND_INF:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    step_size = tl.load(scalars + 2 * i_tensor)
    inverse_root_bias2 = tl.load(scalars + 2 * i_tensor + 1)
    rest1 = (1.0 - tl.load(settings)).to(tl.float32)
    beta2 = tl.load(settings + 1).to(tl.float32)
    rest2 = (1.0 - tl.load(settings + 1)).to(tl.float32)
    eps = tl.load(settings + 2).to(tl.float32)
    shrink = (1.0 - tl.load(lr).to(tl.float64) * tl.load(settings + 3)).to(tl.float32)
    weight = (1.0 - tl.load(ema_decay).to(tl.float64)).to(tl.float32)
    scale = 1.0
    if GRAD_SCALE:
        scale = tl.load(grad_scale).to(tl.float32)
    p_parameter = pointer(row, 0, first, PARAMETER, ALIGNED)
    p_grad = pointer(row, 1, first, GRAD, ALIGNED)
    p_m = pointer(row, 2, first, PARAMETER, ALIGNED)
    p_v = pointer(row, 3, first, PARAMETER, ALIGNED)
    p_teacher = p_parameter
    if TAUGHT:
        p_teacher = pointer(row, 5, first, TEACHER, ALIGNED)
    for start in range(0, PIECE, BLOCK):
        o = start + tl.arange(0, BLOCK)
        if count >= PIECE:  # without a mask, 16 bytes are read at once
            _adamw_ema_block(
                p_parameter, p_grad, p_m, p_v, p_teacher, o, None, step_size, inverse_root_bias2, rest1, beta2, rest2,
                eps, shrink, weight, scale, TAUGHT, GRAD_SCALE,
            )  # fmt: skip
        else:
            _adamw_ema_block(
                p_parameter, p_grad, p_m, p_v, p_teacher, o, o < count, step_size, inverse_root_bias2, rest1, beta2,
                rest2, eps, shrink, weight, scale, TAUGHT, GRAD_SCALE,
            )  # fmt: skip


@jit
def _adamw_ema_block(
    p_parameter, p_grad, p_m, p_v, p_teacher, o, m, step_size, inverse_root_bias2, rest1, beta2, rest2, eps, shrink,
    weight, scale, TAUGHT: tl.constexpr, GRAD_SCALE: tl.constexpr,
):  # fmt: skip
    b_parameter = tl.load(p_parameter + o, mask=m).to(tl.float32)
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)
    b_m = tl.load(p_m + o, mask=m).to(tl.float32)
    b_v = tl.load(p_v + o, mask=m).to(tl.float32)
    if GRAD_SCALE:
        b_grad = b_grad / scale
        tl.store(p_grad + o, b_grad.to(p_grad.dtype.element_ty), mask=m)
    b_m = lerp(b_m, b_grad, rest1)
    b_v = b_v * beta2 + b_grad * b_grad * rest2
    b_parameter = b_parameter * shrink - step_size * b_m / (tl.sqrt(b_v) * inverse_root_bias2 + eps)
    b_stored = b_parameter.to(p_parameter.dtype.element_ty)
    tl.store(p_parameter + o, b_stored, mask=m)
    tl.store(p_m + o, b_m.to(p_m.dtype.element_ty), mask=m)
    tl.store(p_v + o, b_v.to(p_v.dtype.element_ty), mask=m)
    if TAUGHT:  # the teacher follows what was stored
        b_teacher = lerp(tl.load(p_teacher + o, mask=m).to(tl.float32), b_stored.to(tl.float32), weight)
        tl.store(p_teacher + o, b_teacher.to(p_teacher.dtype.element_ty), mask=m)


def _launches(
    lists: list[list[Tensor]], lr: Tensor, ema_decay: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None,
    settings: Settings,
) -> None:  # fmt: skip
    """Two launches. All tensors are on one device, each list has one dtype, each row one layout."""
    params, grads, *_, last = lists
    device = params[0].device
    table = address_table(lists, device)
    scalars = torch.empty((len(params), 2), dtype=torch.float32, device=device)
    if not isinstance(settings, Tensor):
        numbers = settings
        settings = kept(numbers, device, lambda: sent(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device))
    flag, divisor = lr if found_inf is None else found_inf, lr if grad_scale is None else grad_scale
    layout = {"COLUMNS": 2 + len(lists), "FOUND_INF": found_inf is not None}
    launch(
        _advance_kernel, (triton.cdiv(len(params), 128),), table.rows, scalars, lr, settings, flag, len(params),
        **layout, BLOCK=128,
    )  # fmt: skip
    launch(
        _adamw_ema_kernel, (len(table.pieces),), table.rows, table.pieces, scalars, lr, settings, ema_decay, flag,
        divisor, **layout, TAUGHT=len(lists) == 6, PARAMETER=triton_dtype(params[0]), GRAD=triton_dtype(grads[0]),
        TEACHER=triton_dtype(last[0]), GRAD_SCALE=grad_scale is not None, ALIGNED=table.aligned, PIECE=PIECE,
        BLOCK=1024,
    )  # fmt: skip


def _torch_step(
    lists: list[list[Tensor]], lr: Tensor, ema_decay: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None,
    settings: Settings,
) -> None:  # fmt: skip
    """The same in two passes: torch's fused AdamW, then the update of the teachers."""
    params, grads, exp_avgs, exp_avg_sqs, steps, *teachers = lists
    on_cpu = params[0].device.type == "cpu"
    if on_cpu and found_inf is not None and found_inf:
        return
    found_inf = None if on_cpu else found_inf
    beta1, beta2, eps, weight_decay = settings.tolist() if isinstance(settings, Tensor) else settings
    _foreach_add_(steps, [torch.ones_like(steps[0])] * len(steps))  # a number would become a tensor for each of them
    _fused_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, [], steps, lr=lr.item() if on_cpu else lr.float(), beta1=beta1,
        beta2=beta2, weight_decay=weight_decay, eps=eps, amsgrad=False, maximize=False, grad_scale=grad_scale,
        found_inf=found_inf,
    )  # fmt: skip
    if found_inf is not None:
        _foreach_sub_(steps, [found_inf] * len(steps))
    if teachers:
        torch_update([*teachers, params], ema_decay, found_inf)


def _update(
    lists: list[list[Tensor]], lr: Tensor, ema_decay: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None,
    settings: Settings,
) -> None:  # fmt: skip
    device = lists[0][0].device
    numbers = [number.to(device, non_blocking=True) for number in (lr, ema_decay)]
    scaler = [None if flag is None else flag.to(device, non_blocking=True) for flag in (found_inf, grad_scale)]
    (_launches if uses_triton(lists[0][0]) else _torch_step)(lists, *numbers, *scaler, settings=settings)
    # torch's fused step does not say to autograd what it writes, and neither does a launch
    written = lists if grad_scale is not None else [tensors for tensors in lists if tensors is not lists[1]]
    increment_version([tensor for tensors in written for tensor in tensors])


def _step_lists(
    lists: list[list[Tensor]], lr: Tensor, ema_decay: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None,
    settings: Settings,
) -> list[list[int]] | None:  # fmt: skip
    """One step; returns the rows of each update, or None if some tensors could not be updated as they are."""
    buckets = defaultdict(list)
    apart = []  # teachers of other strides than their parameter's, or in float64, which the kernel does not have
    written_back, scaled_back = [], []
    for number, (p, g, m, v, step, *teacher) in enumerate(zip(*lists, strict=True)):
        if not p.dtype == m.dtype == v.dtype:
            raise ValueError(f"a parameter is {p.dtype}, its moments {m.dtype} and {v.dtype}: they must be alike")
        if teacher and (teacher[0].dtype == torch.float64 != p.dtype or not same_layout(p, teacher[0])):
            apart.append((teacher.pop(), p))
        flat = _like(p, p, p.dtype, written_back)  # torch's fused step ignores strides
        grad = _like(g, flat, g.dtype if uses_triton(p) else p.dtype, scaled_back)  # and this dtype
        moments = [_like(moment, flat, p.dtype, written_back) for moment in (m, v)]
        kind = (p.device, p.dtype, grad.dtype, *(t.dtype for t in teacher))
        buckets[kind].append((number, (flat, grad, *moments, step, *teacher)))
    for rows in buckets.values():
        columns = [list(column) for column in zip(*(row for _, row in rows), strict=True)]
        _update(columns, lr, ema_decay, found_inf, grad_scale, settings)
    for tensor, flat in written_back:
        tensor.copy_(flat)
    for g, flat in scaled_back if grad_scale is not None else ():
        once = tuple(slice(None, None if stride else 1) for stride in g.stride())  # without repeats, if it is expanded
        g[once].copy_(flat[once])
    update_lists([teacher for teacher, _ in apart], [p for _, p in apart], [], ema_decay, found_inf)
    if apart or written_back or scaled_back:
        return None
    return [[number for number, _ in rows] for rows in buckets.values()]


def _like(tensor: Tensor, other: Tensor, dtype: torch.dtype, written_back: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The tensor, or a dense copy in the other's layout, which is added to the list of copies to write back."""
    if tensor.dtype == dtype and same_layout(tensor, other):
        return tensor
    copy = tensor.contiguous() if tensor is other else torch.empty_like(other, dtype=dtype).copy_(tensor)
    written_back.append((tensor, copy))
    return copy


@torch.library.custom_op(
    add_op_namespace_prefix("adamw_ema_"),
    mutates_args=("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "teachers"),
)
def adamw_ema_(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor],
    steps: list[Tensor], teachers: list[Tensor], lr: Tensor, ema_decay: Tensor, found_inf: Tensor | None,
    grad_scale: Tensor | None, settings: Tensor,
) -> None:  # fmt: skip
    """One step of AdamW on lists of tensors, and of their teachers' moving average, in place.

    Args:
        params: T floating-point tensors.
        grads: their gradients, of the same shapes; divided by `grad_scale` in place if it is given.
        exp_avgs: first moments, of the parameters' shapes and dtypes.
        exp_avg_sqs: second moments, of the parameters' shapes and dtypes.
        steps: T float32 scalars, the number of steps so far; incremented.
        teachers: T tensors of the parameters' shapes, of any floating dtype; or none.
        lr: learning rate, 0-dim, on the device; so are the other scalars.
        ema_decay: weight of the teacher, 0-dim; in float64, 1 - decay is exact.
        found_inf: unless it is zero, nothing is updated; None always updates.
        grad_scale: divisor of the gradients; None divides nothing.
        settings: betas, eps and weight_decay as in torch.optim.AdamW, float64 [4], on the CPU or on the device of the
            parameters. A tensor, since `torch.compile` would make a graph for each value of a Python number.
    """
    lists = [params, grads, exp_avgs, exp_avg_sqs, steps, *([teachers] if teachers else [])]
    numbers = tuple(settings.tolist()) if settings.device.type == "cpu" else settings
    _step_lists(lists, lr, ema_decay, found_inf, grad_scale, numbers)


@adamw_ema_.register_fake
def _(params, grads, exp_avgs, exp_avg_sqs, steps, teachers, *settings):
    return None


class AdamWEMA(Optimizer):
    """torch.optim.AdamW that updates the parameters' teachers (moving averages) in the same pass.

    A drop-in for `torch.optim.AdamW(..., fused=True)`: it takes the same arguments in the same order and has the same
    state, so that either loads the other's `state_dict`. It cooperates with `GradScaler` in the same way: gradients are
    unscaled within the step, and a skipped step also skips the teachers. Parameters that FSDP2 has sharded are stepped
    shard by shard, and so are their teachers, which must be sharded alike. No call is needed after `step()`.

    Args:
        params: as in any torch optimiser.
        lr: learning rate; a 0-dim tensor on the device may change between replays of a CUDA graph.
        betas, eps, weight_decay: as in torch.optim.AdamW.
        amsgrad, maximize, foreach, differentiable: as in torch.optim.AdamW, but only the defaults are supported.
        capturable: ignored, since every step can be captured in a CUDA graph.
        fused: must be True or None.
        ema_decay: weight of the teacher, a number in [0, 1] or a 0-dim tensor on the device, preferably float64. It is
            also a key of each parameter group, so that schedules can write to it.
        teacher: pairs of a parameter and its teacher, a tensor of the same shape in any floating dtype. Parameters
            without a pair have no teacher; this includes those added later. An empty list means no teachers at all.
            Teachers given here are saved with the module that owns them, not with the optimiser. None gives every
            parameter a teacher: a float32 copy made at its first step, kept in the optimiser's state under `ema`.

    If FSDP2 shards the teachers' module, call `fully_shard(..., reshard_after_forward=True)`: without a backward pass
    its root module would otherwise keep the weights gathered in the first forward pass. With
    torch.distributed.checkpoint, load the teachers after the optimiser's state, since loading that makes a step.

    Raises:
        ValueError: a number is out of range; an option is not supported; a teacher does not fit its parameter, or
            shares memory with a parameter or another teacher; `teacher` is an exhausted iterator. In `step()`: a
            parameter that has a teacher is no longer in any group.

    Example:
        >>> teacher = copy.deepcopy(encoder).requires_grad_(False)
        >>> pairs = zip(encoder.parameters(), teacher.parameters(), strict=True)
        >>> optimizer = AdamWEMA(model.parameters(), lr=1e-3, ema_decay=0.996, teacher=pairs)
    """

    _step_supports_amp_scaling = True  # makes GradScaler pass grad_scale and found_inf

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = True,
        ema_decay: float | Tensor = 0.996,
        teacher: Iterable[tuple[Tensor, Tensor]] | None = None,
    ):
        self._teachers = None if teacher is None else _pairs(teacher)
        defaults = {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad,
            "maximize": maximize, "foreach": foreach, "capturable": capturable, "differentiable": differentiable,
            "fused": fused is None or fused, "ema_decay": ema_decay,
        }  # fmt: skip
        super().__init__(params, defaults)
        self._find_taught("not in params")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_teachers": self._teachers}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in any torch optimiser.

        Raises:
            ValueError: a number is out of range; an option or a dtype is not supported; a teacher shares memory with
                one of the parameters.
        """
        super().add_param_group(param_group)
        try:
            _check_group(self.param_groups[-1])
            if self._teachers:
                _check_apart(self.param_groups[-1]["params"], self._teachers.values())
        except ValueError:
            self.param_groups.pop()
            raise

    def teacher_of(self, parameter: Tensor) -> Tensor | None:
        """The teacher of a parameter; None if it has none, or before the first step makes one."""
        return self.state.get(parameter, {}).get("ema") if self._teachers is None else self._teachers.get(parameter)

    def _find_taught(self, lost: str) -> None:
        """Raise unless every parameter that has a teacher is in a group; `lost` says what the others are."""
        if self._teachers is not None:
            taught = self._teachers
        elif torch.compiler.is_compiling():  # a loop over the state would be recompiled for every new gradient
            return
        else:
            taught = {p for p, state in self.state.items() if "ema" in state}
        total, found = len(taught), sum(p in taught for group in self.param_groups for p in group["params"])
        if found < total:
            raise ValueError(f"{total - found} of {total} teachers follow parameters that are {lost}")

    @torch.no_grad()
    def step(self, closure=None):
        """Make one step. Parameters without a gradient do not change, but their teachers still move towards them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        self._find_taught("no longer in any group: make a new optimiser after replacing parameters")
        for group in self.param_groups:
            _check_options(group)
            _check_numbers(group)
        for group in self.param_groups:
            params = group["params"]
            idle = [(t, p) for p in params if p.grad is None and (t := self.teacher_of(p)) is not None]
            active = [p for p in params if p.grad is not None]
            if not active and not idle:
                continue
            ema_decay = as_scalar("ema_decay", group["ema_decay"], params[0].device)
            states = [self._started(p) for p in active]
            given = self._teachers
            teachers = [state["ema"] for state in states] if given is None else [given.get(p) for p in active]
            lists = [active, [p.grad for p in active]]
            lists += [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
            for taught, columns in ((True, [*lists, teachers]), (False, lists)):
                chosen = [(t is not None) == taught for t in teachers]
                if any(chosen):
                    columns = [list(compress(column, chosen)) for column in columns]
                    _step_group(columns, group, ema_decay, found_inf, grad_scale)
            if idle:
                ema_update_([t for t, _ in idle], [p for _, p in idle], ema_decay, skip=found_inf)
        return loss

    def _started(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        if self._teachers is None and "ema" not in state:
            state["ema"] = self._wide(p)
        return state

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        """A copy in float32 or more: in bfloat16 a teacher would hardly move."""
        return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the state by that of `state_dict`, which may also come from torch.optim.AdamW.

        Teachers stay in float32. Learning rates and decays that are tensors are written in place.

        Raises:
            ValueError: the state comes from an AdamW with options that are not supported here (amsgrad, maximize).
        """
        for group in state_dict["param_groups"]:
            _check_options({name: group.get(name) for name in ("amsgrad", "maximize")})
        mine = [{**group} for group in self.param_groups]
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(numbers, parameters, strict=True):
            saved, state = state_dict["state"].get(number, {}), self.state.get(p, {})
            if "step" in state:  # the base class does not move it to the device
                state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device).clone()
            if "ema" in saved:  # the base class casts it to the parameter's dtype
                state["ema"] = self._wide(saved["ema"]).to(p.device)
        for group, before in zip(self.param_groups, mine, strict=True):
            for key, value in before.items():
                if isinstance(value, Tensor):
                    value.copy_(torch.as_tensor(group.get(key, value)))
                    group[key] = value
                elif key in (
                    "foreach",
                    "capturable",
                    "differentiable",
                    "fused",
                ):  # how the step is computed, not its result
                    group[key] = value
                else:
                    group.setdefault(key, value)


def _check_options(group: Mapping[str, Any]) -> None:
    for option in ("amsgrad", "maximize", "foreach", "differentiable"):
        if group.get(option):
            raise ValueError(
                f"a group has {option}=True, which AdamWEMA does not support: use torch.optim.AdamW and ema_update_"
            )
    if not group.get("fused", True):
        raise ValueError("fused must be True: otherwise use torch.optim.AdamW and ema_update_")


def _check_numbers(group: Mapping[str, Any], wait: bool = False) -> None:
    """Raise for numbers out of range. Those on a device are read only if `wait`, since reading them waits for it."""
    if torch.compiler.is_compiling():
        return
    for name in ("lr", "eps", "weight_decay"):
        value = group[name]
        if isinstance(value, Tensor) and not (wait or readable(value)):
            continue
        if not as_number(name, value.squeeze() if isinstance(value, Tensor) else value) >= 0:  # nor NaN
            raise ValueError(f"{name} must be at least 0, got {value}")
    try:
        betas = list(group["betas"])
    except TypeError:
        betas = []
    if len(betas) != 2 or not all(0 <= as_number("betas", beta) < 1 for beta in betas):
        raise ValueError(f"betas must be in [0, 1), one for each moment, got {group['betas']}")
    (check_decay if wait else check_unit)("ema_decay", group["ema_decay"])


def _check_group(group: Mapping[str, Any]) -> None:
    _check_options(group)
    _check_numbers(group, wait=True)
    for p in group["params"]:
        if p.is_complex():
            raise ValueError(f"parameters must be floating-point, got {p.dtype}")


def _step_group(
    lists: list[list[Tensor]], group: Mapping[str, Any], ema_decay: Tensor, found_inf: Tensor | None,
    grad_scale: Tensor | None,
) -> None:  # fmt: skip
    """A step of parameters that all have teachers, or that all have none."""
    params, grads, exp_avgs, exp_avg_sqs, steps, *teachers = lists
    lr = group["lr"] if isinstance(group["lr"], Tensor) else on_device(group["lr"], params[0].device)
    scalars = lr, ema_decay, found_inf, grad_scale
    settings = (*group["betas"], group["eps"], group["weight_decay"])
    if (plan := recalled("adamw_ema_", lists)) is not None:
        settings = tuple(map(float, settings))
        for rows in plan:
            columns = lists if len(plan) == 1 else [[tensors[number] for number in rows] for tensors in lists]
            _update(columns, *scalars, settings)
        return
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError("AdamWEMA does not support sparse gradients")
    if are_plain(lists):
        plan = _step_lists(lists, *scalars, tuple(map(float, settings)))
        if plan is not None:
            remember("adamw_ema_", lists, plan)
        return
    adamw_ema_(
        [local(p, p) for p in params],
        [local(grad, p, redistribute=True) for grad, p in zip(grads, params, strict=True)],
        [local(m, p) for m, p in zip(exp_avgs, params, strict=True)],
        [local(v, p) for v, p in zip(exp_avg_sqs, params, strict=True)],
        steps,
        [local(t, p) for t, p in zip(*teachers, params, strict=True)] if teachers else [],
        *scalars,
        _as_tensor(settings, params[0]),
    )


def _as_tensor(settings: tuple[Any, ...], parameter: Tensor) -> Tensor:
    """Betas, eps and weight decay as float64 [4]. In torch.compile they are inputs of the graph, on the device."""
    if not torch.compiler.is_compiling():
        return torch.tensor(tuple(map(float, settings)), dtype=torch.float64, device="cpu")
    kernels = parameter.is_cuda and parameter.dtype != torch.float64  # torch's fused step reads them on the host
    device = parameter.device if kernels else torch.device("cpu")
    return torch.stack([on_device(number, device) for number in settings])


@torch.no_grad()
def _check_apart(parameters: Iterable[Tensor], teachers: Iterable[Tensor]) -> None:
    """Raise if a teacher shares memory with a parameter or another teacher."""
    spans = []
    for taught, tensors in enumerate((parameters, teachers)):
        for tensor in tensors:
            here = local(tensor, tensor)
            if type(here) in (Tensor, nn.Parameter) and here.numel() and not here.is_meta:
                extent = 1 + sum(step * (size - 1) for step, size in zip(here.stride(), here.shape, strict=True))
                start = here.data_ptr()
                spans.append((start, start + extent * here.element_size(), taught, list(tensor.shape)))
    ends = [0, 0]  # where the parameters, and the teachers, that start earlier end
    for start, end, taught, shape in sorted(spans):
        if start < ends[1] or (taught and start < ends[0]):
            raise ValueError(
                f"a teacher shares memory with another tensor of shape {shape}: give each teacher a tensor of its own, "
                "from copy.deepcopy(model) for example"
            )
        ends[taught] = max(ends[taught], end)


def _pairs(teacher: Iterable[tuple[Tensor, Tensor]]) -> dict[Tensor, Tensor]:
    """Teachers by parameter.

    Raises:
        ValueError: an item is not a pair of tensors, or a teacher does not fit its parameter.
    """
    teachers = {}
    given = teacher.items() if isinstance(teacher, Mapping) else teacher
    for pair in listed("teacher", given) if isinstance(given, Iterable) else [given]:
        if not (isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(tensor, Tensor) for tensor in pair)):
            raise ValueError(
                "teacher must hold pairs of a parameter and the tensor that follows it, "
                f"zip(model.parameters(), teacher.parameters()) for example, got {type(pair).__name__}"
            )
        p, t = pair
        if p.shape != t.shape or p.device != t.device or not (p.dtype in FLOATS and t.dtype in FLOATS):
            raise ValueError(
                f"a teacher is {t.dtype} {list(t.shape)} on {t.device}, "
                f"its parameter {p.dtype} {list(p.shape)} on {p.device}"
            )
        check_written(local(t, p))
        if p in teachers:
            raise ValueError(f"a parameter of shape {list(p.shape)} has two teachers")
        teachers[p] = t
    return teachers
