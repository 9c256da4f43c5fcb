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
from collections.abc import Mapping
from itertools import chain
from typing import Any, TypeAlias

import torch
from torch import (
    Tensor,
    _foreach_add_,  # pyright: ignore[reportPrivateImportUsage]
    _foreach_sub_,  # pyright: ignore[reportPrivateImportUsage]
    _fused_adamw_,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.autograd.graph import increment_version

from ._ops import add_op_namespace_prefix
from .ema import lerp, torch_update, update_lists
from .internal.arguments import on_device
from .internal.backend import cdiv, jit, launch, tl, triton_dtype, uses_triton
from .internal.multi_tensor import (
    PIECE,
    address_table,
    find_piece,
    kept,
    local,
    pointer,
    recalled,
    remember,
    same_layout,
    sent,
)
from .internal.transforms import are_plain

__all__ = ["adamw_ema_", "adamw_ema_reference", "step_group"]

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
    o = tl.arange(0, PIECE)
    if count >= PIECE:  # without a mask, 16 bytes are read at once
        _adamw_ema_piece(
            p_parameter, p_grad, p_m, p_v, p_teacher, o, None, step_size, inverse_root_bias2, rest1, beta2, rest2,
            eps, shrink, weight, scale, TAUGHT, GRAD_SCALE,
        )  # fmt: skip
    else:
        _adamw_ema_piece(
            p_parameter, p_grad, p_m, p_v, p_teacher, o, o < count, step_size, inverse_root_bias2, rest1, beta2,
            rest2, eps, shrink, weight, scale, TAUGHT, GRAD_SCALE,
        )  # fmt: skip


@jit
def _adamw_ema_piece(
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
    settings: Settings, lasting: Tensor,
) -> None:  # fmt: skip
    """Two launches. All tensors are on one device, each list has one dtype, each row one layout.

    `lasting` is one of the parameters, while `lists` can have a copy of it.
    """
    params, grads, *_, last = lists
    device = params[0].device
    table = address_table(lists, device, lasting)
    scalars = torch.empty((len(params), 2), dtype=torch.float32, device=device)
    if not isinstance(settings, Tensor):
        numbers = settings
        settings = kept(
            numbers, device, lasting, lambda: sent(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device)
        )
    flag, divisor = lr if found_inf is None else found_inf, lr if grad_scale is None else grad_scale
    layout = {"COLUMNS": 2 + len(lists), "FOUND_INF": found_inf is not None}
    launch(
        _advance_kernel, (cdiv(len(params), 128),), table.rows, scalars, lr, settings, flag, len(params),
        **layout, BLOCK=128,
    )  # fmt: skip
    launch(
        _adamw_ema_kernel, (len(table.pieces),), table.rows, table.pieces, scalars, lr, settings, ema_decay, flag,
        divisor, **layout, TAUGHT=len(lists) == 6, PARAMETER=triton_dtype(params[0]), GRAD=triton_dtype(grads[0]),
        TEACHER=triton_dtype(last[0]), GRAD_SCALE=grad_scale is not None, ALIGNED=table.aligned, PIECE=PIECE,
        num_warps=8,
    )  # fmt: skip


def _torch_step(
    lists: list[list[Tensor]], lr: Tensor, ema_decay: Tensor, found_inf: Tensor | None, grad_scale: Tensor | None,
    settings: Settings, lasting: Tensor,
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
    settings: Settings, lasting: Tensor,
) -> None:  # fmt: skip
    device = lists[0][0].device
    numbers = [number.to(device, non_blocking=True) for number in (lr, ema_decay)]
    scaler = [None if flag is None else flag.to(device, non_blocking=True) for flag in (found_inf, grad_scale)]
    (_launches if uses_triton(lists[0][0]) else _torch_step)(
        lists, *numbers, *scaler, settings=settings, lasting=lasting
    )
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
        _update(columns, lr, ema_decay, found_inf, grad_scale, settings, lists[0][rows[0][0]])
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


def step_group(
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
            _update(columns, *scalars, settings, columns[0][0])
        return
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError("AdamWEMA does not support sparse gradients")
    if are_plain(chain(*lists)):
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
