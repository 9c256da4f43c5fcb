"""What white-box layers do to tokens: the coding rate in each layer's subspaces before and after, and sparsity."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...loaders.batch import Batch, each
from ..models.seq_jepa import SeqJEPA
from ..models.white_box.layers import WhiteBox, subspace_rate

ACTIVE = 0.01  # share of the tokens in which a code must be used to count as active


class LayerCurves(NamedTuple):
    """One number for each layer of a white-box part."""

    rate: list[float]  # coding rate of the tokens in the subspaces of the layer, before its attention
    rate_after: list[float]  # the same after it
    zeros: list[float]  # share of zeros among the codes; empty without sparse coding
    active: list[float]  # share of the codes that are used in more than 1 % of the tokens; likewise


@torch.no_grad()
def layer_curves(model: SeqJEPA, batch: Batch, num_observed: int, accelerator: Accelerator) -> dict[str, LayerCurves]:
    """Curves of each white-box part of a model, such as its aggregator, on one batch; none without such parts.

    Args:
        model: in eval mode.
        batch: sequences of V views, V > `num_observed`; those beyond the target are left out.
        num_observed: number of views that the aggregator reads.
        accelerator: sets the precision.
    """
    given: dict[str, Tensor] = {}
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, WhiteBox)}
    stacks = {name: part for name, part in stacks.items() if not name.startswith("target.")}  # a copy of the encoder
    if not stacks:
        return {}
    names: dict[nn.Module, str] = {part: name for name, part in stacks.items()}

    def remember(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.setdefault(names[part], inputs[0])

    hooks = [part.register_forward_pre_hook(remember) for part in names]
    try:
        with accelerator.autocast():
            model(each(batch.views, lambda x: x[:, : num_observed + 1]), batch.actions[:, :num_observed])
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, tokens in given.items():
        curves = LayerCurves([], [], [], [])
        for step in stacks[name].observe(tokens.float()):
            curves.rate.append(subspace_rate(step.before).item())
            curves.rate_after.append(subspace_rate(step.after).item())
            if step.codes is not None:
                curves.zeros.append((step.codes == 0).float().mean().item())
                used = (step.codes > 0).flatten(0, 1).float().mean(0)
                curves.active.append((used > ACTIVE).float().mean().item())
        found[name.partition(".")[0]] = curves
    return found


def layer_metrics(curves: dict[str, LayerCurves]) -> dict[str, float]:
    """The curves as metrics: layers_<quantity>_<part>_<number of the layer, from 1>."""
    return {
        f"layers_{quantity}_{part}_{number}": value
        for part, found in curves.items()
        for quantity, values in found._asdict().items()
        for number, value in enumerate(values, start=1)
    }
