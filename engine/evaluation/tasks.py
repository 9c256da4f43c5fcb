"""Scores of a network on each task of a stream: its own predictions, and probes that are fitted anew."""

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from ...loaders.batch import Batch, each
from ...loaders.draws import TASK_STREAM, keys
from ...loaders.loader import Loaders, SequenceLoader
from ...loaders.streams.order import Task
from ..analysis.accumulators import r2_score
from ..analysis.regressions import held_out_rows, ridge_regression
from ..models.seq_jepa import SeqJEPA
from ..objectives.objective import Objective
from .frozen import Progress, Rows, rows_of

MEASURES = ("cosine", "class", "own_class", "r2")


@torch.no_grad()
def task_scores(
    model: SeqJEPA,
    objective: Objective,
    loaders: Loaders,
    accelerator: Accelerator,
    *,
    shuffled: bool = False,
    progress: Progress = lambda: None,
) -> dict[str, float]:
    """Scores of a network in eval mode on the test sequences of each task, by `task_<measure>_<number>`, from 1 on.

    It runs on one process and waits for no other. `shuffled` networks get the actions of another sequence.

    - cosine: of centred prediction and target; it needs no probe, and says what the network itself has forgotten
    - class: percent correct of a ridge regression from the aggregate, fitted on training images of all tasks; own_class
      allows only the classes of the task as answers, if tasks have classes of their own
    - r2: R² of the first action's factors that vary in the task, by a ridge regression from z of two views

    Probes are fitted on all tasks after each, so that what they lose is lost in the features, not in the probes.
    """
    assert loaders.stream is not None
    tasks, classes = loaders.stream.tasks, loaders.num_classes or 0

    def read(loader: SequenceLoader, positions: np.ndarray) -> Rows:
        return _read(model, loader.restricted(positions), accelerator, shuffled, progress)

    train = read(loaders.train, loaders.train.sampler.indices)
    held_out, found = held_out_rows(train["index"]), {}
    for number, task in enumerate(tasks, start=1):
        test = read(loaders.validation, task.validation)
        own = torch.isin(train["index"], torch.from_numpy(task.train).to(train["index"].device))
        found[f"task_cosine_{number}"] = _cosine(objective, test)
        if classes:
            targets = F.one_hot(train["labels"], classes)
            scores = ridge_regression(train["agg"], targets, held_out, test["agg"])
            found[f"task_class_{number}"] = _percent(scores, test["labels"])
            if task.factors is None:
                others = ~torch.isin(torch.arange(classes, device=scores.device), train["labels"][own])
                found[f"task_own_class_{number}"] = _percent(scores.masked_fill(others, -torch.inf), test["labels"])
        dims = _varying(task, loaders)
        if dims and loaders.sequence.num_views > 2:
            columns = [column for part in dims for column in range(part.start, part.stop)]
            # of the task's own images: elsewhere its factors may never vary
            actions = train["actions"][own][:, columns]
            predicted = ridge_regression(train["pair"][own], actions, held_out[own], test["pair"])
            found[f"task_r2_{number}"] = r2_score(predicted, test["actions"][:, columns])
    return found


@torch.no_grad()
def task_cosine(
    model: SeqJEPA,
    objective: Objective,
    loaders: Loaders,
    accelerator: Accelerator,
    task: Task,
    *,
    most: int,
    shuffled: bool = False,
) -> float:
    """The cosine of `task_scores` alone, on at most `most` test sequences of one task."""
    loader = loaders.validation.restricted(some(task.validation, most))
    return _cosine(objective, _read(model, loader, accelerator, shuffled, lambda: None))


@torch.no_grad()
def task_features(model: SeqJEPA, loaders: Loaders, accelerator: Accelerator, task: Task, *, most: int) -> Tensor:
    """z of the first view of at most `most` test sequences of a task, float32 [N, D] on the CPU, in eval mode."""
    found = []
    for batch in loaders.validation.restricted(some(task.validation, most)).epoch(0):
        with accelerator.autocast():
            found.append(model.encoder(each(batch.views, lambda x: x[:, :1]))[:, 0].float().cpu())
    return torch.cat(found)


def some(positions: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of some positions, always the same ones, in order: neighbours in a dataset may be of one class."""
    if len(positions) <= most:
        return positions
    return np.sort(positions[np.argsort(keys(0, TASK_STREAM, positions), kind="stable")[:most]])


def _cosine(objective: Objective, rows: Rows) -> float:
    prediction, target = (x - x.mean(0) for x in (objective.prediction.comparable(rows["prediction"]), rows["target"]))
    return torch.cosine_similarity(prediction, target, dim=-1).mean().item()


def _percent(scores: Tensor, labels: Tensor) -> float:
    """Percent of rows whose label has the highest score."""
    return 100 * (scores.argmax(-1) == labels).double().mean().item()


def _varying(task: Task, loaders: Loaders) -> list[slice]:
    """Dimensions of the action of the factors that vary in a task and belong to the action."""
    factors = loaders.sequence.factors
    return [dims for name, dims in factors.items() if task.factors is None or name in task.factors]


def _read(model: SeqJEPA, loader: SequenceLoader, accelerator: Accelerator, shuffled: bool, progress: Progress) -> Rows:
    """Of every sequence: z of its first views as `pair`, `agg`, `prediction`, `target`, and what `rows_of` adds."""

    def features(batch: Batch) -> dict[str, Tensor]:
        with accelerator.autocast():
            output = model(batch.views, batch.actions.roll(1, 0) if shuffled else batch.actions).float()
        pair = output.z[:, :2].flatten(1)
        return {"pair": pair, "agg": output.agg, "prediction": output.prediction, "target": output.target}

    return rows_of(loader, 1, features, progress)
