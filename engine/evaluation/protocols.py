"""The protocols of the frozen-probe evaluation: heads trained as in the paper, or regressions on features."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...loaders.loader import Loaders
from ..analysis.accumulators import r2_score
from ..analysis.regressions import held_out_rows, knn, logistic_regression, ridge_regression
from .config import EvalConfig
from .frozen import FrozenNetwork, FrozenProbe, Progress, Rows
from .probes import mlp


def paper_protocol(
    network: FrozenNetwork, probes: list[FrozenProbe], loaders: Loaders, settings: EvalConfig, progress: Progress
) -> dict[str, float]:
    """Train the heads of all probes together with Adam, on views rendered anew in each epoch, and test them.

    Heads are linear for classes and MLPs for factors of several numbers (crop, jitter, rotation), trained for
    `eval.epochs`, and linear for factors of one number (blur, shifts, scale), trained for `eval.linear_epochs`
    (seq-JEPA, appendix on evaluation). There is at least one probe; its score, percent or R², is returned by its name.
    """
    test = network.read(loaders.validation, 1, progress)
    heads, epochs = nn.ModuleDict(), {}
    for probe in probes:
        inputs = test[probe.feature].shape[1]
        several = probe.dims is not None and probe.outputs > 1
        heads[probe.name] = mlp(inputs, settings.hidden, probe.outputs) if several else nn.Linear(inputs, probe.outputs)
        enough = settings.epochs if several or probe.dims is None else settings.linear_epochs
        epochs[probe.name] = min(enough, settings.epochs)
    heads.to(test["labels"].device)
    optimizer = torch.optim.Adam(heads.parameters(), lr=settings.lr, fused=True)
    clean = network.clean(loaders.train)
    for epoch in range(max(epochs.values())):
        # a head without a gradient is not updated
        training = [probe for probe in probes if epoch < epochs[probe.name]]
        for batch in loaders.train.epoch(epoch):
            features = network.features(batch) | {"clean": clean[batch.index]}
            losses = []
            for probe in training:
                output = heads[probe.name](features[probe.feature])
                loss = F.cross_entropy if probe.dims is None else F.mse_loss
                losses.append(loss(output, batch.labels if probe.dims is None else batch.actions[:, 0, probe.dims]))
            torch.stack(losses).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress()
    scores = {}
    with torch.no_grad():
        for probe in probes:
            output = heads[probe.name](test[probe.feature])
            scores[probe.name] = _score(probe, output.argmax(-1) if probe.dims is None else output, test)
    return scores


Classify = Callable[[Tensor, Tensor, Tensor, Tensor, int], dict[str, Tensor]]


def fast_protocol(
    network: FrozenNetwork, probes: list[FrozenProbe], loaders: Loaders, settings: EvalConfig, progress: Progress
) -> dict[str, float]:
    """Read the features of `eval.renderings` renderings, then fit logistic and ridge regressions and neighbours.

    Takes and returns the same as `paper_protocol`; for each class probe, `<name>_knn` is the accuracy of
    `eval.neighbours` nearest neighbours.
    """

    def classify(rows: Tensor, labels: Tensor, held_out: Tensor, test_rows: Tensor, classes: int) -> dict[str, Tensor]:
        predicted = logistic_regression(rows, labels, held_out, test_rows, num_classes=classes)
        return {"": predicted, "_knn": knn(rows, labels, test_rows, num_classes=classes, k=settings.neighbours)}

    return _regressions(network, probes, loaders, settings, progress, classify)


def ridge_protocol(
    network: FrozenNetwork, probes: list[FrozenProbe], loaders: Loaders, settings: EvalConfig, progress: Progress
) -> dict[str, float]:
    """Read features as `fast_protocol` does, and fit ridge regressions only, of actions and of classes (one-hot).

    They are in closed form, so that results do not depend on an optimiser. Takes and returns the same as
    `paper_protocol`.
    """

    def classify(rows: Tensor, labels: Tensor, held_out: Tensor, test_rows: Tensor, classes: int) -> dict[str, Tensor]:
        return {"": ridge_regression(rows, F.one_hot(labels, classes), held_out, test_rows).argmax(-1)}

    return _regressions(network, probes, loaders, settings, progress, classify)


def _regressions(
    network: FrozenNetwork,
    probes: list[FrozenProbe],
    loaders: Loaders,
    settings: EvalConfig,
    progress: Progress,
    classify: Classify,
) -> dict[str, float]:
    """Scores of ridge regressions of actions, and of classes that `classify` predicts, by a suffix of the name."""
    train = network.read(loaders.train, settings.renderings, progress)
    test = network.read(loaders.validation, 1, progress)
    held_out = held_out_rows(train["index"])
    scores = {}
    for probe in probes:
        # a clean image is the same in each rendering
        rows = slice(len(train["index"]) // settings.renderings if probe.feature == "clean" else None)
        features, test_features = train[probe.feature][rows], test[probe.feature]
        if probe.dims is None:
            found = classify(features, train["labels"][rows], held_out[rows], test_features, probe.outputs)
        else:
            targets = train["actions"][rows, probe.dims]
            found = {"": ridge_regression(features, targets, held_out[rows], test_features)}
        scores |= {f"{probe.name}{suffix}": _score(probe, predicted, test) for suffix, predicted in found.items()}
    return scores


PROTOCOLS: dict[str, Callable[..., dict[str, float]]] = {
    "ridge": ridge_protocol,
    "fast": fast_protocol,
    "paper": paper_protocol,
}


def _score(probe: FrozenProbe, predicted: Tensor, test: Rows) -> float:
    """Percent of correct labels, or mean R² of the dimensions of the action."""
    if probe.dims is None:
        return 100 * (predicted == test["labels"]).double().mean().item()
    return r2_score(predicted, test["actions"][:, probe.dims])
