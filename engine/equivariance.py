"""Equivariance of z and invariance of agg in a frozen network: fitted on training images, judged on test images."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from seqjepa.engine.frozen import FrozenNetwork
from seqjepa.engine.metrics import R2
from seqjepa.engine.probe_protocols import HELD_OUT, logistic_regression, ridge_regression
from seqjepa.engine.probes import mean_r2
from seqjepa.loaders.loader import Loaders

__all__ = ["equivariance_metrics", "within_share"]

COMPONENTS = 64  # of z, that actions act on


def equivariance_metrics(
    network: FrozenNetwork, loaders: Loaders, progress: Callable[[], None]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """What the action does to features, and what it leaves.

    - equivariance_error: of z(g x) predicted from z(x) by a map that is linear in z(x), its coefficients linear in the
      action; residual over variance, 0 exact, 1 no better than the mean
    - equivariance_error_without_action: the same from z(x) alone: what knowing the action is worth
    - invariance_error_agg, invariance_error_z: share of the variance that lies between two sequences of one image
      (its second view, for z): 0 invariant, 1 no trace of the image
    - probe_class_acc_inv, probe_class_acc_eq, gap_class: class from agg and from z of a moved view, percent
    - probe_action_r2_eq, probe_action_r2_inv, gap_action: action from two z and from agg, which is given it

    Args:
        network: that is asked; the last of its lengths is that of agg.
        loaders: of its sequences.
        progress: called after each batch.

    Returns:
        The metrics, and test features: `z` of the first views and `agg`.
    """
    agg, width = f"agg_{network.lengths[-1]}", network.model.num_features
    train = network.read(loaders.train, 1, progress)
    test = network.read(loaders.validation, 1, progress)
    again = network.read(loaders.validation.redrawn(), 1, progress)
    held_out = train["index"] % HELD_OUT == 0
    metrics: dict[str, float] = {}

    first, second = train["pair"].split(width, dim=1)
    mean = first.mean(0)
    directions = torch.pca_lowrank(first - mean, min(COMPONENTS, *first.shape), center=False)[2]
    source, target = (first - mean) @ directions, second
    test_source = (test["pair"][:, :width] - mean) @ directions
    test_target = test["pair"][:, width:]
    for name, inputs, test_inputs in (
        ("equivariance_error", _bilinear(source, train["actions"]), _bilinear(test_source, test["actions"])),
        ("equivariance_error_without_action", source, test_source),
    ):
        predicted = ridge_regression(inputs, target, held_out, test_inputs)
        metrics[name] = _residual(predicted, test_target.double())

    metrics["invariance_error_agg"] = within_share(test[agg], again[agg])
    metrics["invariance_error_z"] = within_share(test_target, again["pair"][:, width:])

    for name, feature in (("inv", agg), ("eq", "moved")):
        rows, test_rows = (second, test_target) if feature == "moved" else (train[feature], test[feature])
        predicted = logistic_regression(rows, train["labels"], held_out, test_rows, num_classes=loaders.num_classes)
        metrics[f"probe_class_acc_{name}"] = 100 * (predicted == test["labels"]).double().mean().item()
    for name, feature in (("eq", "pair"), ("inv", agg)):
        predicted = ridge_regression(train[feature], train["actions"], held_out, test[feature])
        score = R2(predicted.shape[1]).double().to(predicted.device)
        score.update(predicted, test["actions"])
        metrics[f"probe_action_r2_{name}"] = mean_r2(score.compute())
    metrics["gap_class"] = metrics["probe_class_acc_inv"] - metrics["probe_class_acc_eq"]
    metrics["gap_action"] = metrics["probe_action_r2_eq"] - metrics["probe_action_r2_inv"]
    return metrics, {"z": test["first"], "agg": test[agg]}


def within_share(one: Tensor, other: Tensor) -> float:
    """Share of the variance of features [N, D] that lies within pairs of rows (1 - the intraclass correlation)."""
    one, other = one.double(), other.double()
    within = (one - other).square().sum() / (2 * len(one))
    both = torch.cat([one, other])
    whole = (both - both.mean(0)).square().sum() / len(both)
    return (within / whole).item() if whole else math.nan


def _bilinear(z: Tensor, actions: Tensor) -> Tensor:
    """z [N, C], actions [N, A] and all their products, [N, C + A + C A]."""
    return torch.cat([z, actions, (z[:, :, None] * actions[:, None]).flatten(1)], dim=1)


def _residual(predicted: Tensor, target: Tensor) -> float:
    spread = (target - target.mean(0)).square().sum()
    return ((target - predicted).square().sum() / spread).item() if spread else math.nan
