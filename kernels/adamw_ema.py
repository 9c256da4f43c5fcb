"""AdamW that also moves teachers: a drop-in for `torch.optim.AdamW(fused=True)`, one pass over memory for both.

The formulas, and the step of a list of tensors, are in adamw_step.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .adamw_step import step_group
from .ema import FLOATS, ema_update_
from .internal.arguments import as_number, as_scalar, check_decay, check_unit, check_written, listed
from .internal.checks import readable
from .internal.multi_tensor import local
from .internal.transforms import without_gradients

__all__ = ["AdamWEMA"]


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
        self._taught("not in params")

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

    def _taught(self, lost: str) -> list[list[Tensor | None]]:
        """The teacher of each parameter, by group.

        Raises:
            ValueError: a parameter that has a teacher is in no group; `lost` says what such parameters are.
        """
        given, state = self._teachers, self.state
        if given is None:
            found = [[state[p].get("ema") if p in state else None for p in g["params"]] for g in self.param_groups]
            if torch.compiler.is_compiling():  # a loop over the state would be recompiled for every new gradient
                return found
            total = sum("ema" in own for own in state.values())
        else:
            found = [list(map(given.get, group["params"])) for group in self.param_groups]
            total = len(given)
        missing = total - sum(t is not None for teachers in found for t in teachers)
        if missing > 0:
            raise ValueError(f"{missing} of {total} teachers follow parameters that are {lost}")
        return found

    @without_gradients
    def step(self, closure=None):
        """Make one step. Parameters without a gradient do not change, but their teachers still move towards them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        taught = self._taught("no longer in any group: make a new optimiser after replacing parameters")
        for group in self.param_groups:
            _check_options(group)
            _check_numbers(group)
        for group, followers in zip(self.param_groups, taught, strict=True):
            params, grads = group["params"], [p.grad for p in group["params"]]
            moving = [grad is not None for grad in grads]
            idle = [
                (t, p) for t, p, moves in zip(followers, params, moving, strict=True) if t is not None and not moves
            ]
            if not any(moving) and not idle:
                continue
            ema_decay = as_scalar("ema_decay", group["ema_decay"], params[0].device)
            active = list(compress(params, moving))
            states = self._started(active)
            if self._teachers is None:
                teachers = [state["ema"] for state in states]  # of which the first step has made some
            else:
                teachers = list(compress(followers, moving))
            lists = [active, list(compress(grads, moving))]
            lists += [[state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")]
            for has_teacher, columns in ((True, [*lists, teachers]), (False, lists)):
                chosen = [(t is not None) == has_teacher for t in teachers]
                if any(chosen):
                    columns = columns if all(chosen) else [list(compress(column, chosen)) for column in columns]
                    step_group(columns, group, ema_decay, found_inf, grad_scale)
            if idle:
                ema_update_([t for t, _ in idle], [p for _, p in idle], ema_decay, skip=found_inf)
        return loss

    def _started(self, parameters: list[Tensor]) -> list[dict[str, Tensor]]:
        """The state of each parameter, made at its first step."""
        states = [self.state[p] for p in parameters]
        for p, state in zip(parameters, states, strict=True):
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            if self._teachers is None and "ema" not in state:
                state["ema"] = self._wide(p)
        return states

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
