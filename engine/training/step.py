"""The model, its probes and their optimisers, and one step of training them."""

import contextlib
import itertools
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ...kernels import AdamWEMA
from ...kernels.precision import widest
from ...loaders.batch import Batch, each
from ...loaders.loader import Loaders
from ..analysis.accumulators import Largest, Mean, MetricBank
from ..analysis.metrics import EMBEDDINGS, SIDES
from ..analysis.spectra import embedding_figures
from ..config import Config
from ..evaluation.probes import OnlineProbes
from ..models.quantisers.base import Codebook
from ..models.seq_jepa import Output, Reading, SeqJEPA
from ..models.white_box.layers import CrateLayer
from ..objectives.objective import Objective
from ..runtime.accelerator import COMPILE_MODES, compile_mode
from ..runtime.cuda_graph import GraphedStep
from ..runtime.distributed import average_gradients, join_batch_norms, joined_mean, joined_rows, world
from .churn import Churn
from .forward import StepInputs, StepOutputs, TrainingForward
from .optimizers import build_optimizer, learning_rate, set_rate
from .segments import segments_of

MOST_EMBEDDINGS = 4096  # rows of which figures are made


class Diverged(Exception):
    """A loss, a gradient or a weight is no longer finite."""


class TrainingStep:
    """Owns model, probes and optimisers, and does one training step at a time.

    With `train_model=False` the network keeps its initial weights and only the probes are trained, for the control.
    """

    def __init__(self, config: Config, loaders: Loaders, accelerator: Accelerator, *, train_model: bool = True):
        self.config = config
        self.accelerator = accelerator
        self.train_model = train_model
        self.steps_per_epoch = len(loaders.train)
        segments = segments_of(config, loaders)
        self.total_steps = segments.start(len(segments))
        device = accelerator.device

        self.model = model = SeqJEPA(config.model, config.target, loaders.sequence.action_space)
        self.world = world()
        joined = self.world if config.run.batch_statistics == "global" else None
        if joined is not None:
            join_batch_norms(model, joined)
        if model.sharpening is not None:
            model.sharpening.group = joined
        for part in model.modules():
            if isinstance(part, Codebook):  # one for all processes: their means would be of different codes
                part.group = self.world
                part.still = config.ablation.freeze_encoder or not train_model
        model.to(device).to(memory_format=torch.channels_last)
        if config.ablation.freeze_encoder:
            model.encoder.requires_grad_(False)
        for part in model.unread(config.objective.reads):
            part.requires_grad_(False)
        self.objective = Objective(config.objective, model.prediction_width).to(device)
        self.objective.join(joined, self.world)
        self.sequence, self.train_loader = loaders.sequence, loaders.train
        self.stream = loaders.stream
        self.probes = OnlineProbes(
            config.probes, model.num_features, model.token_width, loaders.num_classes, loaders.sequence.factors
        ).to(device)
        if joined is not None:
            join_batch_norms(self.probes, joined)
        spans = config.objective.reading.spans(config.sequence.num_observed)
        self.losses = TrainingForward(model, self.objective, self.probes, spans, train_model=train_model)
        self.losses.train()  # parts that stay in eval mode go there
        self.lr = torch.zeros((), dtype=widest(device), device=device)
        pairs = model.target.pairs(model.encoder, model.projector)
        teacher = [pair for pair in pairs if pair[0].requires_grad]
        self.optimizer = build_optimizer(nn.ModuleList([model, self.objective]), config.optim, self.lr, teacher)
        self.probe_optimizer = torch.optim.Adam(
            [{"params": list(self.probes.parameters())}],  # a group, which may be empty: a task may have no probes
            lr=config.probes.lr,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.clipped = [layer for layer in model.modules() if isinstance(layer, CrateLayer) and layer.is_limited]
        self.trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not train_model:
            model.requires_grad_(False)
            self.objective.requires_grad_(False)

        # Accelerate patches autocast into the raw module, which validation uses, and wraps it where several
        # processes sum their gradients, which training uses
        by_blocks = model.local is not None
        self.wrapped: Any = accelerator.prepare_model(self.losses, evaluation_mode=by_blocks)
        if self.world is not None and not by_blocks:
            self.wrapped.broadcast_buffers = False  # those of the first process would displace the others'
        mode = compile_mode(config.run, accelerator) if train_model else "none"
        self.compiled = mode != "none"
        how = {"mode": COMPILE_MODES[mode], "dynamic": False} if self.compiled else {}
        if by_blocks:
            self.losses.send = accelerator.backward
        if self.compiled and by_blocks:
            self.losses.compile_units(**how)
        elif self.compiled:
            self.losses.compile(**how)
        self.graphed = GraphedStep(self._step, device) if mode == "graph" else None

        losses = self.objective.names
        by_term = train_model and not by_blocks  # else nothing sends a gradient through all of z
        norms = [f"z_grad_norm_{name}" for name in config.objective.of_features] if by_term else []
        self.churn = Churn(model, loaders.validation) if train_model and model.num_codes else None
        churn = self.churn.encoders if self.churn else ()
        means = {name: Mean() for name in ("ep_loss", *losses, "grad_norm", *norms, *EMBEDDINGS, *churn)}
        self.train_losses = MetricBank({**means, "grad_norm_max": Largest(), "clipped": Mean(100)}).to(device)
        balance = self.objective.balance
        # in steps; the control has no log
        self.measured_every = [config.run.log_every if train_model else self.steps_per_epoch]
        self.measured_every += [] if balance is None else [balance.config.every]
        self.term_grad_norms: dict[str, Tensor] = {}  # latest measurement
        self.latest: list[Reading] = []  # of the last step that was measured
        self.train_metrics = self.probes.metric_bank().to(device)
        # what can diverge in a step, in the order in which `_watch` sees it
        self.watched = (*losses, "grad_norm", *(probe.loss_name for probe in self.probes.active))
        # step and number in `watched` of the first value that was not finite; -1 while there is none
        self.divergence = torch.full((2,), -1, dtype=torch.long, device=device)
        self.device_step = torch.zeros((), dtype=torch.long, device=device)  # counted where it is used

    def step(self, batch: Batch, step: int) -> Tensor:
        """Learn from this process's part of a batch, in optimiser step `step` of the run; nothing waits for the device.

        Returns:
            The loss, 0-dim, on the device; the next step may overwrite it.
        """
        if not self.losses.training:
            self.losses.train()
        first, steps = 0, self.total_steps
        if self.model.local is not None:  # a schedule is one of a turn
            first, steps = self.model.local.span(step, self.total_steps)
        set_rate(self.optimizer, learning_rate(self.config.optim, step - first, self.steps_per_epoch, steps))
        if self.model.local is not None and self.model.local.begin(step, self.total_steps):
            for parameter in self.model.local.ended(self.losses.units):
                self.optimizer.state.pop(parameter, None)
            self.graphed = GraphedStep(self._step, self.accelerator.device) if self.graphed else None
        if any((step + 1) % period == 0 for period in self.measured_every):
            return self._step(batch, measured=True)
        return self._step(batch) if self.graphed is None else self.graphed(batch)

    def _step(self, batch: Batch, *, measured: bool = False) -> Tensor:
        """What a step does on the device; if `measured`, its readings are kept, and the gradient of each term measured.

        A CUDA graph may hold all of it: what changes from step to step is a tensor that is written in place.
        """
        micro_batches = self.step_inputs(batch).split(self.config.optim.accumulate)
        parts = []
        for number, micro in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                found: StepOutputs = self.wrapped(micro, self.device_step)
                if found.total.requires_grad:  # not if there are no probes and the model is not trained
                    self.objective.backward(found.total, found.terms, self.accelerator.backward)
            parts.append(found)
        if measured:
            self.latest = [Reading(*map(torch.Tensor.detach, r)) for part in parts for r in part.output.readings]
        if measured and self.train_model and self.model.local is None:
            self.term_grad_norms = self._term_grad_norms(found.output, micro)
            for name, norm in self.term_grad_norms.items():
                self.train_losses[name].update(norm * len(batch.labels), len(batch.labels))
            if self.objective.balance is not None:
                norms = torch.stack([self.term_grad_norms[f"z_grad_norm_{name}"] for name in self.objective.balanced])
                losses = torch.stack([_means([p.terms for p in parts])[f"loss_{n}"] for n in self.objective.balanced])
                self.objective.balance.update(norms, joined_mean(losses.detach(), self.world))
        if self.model.local is not None:  # its several backward passes are not those of DDP
            average_gradients(self.losses, self.world)
        grad_norm = self._update() if self.train_model else torch.zeros_like(self.lr)
        if self.train_model:
            self.objective.after_step([part.output for part in parts])
        self.probe_optimizer.step()
        self.probe_optimizer.zero_grad(set_to_none=True)
        return self._record(batch, parts, grad_norm)

    def _update(self) -> Tensor:
        """Update the weights, and the teacher that follows them; returns the norm of the gradients."""
        optim, target = self.config.optim, self.model.target
        decay = target.decay(self.device_step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["ema_decay"] = decay  # torch's AdamW has no use for it
        grad_norm = torch.nn.utils.clip_grad_norm_(self.trainable, optim.clip_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for layer in self.clipped:
            layer.clip()
        followed = (self.model.encoder, self.model.projector)
        target.update(decay, *followed, weights=not isinstance(self.optimizer, AdamWEMA))
        return grad_norm

    @torch.no_grad()
    def _record(self, batch: Batch, parts: list[StepOutputs], grad_norm: Tensor) -> Tensor:
        """Add a step to the metrics of the epoch, and watch it; returns its loss."""
        count = len(batch.labels)
        loss = torch.stack([part.loss for part in parts]).mean()
        terms, probe_losses = (_means([getattr(part, kind) for part in parts]) for kind in ("terms", "probe_losses"))
        for name, value in {"ep_loss": loss, **terms, "grad_norm": grad_norm}.items():
            self.train_losses[name].update(value * count, count)
        if self.accelerator.is_main_process:
            self.train_losses["grad_norm_max"].update(grad_norm)
        limit = self.config.optim.clip_norm
        self.train_losses["clipped"].update(grad_norm > limit if limit else torch.zeros_like(grad_norm), 1)
        outputs = {name: torch.cat([part.probe_outputs[name] for part in parts]) for name in parts[0].probe_outputs}
        self.probes.update(self.train_metrics, outputs, batch.labels, batch.actions)
        self._watch([*terms.values(), grad_norm, *probe_losses.values()])
        return loss

    def step_inputs(self, batch: Batch) -> StepInputs:
        """Inputs of a step: those of the batch, or with the actions of another sequence (ablation.shuffle_actions)."""
        actions, inverse = batch.actions, None
        if any(span.backwards for span in self.losses.spans):
            inverse = self.sequence.inverse_actions(batch.params)
        if self.config.ablation.shuffle_actions:
            actions = actions.roll(1, 0)
            inverse = None if inverse is None else inverse.roll(1, 0)
        return StepInputs(batch.views, actions, inverse, batch.labels, batch.actions)

    def _term_grad_norms(self, output: Output, given: StepInputs) -> dict[str, Tensor]:
        """Norm of the gradient with respect to z of each weighted term that depends on it, by name.

        It is that of the last micro-batch. Targets that were encoded by themselves (batch_statistics=own) count as
        constants. Everything after the encoder runs once more on detached features; buffers and the random generator
        are put back, so that measuring does not change training.
        """
        model, device = self.model, self.accelerator.device
        heads = (model.action_embedding, model.predictor, model.projector, model.inverse, model.sharpening)
        heads = [head for head in (*heads, model.target.projector) if head is not None]
        buffers = [buffer for head in heads for buffer in head.buffers()]
        kept = [buffer.clone() for buffer in buffers]
        z = output.encoded.detach().requires_grad_()
        target_z = None if model.target.joint else output.target_z
        with torch.random.fork_rng([device] if device.type == "cuda" else []), self.accelerator.autocast():
            past = None if output.recalled is None else output.recalled.past
            tokens, altered = (each(part, torch.Tensor.detach) for part in (output.tokens, output.altered))
            output = model.predict(z, target_z, given.actions, given.inverse_actions, self.losses.spans, past)
            output = output._replace(tokens=tokens, altered=altered)
        _, terms = self.objective(output, self.device_step)
        term_grad_norms = {}
        weights = self.objective.weights()
        for name in self.config.objective.of_features:
            weighted = weights[name] * terms[f"loss_{name}"]
            (gradient,) = torch.autograd.grad(weighted, z, retain_graph=True)
            square = gradient.float().square().sum()
            if self.world is not None:  # each differentiates its own mean, or all of what is joined
                square = joined_mean(square, self.world) / self.world.size()
            term_grad_norms[f"z_grad_norm_{name}"] = square.sqrt()
        for buffer, value in zip(buffers, kept, strict=True):
            buffer.copy_(value)
        return term_grad_norms

    def embeddings(self) -> dict[str, float]:
        """Figures of the predictions and the targets of the last step that was measured; waits for the device."""
        found = {}
        for side in SIDES:
            rows = joined_rows(torch.cat([getattr(reading, side) for reading in self.latest]), self.world)
            for name, value in embedding_figures(rows[:MOST_EMBEDDINGS]).items():
                self.train_losses[f"{side}_{name}"].update(value, 1)
                found[f"{side}_{name}"] = value.item()
        return found

    def code_changes(self) -> dict[str, float]:
        """How many codes have changed since the last call, as `Churn.look` tells; waits for the device."""
        found = self.churn.look() if self.churn else {}
        for name, value in found.items():
            self.train_losses[name].update(value, 1)
        return {name: value.item() for name, value in found.items()}

    def end_task(self) -> None:
        """Remember the encoder as it is at the end of a task, if the model has a memory."""
        self.share_buffers()
        if self.model.memory is not None:
            self.model.memory.take(self.model.encoder)

    @torch.no_grad()
    def share_buffers(self) -> None:
        """Average the batch-norm statistics of the processes, so that all validate, and save, one network."""
        if self.world is None or self.config.run.batch_statistics == "global":  # they are the same
            return
        for buffer in itertools.chain(self.model.buffers(), self.probes.buffers()):
            if buffer.is_floating_point():
                mean: Any = self.accelerator.reduce(buffer, "mean")
                buffer.copy_(mean)

    def _watch(self, values: list[Tensor]) -> None:
        """Latch the first value that is not finite."""
        bad = ~torch.isfinite(torch.stack([value.detach().float() for value in values]))
        found = torch.stack([self.device_step, bad.int().argmax()])
        self.divergence.copy_(torch.where((self.divergence[0] < 0) & bad.any(), found, self.divergence))
        self.device_step += 1

    def diverged(self) -> tuple[int, str] | None:
        """Step and term of the first value that was not finite, on any process; waits for the device."""
        latched: Any = self.accelerator.gather(self.divergence)
        found = min((pair for pair in latched.view(-1, 2).tolist() if pair[0] >= 0), default=None)
        return None if found is None else (found[0], self.watched[found[1]])

    def epoch_metrics(self) -> dict[str, float]:
        """Metrics of the training steps since the last call."""
        metrics = self.train_losses.collect(self.accelerator).compute()
        metrics |= {name: value.item() for name, value in self.objective.figures().items()}
        weights = self.objective.weights()
        parts = {name: abs(float(weight) * metrics[f"loss_{name}"]) for name, weight in weights.items()}
        metrics |= {f"share_{name}": part / (sum(parts.values()) or 1.0) for name, part in parts.items()}
        metrics |= self.probes.values(self.train_metrics.collect(self.accelerator), "train")
        self.train_losses.reset()
        self.train_metrics.reset()
        return metrics


def _means(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean over micro-batches of each value."""
    return {name: torch.stack([part[name] for part in parts]).mean() for name in parts[0]}
