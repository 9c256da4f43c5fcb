"""What white-box layers do to tokens: the coding rate in each layer's subspaces before and after, and sparsity."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...loaders.batch import Batch
from ..models.seq_jepa import SeqJEPA
from ..models.white_box import WhiteBox, subspace_rate

ACTIVE = 0.01  # share of the tokens in which a code must be used to count as active


class LayerCurves(NamedTuple):
    """One number for each layer of a white-box part."""

    rate: list[float]  # coding rate of the tokens in the subspaces of the layer, before its attention
    rate_after: list[float]  # the same after it
    zeros: list[float]  # share of zeros among the codes
    active: list[float]  # share of the codes that are used in more than 1 % of the tokens


@torch.no_grad()
def layer_curves(model: SeqJEPA, batch: Batch, accelerator: Accelerator) -> dict[str, LayerCurves]:
    """Curves of each white-box part of a model in eval mode, such as its aggregator, on one batch; none without any."""
    given: dict[str, Tensor] = {}
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, WhiteBox)}
    stacks = {name: part for name, part in stacks.items() if not name.startswith("target.")}  # a copy of the encoder
    if not stacks:
        return {}
    names: dict[nn.Module, str] = {part: name for name, part in stacks.items()}

    def remember(part: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        given.setdefault(names[part], inputs[0])

    hooks = [part.register_forward_pre_hook(remember) for part in names]
    with accelerator.autocast():
        model(batch.views, batch.actions)
    for hook in hooks:
        hook.remove()
    found = {}
    for name, tokens in given.items():
        steps = stacks[name].observe(tokens.float())
        used = [(step.codes > 0).flatten(0, 1).float().mean(0) for step in steps]
        found[name.partition(".")[0]] = LayerCurves(
            [subspace_rate(step.before).item() for step in steps],
            [subspace_rate(step.after).item() for step in steps],
            [(step.codes == 0).float().mean().item() for step in steps],
            [(share > ACTIVE).float().mean().item() for share in used],
        )
    return found


def layer_metrics(curves: dict[str, LayerCurves]) -> dict[str, float]:
    """The curves as metrics: layers_<quantity>_<part>_<number of the layer, from 1>."""
    return {
        f"layers_{quantity}_{part}_{number}": value
        for part, found in curves.items()
        for quantity, values in found._asdict().items()
        for number, value in enumerate(values, start=1)
    }
