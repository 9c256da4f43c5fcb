"""Predictions from features without training a head: ridge regression, logistic regression, nearest neighbours."""

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 5  # one training image in five is held out to choose a penalty
RIDGE_PENALTIES = [10.0**power for power in range(-6, 2)]
LOGISTIC_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
LOGISTIC_ITERATIONS = 30


def held_out_rows(index: Tensor) -> Tensor:
    """Rows on which a penalty is chosen, bool [N], from the images' positions in the dataset [N].

    All renderings of an image are held out together. Where too few images are left to fit, or none is held out, their
    ranks take the place of their positions.
    """
    held_out = index % HELD_OUT == 0
    return held_out if _suffice(held_out) else index.unique(return_inverse=True)[1] % HELD_OUT == 0


def _suffice(held_out: Tensor) -> bool:
    """Whether a penalty can be chosen: there are two rows or more to fit, and one or more to judge the fit by."""
    return 1 <= int(held_out.sum()) <= len(held_out) - 2


def ridge_regression(features: Tensor, targets: Tensor, held_out: Tensor, test_features: Tensor) -> Tensor:
    """Predictions [T, K] for test features [T, D], by linear regression from features [N, D] to targets [N, K].

    It is in double precision. Its L2 penalty is chosen on the rows that are held out (bool [N]), and the final fit uses
    all rows. Where the rows do not suffice to choose, it is the largest.
    """
    if not _suffice(held_out):
        return _ridge_path(features, targets, test_features)[-1]
    kept = ~held_out
    fitted = _ridge_path(features[kept], targets[kept], features[held_out])
    errors = torch.stack([(p - targets[held_out]).square().sum() for p in fitted])
    return _ridge_path(features, targets, test_features)[int(errors.argmin())]


def _standardised(features: Tensor, test_features: Tensor) -> tuple[Tensor, Tensor]:
    """Both by the mean and the deviation of the first."""
    mean, scale = features.mean(0), features.std(0, correction=min(1, len(features) - 1)).clamp(min=1e-6)
    return (features - mean) / scale, (test_features - mean) / scale


def _ridge_path(features: Tensor, targets: Tensor, test_features: Tensor) -> list[Tensor]:
    """Predictions for each penalty, from one eigendecomposition."""
    features, targets, test_features = features.double(), targets.double(), test_features.double()
    rows, test_rows = _standardised(features, test_features)
    target_mean = targets.mean(0)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    right = vectors.T @ (rows.T @ (targets - target_mean)) / len(rows)
    test_rows = test_rows @ vectors
    values = values.clamp(min=0)[:, None]
    return [test_rows @ (right / (values + penalty)) + target_mean for penalty in RIDGE_PENALTIES]


def logistic_regression(
    features: Tensor, labels: Tensor, held_out: Tensor, test_features: Tensor, *, num_classes: int
) -> Tensor:
    """Multinomial logistic regression by L-BFGS; its L2 penalty is chosen on held-out rows, the last fit uses all rows.

    The penalty falls until the accuracy stops rising. Each fit starts from the last one and has at most thirty
    iterations: with many classes it stops short of the minimum, which also regularises. Where the rows do not suffice
    to choose a penalty, it is the largest.

    Takes the arguments of `ridge_regression`, with labels [N] for targets; returns predicted labels [T].
    """
    rows, test_rows = _standardised(features, test_features)
    kept = ~held_out
    weights = torch.zeros(rows.shape[1] + 1, num_classes, device=rows.device)
    best, chosen, start = -1.0, LOGISTIC_PENALTIES[0], weights
    for penalty in LOGISTIC_PENALTIES if _suffice(held_out) else ():
        weights = _logistic_fit(rows[kept], labels[kept], weights, penalty)
        right = (_scores(rows[held_out], weights).argmax(-1) == labels[held_out]).double().mean().item()
        if right <= best:
            break
        best, chosen, start = right, penalty, weights
    return _scores(test_rows, _logistic_fit(rows, labels, start, chosen)).argmax(-1)


def _scores(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.addmm(weights[-1], rows, weights[:-1])


def _logistic_fit(rows: Tensor, labels: Tensor, start: Tensor, penalty: float) -> Tensor:
    weights = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weights], max_iter=LOGISTIC_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = F.cross_entropy(_scores(rows, weights), labels) + penalty / 2 * weights[:-1].square().sum()
            value.backward()
        return value

    optimizer.step(loss)
    return weights.detach()


def knn(features: Tensor, labels: Tensor, test_features: Tensor, *, num_classes: int, k: int) -> Tensor:
    """Labels [T] of test features [T, D] by a vote of the k nearest neighbours, weighted by cosine similarity."""
    bank = F.normalize(features, dim=-1)
    votes = []
    for part in F.normalize(test_features, dim=-1).split(1024):
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=-1)
        scores = similarity.new_zeros(len(part), num_classes).scatter_add_(1, labels[nearest], similarity)
        votes.append(scores.argmax(-1))
    return torch.cat(votes)
