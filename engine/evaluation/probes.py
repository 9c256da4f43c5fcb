"""Online probes: small heads, trained on detached features beside the model, that show what the features hold.

Four are the reference code's (online_*, leakage_*). It compares an MLP on one feature with a linear head on the
other; the matched_* probes use the same head on both, so that a gap is due to the features.

The aggregate receives the action from view 0 to view 1 as an input, so its R² measures what it retains of that input,
not what it infers from the views.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.accumulators import R2, Mean, MetricBank
from ..models.seq_jepa import Output
from .config import ProbesConfig

__all__ = ["PROBES", "OnlineProbes", "Probe", "mean_r2", "mlp", "probe_features"]


class Probe(NamedTuple):
    """A head on a feature."""

    prefix: str
    feature: str  # key of `probe_features`
    target: str  # label or action (the first one, view 0 to view 1)
    head: str  # linear or mlp

    @property
    def name(self) -> str:
        return f"{self.prefix}_{'linacc' if self.target == 'label' else 'r2'}"

    @property
    def loss_name(self) -> str:
        return f"{self.prefix}_{'linloss' if self.target == 'label' else 'r2_loss'}"


PROBES = (
    Probe("online", "agg", "label", "linear"),
    Probe("online", "pair", "action", "mlp"),
    Probe("leakage", "first", "label", "linear"),
    Probe("leakage", "agg", "action", "linear"),
    Probe("matched_z", "mean", "label", "linear"),  # beside online_linacc: all views, same head
    Probe("matched_z", "pair", "action", "linear"),  # beside leakage_r2
    Probe("matched_agg", "agg", "action", "mlp"),  # beside online_r2
)


def probe_features(output: Output) -> dict[str, Tensor]:
    """Detached float32 features of an output, each [B, ...], by name."""
    z = output.z.detach().float()
    second = z[:, 1] if z.shape[1] > 1 else output.target_z[:, 0].float()
    return {
        "agg": output.agg.detach().float(),
        "first": z[:, 0],
        "pair": torch.cat([z[:, 0], second], dim=-1),
        "mean": z.mean(1),
    }


class OnlineProbes(nn.Module):
    """All probes, their losses and their metrics.

    Args:
        config: config of the probes.
        num_features: width D of the encoder's features.
        token_width: width T of the aggregate.
        num_classes: number of classes of the labels.
        factors: maps each factor of variation to its dimensions of the action.
    """

    def __init__(
        self,
        config: ProbesConfig,
        num_features: int,
        token_width: int,
        num_classes: int,
        factors: dict[str, slice],
    ):
        super().__init__()
        widths = {"agg": token_width, "first": num_features, "pair": 2 * num_features, "mean": num_features}
        self.factors = factors
        self.action_dim = max(dims.stop for dims in factors.values())
        self.heads = nn.ModuleDict()
        for probe in PROBES:
            inputs, outputs = (
                widths[probe.feature],
                num_classes if probe.target == "label" else self.action_dim,
            )
            self.heads[probe.name] = (
                nn.Linear(inputs, outputs) if probe.head == "linear" else mlp(inputs, config.hidden, outputs)
            )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output of each head."""
        return {probe.name: self.heads[probe.name](features[probe.feature]) for probe in PROBES}

    @staticmethod
    def losses(outputs: dict[str, Tensor], labels: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Cross-entropy or mean squared error of each head, by its loss's name.

        Args:
            outputs: outputs of `forward`.
            labels: [B].
            actions: [B, V - 1, A]; the first one is the target.
        """
        return {
            probe.loss_name: F.cross_entropy(outputs[probe.name], labels)
            if probe.target == "label"
            else F.mse_loss(outputs[probe.name], actions[:, 0])
            for probe in PROBES
        }

    def metric_bank(self) -> MetricBank:
        """Empty metrics for one split."""
        metrics: dict[str, nn.Module] = {}
        for probe in PROBES:
            metrics[probe.name] = Mean(100.0) if probe.target == "label" else R2(self.action_dim)
            metrics[probe.loss_name] = Mean()
        return MetricBank(metrics)

    @staticmethod
    @torch.no_grad()
    def update(bank: MetricBank, outputs: dict[str, Tensor], labels: Tensor, actions: Tensor) -> None:
        """Add a batch to `bank`."""
        losses = OnlineProbes.losses(outputs, labels, actions)
        for probe in PROBES:
            output = outputs[probe.name]
            if probe.target == "label":
                bank[probe.name].update((output.argmax(-1) == labels).sum(), len(labels))
            else:
                bank[probe.name].update(output, actions[:, 0])
            bank[probe.loss_name].update(losses[probe.loss_name] * len(labels), len(labels))

    def values(self, bank: MetricBank, split: str) -> dict[str, float]:
        """Metrics of a collected bank by their names, `<probe>_<split>`; R² also for each factor."""
        values = {}
        for probe in PROBES:
            score = bank[probe.name].compute()
            if probe.target == "action":
                for factor, dims in self.factors.items():
                    values[f"{probe.name}_{factor}_{split}"] = mean_r2(score[dims])
                score = mean_r2(score)
            values[f"{probe.name}_{split}"] = score
            values[f"{probe.loss_name}_{split}"] = bank[probe.loss_name].compute()
        return values


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """Head with two hidden layers and ReLU, the reference code's for actions."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, outputs)
    )


def mean_r2(scores: list[float]) -> float:
    """Mean over the dimensions that have an R²; NaN if none has."""
    known = [score for score in scores if not math.isnan(score)]
    return sum(known) / len(known) if known else math.nan
