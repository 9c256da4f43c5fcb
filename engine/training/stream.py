"""What is measured after each task of a stream, on all of its tasks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import broadcast, broadcast_object_list

from ...loaders.loader import Loaders
from ...loaders.streams.replay import Coreset
from ..analysis.continual import Matrix, stream_scores
from ..analysis.coresets import largest_rate
from ..evaluation.frozen import untrained_network
from ..evaluation.tasks import MEASURES, task_scores
from ..reports.console import number
from .step import TrainingStep


class TaskMeasures:
    """Scores of the network on every task, after each; the untrained network's are taken at the start.

    Only the main process measures; the others receive the results.
    """

    def __init__(self, training: TrainingStep, loaders: Loaders):
        self.training, self.loaders = training, loaders
        config, accelerator, train = training.config, training.accelerator, loaders.train
        self.untrained = self._of_main(
            lambda: self._scores(untrained_network(config, accelerator, train.restricted(train.sampler.indices)))
        )

    def after(self, number: int, rows: list[dict[str, Any]], check: Callable[[], None]) -> dict[str, float]:
        """Scores of the network after `number` tasks, and summaries of them and of the `rows` of the tasks before.

        There are no summaries if a row is missing. `check` is called now and then, and may raise.
        """

        def measure() -> dict[str, float]:
            self.training.losses.eval()
            scores = self._scores(self.training.model, check)
            return scores | (self.summaries([*rows, scores]) if len(rows) == number - 1 else {})

        return self._of_main(measure)

    def end(self, number: int) -> None:
        """End task `number`: remember the encoder, and choose what a coreset keeps."""
        training, stream = self.training, self.loaders.stream
        training.end_task()
        if stream is None or not isinstance(buffer := stream.buffer, Coreset):
            return
        candidates = stream.candidates(number - 1)
        features, encoder = [], training.model.eval().encoder
        with torch.no_grad(), training.accelerator.autocast():
            for images, _, _ in self.loaders.train.restricted(candidates).clean():
                features.append(encoder(images[:, None])[:, 0].float())
        chosen = largest_rate(torch.cat(features), buffer.config.size, buffer.config.eps)
        if training.world is not None:  # features may differ by a rounding
            chosen = broadcast(chosen)
        buffer.chosen = candidates[chosen.cpu().numpy()]

    def matrices(self, rows: list[dict[str, Any]]) -> dict[str, Matrix]:
        """Scores by measure: row i has those on each task after task i. Measures that the task lacks are left out."""
        count = range(1, len(self.loaders.stream.tasks) + 1) if self.loaders.stream else ()
        names = {measure: [f"task_{measure}_{task}" for task in count] for measure in MEASURES}
        return {
            measure: [[row[name] for name in of_measure] for row in rows]
            for measure, of_measure in names.items()
            if all(_known(row.get(name)) for row in [self.untrained, *rows] for name in of_measure)
        }

    def summaries(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`stream_scores` of each measure, by `stream_<measure>_<summary>`."""
        untrained = self.matrices([self.untrained])
        return {
            f"stream_{measure}_{name}": value
            for measure, matrix in self.matrices(rows).items()
            for name, value in stream_scores(matrix, untrained[measure][0]).items()
        }

    def summary(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Names of the tasks, and by measure the matrix of its scores, the untrained network's, and summaries.

        There are no measures if a row is missing.
        """
        assert self.loaders.stream is not None
        untrained, measures = self.matrices([self.untrained]), {}
        whole = [row["epoch"] for row in rows] == list(range(1, len(self.loaders.stream.tasks) + 1))
        for measure, matrix in self.matrices(rows).items() if whole else ():
            before = untrained[measure][0]
            measures[measure] = {"matrix": matrix, "untrained": before, **stream_scores(matrix, before)}
        return {"tasks": [task.name for task in self.loaders.stream.tasks], "measures": measures}

    def told(self, scores: dict[str, float]) -> list[str]:
        """A line for each measure: the score on each task, and on the untrained network."""
        lines = []
        for measure, (row,) in self.matrices([scores]).items():
            (before,) = self.matrices([self.untrained])[measure]
            pairs = (f"{number(now)} ({number(then)})" for now, then in zip(row, before, strict=True))
            lines.append(f"{measure} by task (untrained): {', '.join(pairs)}")
        return lines

    def _scores(self, model: Any, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        training = self.training
        shuffled = training.config.ablation.shuffle_actions
        given = training.objective, self.loaders, training.accelerator
        return task_scores(model.eval(), *given, shuffled=shuffled, progress=check)

    def _of_main(self, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        found = [measure() if self.training.accelerator.is_main_process else None]
        broadcast_object_list(found)
        return found[0] or {}


def _known(value: float | None) -> bool:
    """Whether a score is a number; files hold NaN as null."""
    return value is not None and not math.isnan(value)


def buffer_size(loaders: Loaders) -> str | None:
    """What the stream keeps, in words; None if nothing."""
    stream = loaders.stream
    if stream is None or stream.buffer is None:
        return None
    height, width = loaders.sequence.image_size
    size = stream.buffer.config.size
    return f"{size} images ({size * height * width * 3 / 2**20:.1f} MiB), {stream.replayed} of each batch"
