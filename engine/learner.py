"""The model, its probes and their optimisers: one training step, one validation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from accelerate import Accelerator
from torch import Tensor

from seqjepa.engine.config import Config
from seqjepa.engine.metrics import Mean, MetricBank, centred_cosine
from seqjepa.engine.model import Output, build_model
from seqjepa.engine.objectives import TERMS, Objective
from seqjepa.engine.optimizers import build_optimizer, learning_rate, set_rates
from seqjepa.engine.probes import PROBES, OnlineProbes, probe_features
from seqjepa.loaders.loader import Batch, Loaders, SequenceLoader

__all__ = ["Diverged", "Learner", "metric_names"]

LOSSES = tuple(f"loss_{term}" for term in TERMS)
PREDICTION_METRICS = ("pred_cosine_test", "pred_cosine_centred_test")


class Diverged(Exception):
    """A loss, a gradient or a weight is no longer finite."""


class Learner:
    """Learns from batches, and measures itself on them.

    Args:
        config: of the run.
        loaders: what it reads from.
        accelerator: device, precision, processes.
        train_model: False leaves the network as it was born and trains the probes alone, for the control.
    """

    def __init__(self, config: Config, loaders: Loaders, accelerator: Accelerator, *, train_model: bool = True):
        self.config = config
        self.accelerator = accelerator
        self.train_model = train_model
        self.steps_per_epoch = len(loaders.train)
        self.total_steps = config.run.epochs * self.steps_per_epoch
        device = accelerator.device

        self.model = build_model(config.model, config.target, loaders.sequence.action_dim).to(device)
        self.model.to(memory_format=torch.channels_last)
        if config.ablation.freeze_encoder:
            self.model.encoder.requires_grad_(False)
        self.objective = Objective(config.objective)
        self.probes = OnlineProbes(
            config.probes,
            self.model.num_features,
            self.model.token_width,
            loaders.num_classes,
            loaders.sequence.factors,
        ).to(device)
        fused = device.type in ("cpu", "cuda")
        teacher = [pair for pair in self.model.target.pairs(self.model.encoder) if pair[0].requires_grad]
        self.optimizer = build_optimizer(self.model, config.optim, fused, teacher)
        self.probe_optimizer = torch.optim.Adam(self.probes.parameters(), lr=config.probes.lr, fused=fused)

        # Accelerate patches autocast into the raw models, which validation uses, and wraps them where several
        # processes sum their gradients, which training uses
        self.wrapped_model = accelerator.prepare_model(self.model) if train_model else self.model
        self.wrapped_probes = accelerator.prepare_model(self.probes)
        mode = config.run.compile
        if mode == "auto":
            mode = "default" if device.type == "cuda" and not config.run.deterministic else "none"
        if mode != "none" and train_model:
            self.model.compile(mode=mode, dynamic=False)

        self.train_losses = MetricBank({name: Mean() for name in ("ep_loss", *LOSSES, "grad_norm")}).to(device)
        self.train_metrics = self.probes.metric_bank().to(device)
        # what can diverge in a step, in the order in which `_watch` sees it
        self.watched = (*LOSSES, "grad_norm", *(probe.loss_name for probe in PROBES))
        # step and number in `watched` of the first value that was not finite; -1 while there is none
        self.divergence = torch.full((2,), -1, dtype=torch.long, device=device)
        self.device_step = torch.zeros((), dtype=torch.long, device=device)  # counted where it is used

    def step(self, batch: Batch, step: int) -> Tensor:
        """Learn from a batch; nothing here waits for the device.

        Args:
            batch: this process's part of it.
            step: number of the optimiser step in the whole run.

        Returns:
            The loss, 0-dim, on the device.
        """
        self.model.train()
        given = self._given(batch)
        if self.train_model:
            loss, terms, grad_norm, features = self._train(given, step)
        else:
            loss, terms, grad_norm, features = self._look(given)

        outputs = self.wrapped_probes(features)
        probe_losses = self.probes.losses(outputs, batch.labels, batch.actions)
        torch.stack(list(probe_losses.values())).sum().backward()
        self.probe_optimizer.step()
        self.probe_optimizer.zero_grad(set_to_none=True)

        with torch.no_grad():
            count = len(batch.labels)
            for name, value in {"ep_loss": loss, **terms, "grad_norm": grad_norm}.items():
                self.train_losses[name].update(value * count, count)
            self.probes.update(self.train_metrics, outputs, batch.labels, batch.actions)
            self._watch([*terms.values(), grad_norm, *probe_losses.values()])
        return loss

    def _given(self, batch: Batch) -> Batch:
        """What the model is given: the batch, or under an ablation another sequence's actions."""
        return batch._replace(actions=batch.actions.roll(1, 0)) if self.config.ablation.shuffle_actions else batch

    def _train(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """One optimiser step over the micro-batches; features are those before the update."""
        optim = self.config.optim
        decay = self.model.target.decay(self.device_step, self.total_steps)
        set_rates(self.optimizer, learning_rate(optim, step, self.steps_per_epoch, self.total_steps), decay)
        micro_batches = batch.split(optim.accumulate)
        losses, all_terms, all_features = [], [], []
        for number, micro in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped_model):
                output: Output = self.wrapped_model(micro.views, micro.actions)
                loss, terms = self.objective(output)
                self.accelerator.backward(loss)  # divides by the number of micro-batches
            losses.append(loss.detach())
            all_terms.append({name: term.detach() for name, term in terms.items()})
            all_features.append(probe_features(output))
        limit = optim.clip_norm or float("inf")
        trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        grad_norm = torch.nn.utils.clip_grad_norm_(trainable, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.model.target.update(self.model.encoder, decay, weights=optim.kind == "adamw")
        loss, terms, features = _joined(losses, all_terms, all_features)
        return loss, terms, grad_norm, features

    @torch.no_grad()
    def _look(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor, dict[str, Tensor]]:
        """What `_train` returns, without training: the same micro-batches and so the same batch statistics."""
        losses, all_terms, all_features = [], [], []
        for micro in batch.split(self.config.optim.accumulate):
            with self.accelerator.autocast():
                output = self.model(micro.views, micro.actions)
            loss, terms = self.objective(output)
            losses.append(loss)
            all_terms.append(terms)
            all_features.append(probe_features(output))
        loss, terms, features = _joined(losses, all_terms, all_features)
        return loss, terms, torch.zeros_like(loss), features

    def _share_buffers(self) -> None:
        """Average the batch-norm statistics of the processes, so that all validate one network."""
        if self.accelerator.num_processes == 1:
            return
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        flat = self.accelerator.reduce(torch.cat([buffer.flatten() for buffer in buffers]), reduction="mean")
        for buffer, mean in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(mean.view_as(buffer))

    def _watch(self, values: list[Tensor]) -> None:
        """Latch the first value that is not finite."""
        bad = ~torch.isfinite(torch.stack([value.detach().float() for value in values]))
        found = torch.stack([self.device_step, bad.int().argmax()])
        self.divergence = torch.where((self.divergence[0] < 0) & bad.any(), found, self.divergence)
        self.device_step += 1

    def diverged(self) -> tuple[int, str] | None:
        """Step and term of the first value that was not finite, on any process; waits for the device."""
        latched = self.accelerator.gather(self.divergence).view(-1, 2).tolist()
        found = min((pair for pair in latched if pair[0] >= 0), default=None)
        return None if found is None else (found[0], self.watched[found[1]])

    def epoch_metrics(self) -> dict[str, float]:
        """Metrics of the training steps since the last call."""
        losses = self.train_losses.collect(self.accelerator)
        metrics = {name: mean.compute() for name, mean in losses.items()}
        metrics |= self.probes.values(self.train_metrics.collect(self.accelerator), "train")
        self.train_losses.reset()
        self.train_metrics.reset()
        return metrics

    @torch.no_grad()
    def validate(self, loader: SequenceLoader, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        """Metrics on `loader`'s sequences, in eval mode.

        Args:
            loader: of the validation sequences.
            check: called after each batch; may raise to leave early.
        """
        self.model.eval()
        self._share_buffers()
        bank = self.probes.metric_bank().to(self.accelerator.device)
        losses = MetricBank({f"val_{name}": Mean() for name in ("loss", *LOSSES)}).to(self.accelerator.device)
        cosine = MetricBank({"pred_cosine_test": Mean()}).to(self.accelerator.device)
        predictions, targets = [], []
        for batch in loader.epoch(0):
            if not len(batch.labels):  # the last batch may leave a process without a part
                continue
            given = self._given(batch)
            with self.accelerator.autocast():
                output = self.model(given.views, given.actions)
            loss, terms = self.objective(output)
            count = len(batch.labels)
            for name, value in {"loss": loss, **terms}.items():
                losses[f"val_{name}"].update(value * count, count)
            self.probes.update(bank, self.probes(probe_features(output)), batch.labels, batch.actions)
            prediction, target = output.prediction.float(), output.target.float()
            cosine["pred_cosine_test"].update(torch.cosine_similarity(prediction, target, dim=-1).sum(), count)
            predictions.append(prediction)
            targets.append(target)
            check()
        metrics = {name: mean.compute() for name, mean in losses.collect(self.accelerator).items()}
        metrics |= self.probes.values(bank.collect(self.accelerator), "test")
        metrics |= {name: mean.compute() for name, mean in cosine.collect(self.accelerator).items()}
        width = self.model.num_features
        empty = [torch.empty(0, width, device=self.accelerator.device)]
        metrics["pred_cosine_centred_test"] = centred_cosine(
            torch.cat(predictions or empty), torch.cat(targets or empty), self.accelerator
        )
        return metrics


def _joined(
    losses: list[Tensor], terms: list[dict[str, Tensor]], features: list[dict[str, Tensor]]
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Micro-batches as one batch: means of losses and terms, features one after the other."""
    mean = {name: torch.stack([part[name] for part in terms]).mean() for name in terms[0]}
    whole = {name: torch.cat([part[name] for part in features]) for name in features[0]}
    return torch.stack(losses).mean(), mean, whole


def metric_names(factors: dict[str, slice]) -> set[str]:
    """Names of all metrics that a validated epoch has, for gates to be checked against."""
    names = {
        "ep_loss",
        *LOSSES,
        "grad_norm",
        "val_loss",
        *(f"val_{name}" for name in LOSSES),
        *PREDICTION_METRICS,
    }
    for probe in PROBES:
        for split in ("train", "test"):
            names |= {f"{probe.name}_{split}", f"{probe.loss_name}_{split}"}
            if probe.target == "action":
                names |= {f"{probe.name}_{factor}_{split}" for factor in factors}
    return names
