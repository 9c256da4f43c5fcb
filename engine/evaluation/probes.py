"""Online probes: small heads on detached features, trained beside the model, that measure what the features hold.

Four of them (online_*, leakage_*) are the reference code's, which compares an MLP on one feature with a linear head on
another. The matched_* probes have the same head on both features, so that a gap is due to the features.

The aggregate receives the action from view 0 to view 1 as an input, so its R² measures how much of that input it keeps,
not what it infers from the views.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..analysis.accumulators import R2, Mean, MetricBank, mean_r2
from ..models.seq_jepa import Output
from .config import ProbesConfig


class Probe(NamedTuple):
    """A head on a feature."""

    prefix: str
    feature: str  # key of `probe_features`
    target: Literal["class", "action"]  # the action is the first one, from view 0 to view 1
    head: Literal["linear", "mlp"]

    @property
    def name(self) -> str:
        return f"{self.prefix}_{'linacc' if self.target == 'class' else 'r2'}"

    @property
    def loss_name(self) -> str:
        return f"{self.prefix}_{'linloss' if self.target == 'class' else 'r2_loss'}"


PROBES = (
    Probe("online", "agg", "class", "linear"),
    Probe("online", "pair", "action", "mlp"),
    Probe("leakage", "first", "class", "linear"),
    Probe("leakage", "agg", "action", "linear"),
    Probe("matched_z", "mean", "class", "linear"),  # beside online_linacc: all views, same head
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
    """The probes whose targets the task has, their losses and their metrics.

    z is `num_features` wide, the aggregate `token_width`. `factors` are dimensions of the action by factor of
    variation; they are empty if there are no actions to predict.
    """

    def __init__(
        self,
        config: ProbesConfig,
        num_features: int,
        token_width: int,
        num_classes: int | None,
        factors: dict[str, slice],
    ):
        super().__init__()
        widths = {"agg": token_width, "first": num_features, "pair": 2 * num_features, "mean": num_features}
        self.factors = factors
        self.action_dim = max((dims.stop for dims in factors.values()), default=0)
        sizes = {"class": num_classes or 0, "action": self.action_dim}
        self.active = [probe for probe in PROBES if sizes[probe.target]]
        self.norms = nn.ModuleDict()  # batch norms without gain
        self.heads = nn.ModuleDict()
        for probe in self.active:
            inputs, outputs = widths[probe.feature], sizes[probe.target]
            if config.standardize:
                self.norms[probe.feature] = nn.BatchNorm1d(inputs, affine=False)
            linear = probe.head == "linear"
            self.heads[probe.name] = nn.Linear(inputs, outputs) if linear else mlp(inputs, config.hidden, outputs)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """Output of each head."""
        features = features | {name: norm(features[name]) for name, norm in self.norms.items()}
        return {probe.name: self.heads[probe.name](features[probe.feature]) for probe in self.active}

    def losses(self, outputs: dict[str, Tensor], labels: Tensor, actions: Tensor) -> dict[str, Tensor]:
        """Cross-entropy or mean squared error of each head, by its loss's name.

        The targets are the labels [B] and the first of the actions [B, V - 1, A].
        """
        losses = {"class": lambda x: F.cross_entropy(x, labels), "action": lambda x: F.mse_loss(x, actions[:, 0])}
        return {probe.loss_name: losses[probe.target](outputs[probe.name]) for probe in self.active}

    def metric_bank(self) -> MetricBank:
        """Empty metrics for one split."""
        metrics: dict[str, nn.Module] = {}
        for probe in self.active:
            metrics[probe.name] = Mean(100.0) if probe.target == "class" else R2(self.action_dim)
            metrics[probe.loss_name] = Mean()
        return MetricBank(metrics)

    @torch.no_grad()
    def update(self, bank: MetricBank, outputs: dict[str, Tensor], labels: Tensor, actions: Tensor) -> None:
        """Add a batch to `bank`; the other arguments are those of `losses`."""
        for name, loss in self.losses(outputs, labels, actions).items():
            bank[name].update(loss * len(labels), len(labels))
        for probe in self.active:
            output = outputs[probe.name]
            if probe.target == "class":
                bank[probe.name].update((output.argmax(-1) == labels).sum(), len(labels))
            else:
                bank[probe.name].update(output, actions[:, 0])

    def values(self, bank: MetricBank, split: str) -> dict[str, float]:
        """Metrics of a collected bank by their names, `<probe>_<split>`; R² also for each factor."""
        values = {}
        for probe in self.active:
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
