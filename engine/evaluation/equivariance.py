"""Equivariance of z and invariance of agg in a frozen network, fitted on training images and tested on test images."""

import math

import torch
from torch import Tensor

from ...loaders.batch import Batch, each
from ...loaders.loader import SequenceLoader
from ..analysis.accumulators import r2_score
from ..analysis.regressions import held_out_rows, logistic_regression, ridge_regression
from .frozen import FrozenNetwork, Progress, Rows, rows_of

COMPONENTS = 64  # principal components of z from which the transformed z is predicted


@torch.no_grad()
def read_moved(network: FrozenNetwork, loader: SequenceLoader, progress: Progress) -> Rows:
    """Features of sequences of M + 1 observed views, of which the first may be the unchanged image.

    M is the last length of the network. As `rows_of`: `first` and `second` are z of the first two views, `agg` is of
    the M views after the first, and does not receive `actions`, which lead from the first view to the second.
    """
    model, length = network.model, network.lengths[-1]

    def features(batch: Batch) -> dict[str, Tensor]:
        with network.accelerator.autocast():
            z = model.encoder(each(batch.views, lambda x: x[:, : length + 1]))
            embedded = model.embed(batch.actions[:, :length])[:, 1:]
            agg = model.aggregate(z[:, 1:], embedded)
        return {"first": z[:, 0].float(), "second": z[:, 1].float(), "agg": agg.float()}

    return rows_of(loader, 1, features, progress)


def equivariance_metrics(
    train: Rows, test: Rows, again: Rows, factors: dict[str, slice], num_classes: int | None
) -> dict[str, float]:
    """How equivariant z is, and how invariant agg is.

    All rows are features that `read_moved` returns: `train` of training images, `test` of test images, and `again` of
    the same test images with other draws. `factors` are dimensions of the action by factor; if they are empty, metrics
    that need the action are left out, and if there are no classes, those that need labels.

    - equivariance_error: error of z(g x) predicted from z(x) by a map that is linear in z(x), with coefficients that
      depend on the action (`action_features`); residual over variance, so 1 is no better than predicting the mean
    - equivariance_error_without_action: the same from z(x) alone; the difference is what knowing the action is worth
    - invariance_error_agg, invariance_error_z: share of the variance that lies between two sequences of one image, for
      agg of transformed views and for z of one of them; 0 is invariant, 1 means no trace of the image
    - probe_class_acc_inv, probe_class_acc_eq, gap_class: class from that agg and that z, percent
    - probe_action_r2_eq, probe_action_r2_inv, gap_action: action from the first view to the second, predicted from the
      z of both and from agg, which sees the second view but does not receive the action
    """
    held_out = held_out_rows(train["index"])
    metrics: dict[str, float] = {}

    mean = train["first"].mean(0)
    directions = torch.pca_lowrank(train["first"] - mean, min(COMPONENTS, *train["first"].shape), center=False)[2]
    source, test_source = ((part["first"] - mean) @ directions for part in (train, test))
    inputs = {"equivariance_error_without_action": (source, test_source)}
    if factors:
        moves, test_moves = (action_features(part["actions"], factors) for part in (train, test))
        products = _products(source, moves), _products(test_source, test_moves)
        inputs = {"equivariance_error": products, **inputs}
    for name, (rows, test_rows) in inputs.items():
        predicted = ridge_regression(rows, train["second"], held_out, test_rows)
        metrics[name] = _residual(predicted, test["second"].double())

    metrics["invariance_error_agg"] = within_share(test["agg"], again["agg"])
    metrics["invariance_error_z"] = within_share(test["second"], again["second"])

    if num_classes:
        for name, feature in (("inv", "agg"), ("eq", "second")):
            features = train[feature], train["labels"], held_out, test[feature]
            predicted = logistic_regression(*features, num_classes=num_classes)
            metrics[f"probe_class_acc_{name}"] = 100 * (predicted == test["labels"]).double().mean().item()
        metrics["gap_class"] = metrics["probe_class_acc_inv"] - metrics["probe_class_acc_eq"]
    if factors:
        both, test_both = (torch.cat([part["first"], part["second"]], dim=1) for part in (train, test))
        for name, rows, test_rows in (("eq", both, test_both), ("inv", train["agg"], test["agg"])):
            predicted = ridge_regression(rows, train["actions"], held_out, test_rows)
            metrics[f"probe_action_r2_{name}"] = r2_score(predicted, test["actions"])
        metrics["gap_action"] = metrics["probe_action_r2_eq"] - metrics["probe_action_r2_inv"]
    return metrics


def action_features(actions: Tensor, factors: dict[str, slice]) -> Tensor:
    """Actions [N, A] and, within each factor of several numbers, the products of these numbers: [N, A'].

    From the sine and cosine of an angle, they span all functions of the angle up to the second harmonic, and every
    function of right angles. So a map that is linear in them can follow an image that looks the same after half a turn.
    """
    parts = [actions]
    for dims in factors.values():
        numbers = actions[:, dims]
        if (size := numbers.shape[1]) > 1:
            rows, columns = torch.triu_indices(size, size, device=actions.device)
            parts.append(numbers[:, rows] * numbers[:, columns])
    return torch.cat(parts, dim=1)


def within_share(one: Tensor, other: Tensor) -> float:
    """Share of the variance of features [N, D] that lies within pairs of rows (1 - the intraclass correlation)."""
    one, other = one.double(), other.double()
    within = (one - other).square().sum() / (2 * len(one))
    both = torch.cat([one, other])
    whole = (both - both.mean(0)).square().sum() / len(both)
    return (within / whole).item() if whole else math.nan


def _products(z: Tensor, moves: Tensor) -> Tensor:
    """z [N, C], moves [N, A] and all products of the two, [N, C + A + C A]."""
    return torch.cat([z, moves, (z[:, :, None] * moves[:, None]).flatten(1)], dim=1)


def _residual(predicted: Tensor, target: Tensor) -> float:
    spread = (target - target.mean(0)).square().sum()
    return ((target - predicted).square().sum() / spread).item() if spread else math.nan
