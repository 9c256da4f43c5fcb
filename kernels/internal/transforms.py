"""Custom operators that also work under `torch.func` and in forward mode, which `torch.library.custom_op` does not.

A bare custom operator drops tangents silently, and `torch.func.grad` of one fails with an internal error of torch. So
while a transform or forward mode is active, operators are called through an `autograd.Function`. So are they on plain
tensors: then nothing needs the dispatcher, which takes longer than some kernels; without gradients the operator's body
is called by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = ["are_plain", "count_up", "differentiable", "folded", "transformed", "untraced", "without_gradients"]

P = ParamSpec("P")
R = TypeVar("R")

# torch.autograd.grad(..., is_grads_batched=True)
BATCHED_GRADIENTS: Any = torch._C._parse_dispatch_key("VmapMode")
PLAIN = (Tensor, nn.Parameter, nn.Buffer)
NUMBERS = (bool, int, float, str)  # types of settings, as the dispatcher hands them on


def transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def untraced() -> bool:
    """Whether nothing compiles, transforms or intercepts operations."""
    return not (
        torch.compiler.is_compiling()
        or transformed()
        or is_in_torch_dispatch_mode()
        or torch._C._get_tracing_state()  # torch.jit.trace
        or torch._C._dispatch_tls_is_dispatch_key_included(BATCHED_GRADIENTS)
    )


def are_plain(tensors: Iterable[Tensor]) -> bool:
    """Whether operations on the tensors are simply carried out."""
    return untraced() and all(type(x) in PLAIN and not (x.is_neg() or x._is_zerotensor()) for x in tensors)


def without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.no_grad()` as a decorator, without an object for each call, which takes longer than a small update."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(False)
        try:
            return function(*args, **kwargs)
        finally:
            torch._C._set_grad_enabled(enabled)

    return call


def _needs_no_dispatcher(values: Sequence[Any]) -> bool:
    """Whether an operator's body can take its arguments as they are; the dispatcher converts or refuses others."""
    if not untraced() or torch._C._len_torch_function_stack():  # a mode should see the operator only
        return False
    for x in values:
        if type(x) in PLAIN:
            if x.is_neg() or x._is_zerotensor() or x.is_meta:
                return False
        elif type(x) not in NUMBERS:
            return False
    return True


def count_up(counter: Tensor) -> None:
    """Add one in place. Transforms of `torch.func` refuse to change outer tensors, so this bypasses them."""
    (_count_below if transformed() else Tensor.add_)(counter, 1)


@torch.compiler.allow_in_graph
def _count_below(counter: Tensor, number: int) -> Tensor:
    with torch._C._DisableFuncTorch():
        return counter.add_(number)


def folded(shared: tuple[int, ...] = (), alike: tuple[int, ...] = ()) -> Callable:
    """A vmap rule that calls the operator once, with the mapped dimension folded into the first one of every tensor.

    Args:
        shared: positions of arguments that the whole batch shares. If they are mapped too, there is a call for each.
        alike: positions of results that the whole batch shares.

    Returns:
        A function from the operator to its rule, in the form of `torch.library.register_vmap` and `autograd.Function`.
    """

    def of(call: Callable) -> Callable:
        def rule(info, in_dims, *inputs):
            size = info.batch_size
            if any(in_dims[place] is not None for place in shared):
                columns = [[x] * size if dim is None else x.unbind(dim) for x, dim in zip(inputs, in_dims, strict=True)]
                calls = [call(*row) for row in zip(*columns, strict=True)]
                if isinstance(calls[0], Tensor):
                    return torch.stack(calls), 0
                return tuple(torch.stack(parts) for parts in zip(*calls, strict=True)), (0,) * len(calls[0])

            def fold(place, x, dim):
                if not isinstance(x, Tensor) or place in shared:
                    return x
                # kernels know nothing of the strides that an expanded tensor has
                return (x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)).flatten(0, 1).contiguous()

            def unfold(place, x):
                return x if place in alike else x.unflatten(0, (size, x.shape[0] // size))

            results = call(*map(fold, range(len(inputs)), inputs, in_dims))
            if isinstance(results, Tensor):
                return unfold(0, results), 0
            dims = tuple(None if place in alike else 0 for place in range(len(results)))
            return tuple(map(unfold, range(len(results)), results)), dims

        return rule

    return of


def differentiable(
    operator,
    setup: Callable = lambda *_: (),
    backward: Callable | None = None,
    jvp: Callable | None = None,
    vmap: Callable | None = None,
) -> Callable:
    """Give an operator its derivatives, under `torch.func` as well.

    Args:
        operator: what `torch.library.custom_op` returns; its arguments are positional.
        setup: takes (ctx, inputs, output) and returns the tensors to save.
        backward, jvp: as in an `autograd.Function`. Without them, differentiating raises an error.
        vmap: a rule as `folded` returns it, which is also the default.

    Returns:
        A function to call in place of the operator.
    """

    def refuse(ctx, *_):
        name = operator._name
        raise RuntimeError(f"{name} has no derivative: {name.removesuffix('_backward')} can be differentiated once")

    def refuse_forward(ctx, *_):
        raise RuntimeError(f"{operator._name} has no forward-mode derivative; use reverse mode")

    def save(ctx, inputs, output):
        ctx.save_for_backward(*setup(ctx, inputs, output))
        # without a group no zeros are made for outputs that have no gradient; with one, processes wait for each other
        # in the backward pass, so that none may leave it out
        ctx.set_materialize_grads(bool(getattr(ctx, "group", "")))

    def save_twice(ctx, inputs, output):
        ctx.set_materialize_grads(False)  # None says that there is no tangent
        tensors = setup(ctx, inputs, output)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    def propagate(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return (backward or refuse)(ctx, *grads)

    def carry_out(ctx, *inputs):
        output = body(*inputs)
        save(ctx, inputs, output)
        return output

    def function(**methods) -> Any:
        members = {name: staticmethod(method) for name, method in methods.items()}
        return type(operator._name, (torch.autograd.Function,), members)

    vmap, body = vmap or folded(), operator._init_fn
    operator.register_autograd(propagate, setup_context=save)
    operator.register_vmap(vmap(operator))
    plain = function(forward=carry_out, backward=propagate)
    under_transforms = function(
        forward=lambda *inputs: operator(*inputs),
        setup_context=save_twice,
        backward=propagate,
        jvp=jvp or (refuse_forward if backward else refuse),
        # torch's own rule fails for integer results if forward mode is outside of vmap
        vmap=vmap(lambda *inputs: under_transforms.apply(*inputs)),
    )

    @torch.compiler.allow_in_graph  # torch.compile does not trace into a Function that has a jvp
    def apply(*inputs):
        return under_transforms.apply(*inputs)

    def call(*inputs):
        if transformed():
            return apply(*inputs)
        if not _needs_no_dispatcher(inputs):
            return operator(*inputs)
        return plain.apply(*inputs) if torch.is_grad_enabled() else body(*inputs)

    return call
