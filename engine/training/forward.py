"""Everything that a step differentiates, as one module: the model, the terms of its objective, and the probes.

One module is one region for `torch.compile` and one wrapper for several processes. The probes see detached features, so
one backward pass of the sum gives the model and the probes the gradients that each would have alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from ...loaders.batch import Views, each, padded
from ..evaluation.probes import OnlineProbes, probe_features
from ..models.config import Span
from ..models.local import Unit
from ..models.seq_jepa import Altered, Output, SeqJEPA
from ..objectives.objective import Objective

BlockLoss = tuple[Tensor, dict[str, Tensor]]  # what a block lost, and its terms by `loss_<term>`; 0-dim


class StepInputs(NamedTuple):
    """Inputs of one step, of B sequences."""

    views: Views  # [B, V, ...]
    actions: Tensor  # [B, V - 1, A], as the model receives them
    inverse_actions: Tensor | None  # [B, V - 1, A], from the last view back to the first; None if only read forwards
    labels: Tensor  # [B], targets of the probes
    moves: Tensor  # [B, V - 1, A], of the views; the first is a target of the probes

    def split(self, parts: int) -> list[Self]:
        """Cut into `parts` micro-batches of equal size."""
        return [each(self, lambda x, part=part: x.chunk(parts)[part]) for part in range(parts)]

    def padded(self, size: int) -> Self:
        """With the first sequence repeated up to `size`, so that a compiled program sees one shape."""
        return each(self, lambda x: padded(x, size))


class StepOutputs(NamedTuple):
    """Outputs of one step; all float32."""

    total: Tensor  # 0-dim, sum of the objective and of the probes' losses, from which gradients are sent back
    loss: Tensor  # 0-dim, the objective
    terms: dict[str, Tensor]  # 0-dim, without their weights, by `loss_<term>`
    probe_losses: dict[str, Tensor]  # 0-dim, by `Probe.loss_name`
    probe_outputs: dict[str, Tensor]  # [B, ...], by `Probe.name`
    features: dict[str, Tensor]  # [B, ...], inputs of the probes
    output: Output


class TrainingForward(nn.Module):
    """Computes all losses of a batch. With `train_model=False` only the probes get gradients."""

    def __init__(
        self,
        model: SeqJEPA,
        objective: Objective,
        probes: OnlineProbes,
        spans: list[Span],
        *,
        train_model: bool = True,
    ):
        super().__init__()
        self.model = model
        self.objective = objective
        self.probes = probes
        self.spans = tuple(spans)
        self.train_model = train_model
        # a list, so that their parameters are not registered twice
        self.units: list[Unit] = [] if model.local is None else model.local.units(model.encoder)
        self.call, self.predict = self._losses_of_unit, model.predict  # or compiled forms of them
        # backward pass of a block's loss, which is then done before the next block runs; None leaves it to the caller
        self.send: Callable[[Tensor], None] | None = None

    def forward(self, given: StepInputs, step: Tensor) -> StepOutputs:
        """All losses at a training step (int64, 0-dim), which seeds terms that draw random numbers."""
        if self.model.local is not None:
            output, blocks = self.by_blocks(given, step)
            return self.losses_of(output, given.labels, given.moves, step, blocks)
        with torch.set_grad_enabled(self.train_model and torch.is_grad_enabled()):
            output = self.model(given.views, given.actions, given.inverse_actions, self.spans)
            if alterations := self.objective.alterations:
                views = each(given.views, lambda x: x[:, : output.encoded.shape[1]])
                found = {term.name: self.model.encoder(term.views(views, step)) for term in alterations}
                output = output._replace(altered=Altered(**found))
            output = output.float()
        return self.losses_of(output, given.labels, given.moves, step)

    def by_blocks(
        self, given: StepInputs, step: Tensor, keep: Callable[[Output], Output] | None = None
    ) -> tuple[Output, list[BlockLoss]]:
        """The output of what comes after the encoder, to which its features are constants, and each block's losses.

        `keep` returns the sequences that count of an output; by default all do.
        """

        losses_of_unit = self.call if keep is None else self._losses_of_unit

        def call(unit: Unit, maps: Tensor, actions: Tensor) -> tuple[tuple[Tensor, dict[str, Tensor], Tensor], Tensor]:
            return losses_of_unit(unit, maps, actions, step, keep)

        found, model = [], self.model
        with torch.set_grad_enabled(self.train_model and torch.is_grad_enabled()):
            for loss, terms, features in model.local.run(model.encoder, self.units, given.views, given.actions, call):
                if self.send is not None and self.training and loss.requires_grad:
                    with torch.autocast(loss.device.type, enabled=False):  # else it would run in half precision
                        self.send(loss)
                    loss = loss.detach()
                found.append((loss, {name: value.detach() for name, value in terms.items()}))
                z = features  # after the last block: the encoder's
            output = self.predict(z, None, given.actions, given.inverse_actions, self.spans).float()
        return output if keep is None else keep(output), found

    def _losses_of_unit(
        self, unit: Unit, maps: Tensor, actions: Tensor, step: Tensor, keep: Callable[[Output], Output] | None = None
    ) -> tuple[tuple[Tensor, dict[str, Tensor], Tensor], Tensor]:
        """Loss and terms of a unit and its features [B, V, C], without gradient; and its maps."""
        output, maps = unit(maps, actions)
        with torch.autocast(output.z.device.type, enabled=False):
            output = output.float()
            loss, terms = self.objective(output if keep is None else keep(output), step)
            return (loss, terms, output.encoded.detach()), maps

    def compile_units(self, **how: Any) -> None:
        """Compile each unit with its losses, and what comes after the encoder.

        So the backward pass of a unit is done before the next runs, as it is without a compiler.
        """
        limits = torch._dynamo.config  # one function has a program for each unit, in training and in evaluation
        limits.recompile_limit = max(limits.recompile_limit, 4 * len(self.units))
        self.call = torch.compile(self._losses_of_unit, **how)
        self.predict = torch.compile(self.model.predict, **how)

    def losses_of(
        self,
        output: Output,
        labels: Tensor,
        moves: Tensor,
        step: Tensor,
        blocks: list[BlockLoss] | None = None,
    ) -> StepOutputs:
        """Losses of an output of the model, in float32 under autocast too.

        `blocks` are loss and terms of each block that learns by itself. The objective is then theirs, summed, and the
        output itself is charged for its prediction alone, which is added to theirs.
        """
        with torch.autocast(output.z.device.type, enabled=False):
            with torch.set_grad_enabled(self.train_model and torch.is_grad_enabled()):
                if blocks is None:
                    loss, terms = self.objective(output, step)
                else:
                    prediction = self.objective.prediction(output, step)
                    loss = torch.stack([loss for loss, _ in blocks]).sum()
                    loss = loss + self.objective.prediction.weight * prediction
                    terms = {name: torch.stack([terms[name] for _, terms in blocks]).sum() for name in blocks[0][1]}
                    terms["loss_prediction"] = terms["loss_prediction"] + prediction
            features = probe_features(output)
            outputs = self.probes(features)
            probe_losses = self.probes.losses(outputs, labels, moves)
            total = loss + torch.stack(list(probe_losses.values())).sum() if probe_losses else loss
        return StepOutputs(total, loss, terms, probe_losses, outputs, features, output)
