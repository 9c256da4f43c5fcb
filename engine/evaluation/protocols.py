"""The two protocols of the frozen-probe evaluation: heads trained as in the paper, or solved on cached features."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...loaders.loader import Loaders
from ..analysis.accumulators import R2
from .config import EvalConfig
from .frozen import FrozenNetwork, FrozenProbe
from .probes import mean_r2, mlp

__all__ = ["PROTOCOLS", "fast_protocol", "knn", "logistic_regression", "paper_protocol", "ridge_regression"]

HELD_OUT = 5  # one training image in five is held out to choose a penalty
RIDGE_PENALTIES = [10.0**power for power in range(-6, 2)]
LOGISTIC_PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)
LOGISTIC_ITERATIONS = 30


def paper_protocol(
    network: FrozenNetwork,
    asked: list[FrozenProbe],
    loaders: Loaders,
    settings: EvalConfig,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Train all heads together with Adam, on views rendered anew in each epoch, and test them.

    Heads are linear for classes and MLPs for factors of several numbers (crop, jitter, rotation), trained for
    `eval.epochs`, and linear for factors of one number (blur, shifts, scale), trained for `eval.linear_epochs`
    (seq-JEPA, appendix on evaluation).

    Args:
        network: the frozen network.
        asked: the probes.
        loaders: loaders of the evaluation.
        settings: config of the evaluation.
        progress: called after each batch.

    Returns:
        Percent or R² by the name of the probe.
    """
    dims = loaders.sequence.factors
    test = network.read(loaders.validation, 1, progress)
    heads, lasting = nn.ModuleDict(), set()
    for question in asked:
        inputs = test[question.feature].shape[1]
        outputs = loaders.num_classes if question.factor is None else _size(dims[question.factor])
        several = question.factor is not None and outputs > 1
        heads[question.name] = mlp(inputs, settings.hidden, outputs) if several else nn.Linear(inputs, outputs)
        if question.factor is None or several:
            lasting.add(question)
    heads.to(test["labels"].device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=settings.lr, fused=True)
    clean = network.clean(loaders.train)
    for epoch in range(settings.epochs):
        # a head without a gradient is not updated
        at_work = [question for question in asked if question in lasting or epoch < settings.linear_epochs]
        for batch in loaders.train.epoch(epoch):
            features = network.features(batch) | {"clean": clean[batch.index]}
            losses = []
            for question in at_work:
                output = heads[question.name](features[question.feature])
                if question.factor is None:
                    losses.append(F.cross_entropy(output, batch.labels))
                else:
                    losses.append(F.mse_loss(output, batch.actions[:, 0, dims[question.factor]]))
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress()
    answers = {}
    with torch.no_grad():
        for question in asked:
            output = heads[question.name](test[question.feature])
            predicted = output.argmax(-1) if question.factor is None else output
            answers[question.name] = _score(question, predicted, test, dims)
    return answers


def fast_protocol(
    network: FrozenNetwork,
    asked: list[FrozenProbe],
    loaders: Loaders,
    settings: EvalConfig,
    progress: Callable[[], None],
) -> dict[str, float]:
    """Read the features of `eval.renderings` renderings, then fit logistic and ridge regressions and neighbours.

    Takes and returns the same as `paper_protocol`; for each class probe, `<name>_knn` is the accuracy of
    `eval.neighbours` nearest neighbours.
    """
    dims = loaders.sequence.factors
    train = network.read(loaders.train, settings.renderings, progress)
    test = network.read(loaders.validation, 1, progress)
    held_out = train["index"] % HELD_OUT == 0  # all renderings of an image are held out together
    answers = {}
    for question in asked:
        # a clean image is the same in each rendering
        rows = slice(len(train["index"]) // settings.renderings if question.feature == "clean" else None)
        features, kept_out, test_features = train[question.feature][rows], held_out[rows], test[question.feature]
        if question.factor is None:
            given, classes = train["labels"][rows], loaders.num_classes
            predicted = logistic_regression(features, given, kept_out, test_features, num_classes=classes)
            answers[question.name] = _score(question, predicted, test, dims)
            voted = knn(features, given, test_features, num_classes=classes, k=settings.neighbours)
            answers[f"{question.name}_knn"] = _score(question, voted, test, dims)
        else:
            targets = train["actions"][rows, dims[question.factor]]
            predicted = ridge_regression(features, targets, kept_out, test_features)
            answers[question.name] = _score(question, predicted, test, dims)
    return answers


PROTOCOLS: dict[str, Callable[..., dict[str, float]]] = {"fast": fast_protocol, "paper": paper_protocol}


def _score(question: FrozenProbe, predicted: Tensor, test: dict[str, Tensor], dims: dict[str, slice]) -> float:
    """Percent of correct labels, or the mean R² of the dimensions that vary; NaN if none does."""
    if question.factor is None:
        return 100 * (predicted == test["labels"]).double().mean().item()
    targets = test["actions"][:, dims[question.factor]]
    score = R2(targets.shape[1]).double().to(targets.device)
    score.update(predicted, targets)
    return mean_r2(score.compute())


def _size(dims: slice) -> int:
    return dims.stop - dims.start


def ridge_regression(features: Tensor, targets: Tensor, held_out: Tensor, test_features: Tensor) -> Tensor:
    """Linear regression in double precision, whose L2 penalty is chosen on held-out rows; the final fit uses all rows.

    Args:
        features: [N, D].
        targets: [N, K].
        held_out: bool [N]; rows on which the penalty is chosen.
        test_features: [T, D].

    Returns:
        Predictions [T, K].
    """
    kept = ~held_out
    fitted = _ridge_path(features[kept], targets[kept], features[held_out])
    errors = torch.stack([(p - targets[held_out]).square().sum() for p in fitted])
    return _ridge_path(features, targets, test_features)[int(errors.argmin())]


def _ridge_path(features: Tensor, targets: Tensor, test_features: Tensor) -> list[Tensor]:
    """Predictions for each penalty, from one eigendecomposition."""
    features, targets, test_features = features.double(), targets.double(), test_features.double()
    mean, target_mean = features.mean(0), targets.mean(0)
    scale = features.std(0).clamp(min=1e-6)
    rows, test_rows = (features - mean) / scale, (test_features - mean) / scale
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
    iterations: with many classes it stops short of the minimum, which also regularises.

    Takes the arguments of `ridge_regression`, with labels [N] for targets; returns predicted labels [T].
    """
    mean, scale = features.mean(0), features.std(0).clamp(min=1e-6)
    rows, test_rows = (features - mean) / scale, (test_features - mean) / scale
    kept = ~held_out
    weights = torch.zeros(rows.shape[1] + 1, num_classes, device=rows.device)
    best, chosen, start = -1.0, LOGISTIC_PENALTIES[0], weights
    for penalty in LOGISTIC_PENALTIES:
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
