"""What is measured after each task of a stream, on all of its tasks."""

import math
import time
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import Tensor

from ...configs.errors import InputError
from ...loaders.loader import Loaders
from ...loaders.streams.config import TasksConfig
from ...loaders.streams.order import Stream
from ...loaders.streams.replay import Coreset
from ..analysis.continual import Matrix, stability, stream_scores
from ..analysis.coresets import largest_rate
from ..analysis.similarity import linear_cka, shared_directions
from ..evaluation.frozen import untrained_network
from ..evaluation.tasks import MEASURES, task_cosine, task_features, task_scores
from ..reports.console import number
from ..runs.state import Position
from ..runtime.distributed import of_main
from .step import TrainingStep

DRIFTS = {"cka": linear_cka, "overlap": shared_directions}
COMPARED = 1000  # test sequences of each task whose features are kept, to be compared with later ones
TRACED = 512  # test sequences of all tasks that are measured at a time while another is learnt


class TaskMeasures:
    """Scores of the network on every task, after each; the untrained network's are taken at the start.

    Only the main process measures; the others receive the results.

    Attributes:
        untrained: scores of the untrained network, and their average over all tasks, `anytime` too.
        learnt_features: of the test sequences of each task that has ended, as they were then, by its number.
        traces: of each task but the first, the steps since it began, and the cosine of each earlier task then.
    """

    def __init__(self, training: TrainingStep, loaders: Loaders, stream: Stream):
        self.training, self.loaders, self.stream = training, loaders, stream
        config, accelerator, train = training.config, training.accelerator, loaders.train
        self.learnt_features: dict[int, Tensor] = {}
        self.untrained_features: dict[int, Tensor] = {}  # of all tasks, on the main process
        self.traces: dict[int, list[list[float]]] = {}

        def measure() -> dict[str, float]:
            network = untrained_network(config, accelerator, train.restricted(train.sampler.indices)).eval()
            self.untrained_features = self._features(network)
            return self._scores(network)

        self.untrained = of_main(self.training.accelerator, measure)
        for name, (scores,) in self.matrices([self.untrained]).items():
            # the other summaries are differences, and 0 where nothing is learnt
            found = stream_scores([scores] * len(scores), scores)
            self.untrained |= {f"stream_{name}_{kind}": found[kind] for kind in ("average", "anytime")}

    def after(self, number: int, rows: list[dict[str, Any]], check: Callable[[], None]) -> dict[str, float]:
        """Scores of the network after `number` tasks, and summaries of them and of the `rows` of the tasks before.

        There are no summaries if a row is missing. `check` is called now and then, and may raise.
        """

        def measure() -> dict[str, float]:
            self.training.losses.eval()
            scores = self._scores(self.training.model, check) | self._drift(number)
            return (
                scores | (self.summaries([*rows, scores]) if len(rows) == number - 1 else {}) | self._stability(number)
            )

        return of_main(self.training.accelerator, measure)

    def trace(self, position: Position) -> float:
        """Measure the earlier tasks when a later one begins, every `stream.trace_every` steps, and when it ends.

        Returns:
            The seconds that it took.
        """
        (ended, step), training, tasks = position, self.training, self.stream.tasks
        config, started = training.config, time.perf_counter()
        assert isinstance(config.stream, TasksConfig)
        every = config.stream.trace_every
        if not (ended and every) or (step % every and step < self._steps(ended + 1)):
            return 0.0
        if "prediction" not in config.objective.reads:
            return 0.0
        training.share_buffers()
        if training.accelerator.is_main_process:
            rows = self.traces.setdefault(ended + 1, [])
            if not rows or rows[-1][0] < step:  # else of a run that was interrupted at a boundary
                given = training.model.eval(), training.objective, self.loaders, training.accelerator
                most, shuffled = max(32, TRACED // (len(tasks) - 1)), config.ablation.shuffle_actions
                cosines = [task_cosine(*given, task, most=most, shuffled=shuffled) for task in tasks[:ended]]
                rows.append([float(step), *cosines])
                training.losses.train()
        return time.perf_counter() - started

    def _steps(self, number: int) -> int:
        """Optimiser steps of task `number`."""
        first, last = self.stream.starts[number - 1 : number + 1]
        return int(last - first)

    def end(self, number: int) -> None:
        """End task `number`: remember its features and the encoder, and choose what a coreset keeps."""
        training, stream = self.training, self.stream
        if training.accelerator.is_main_process:
            self.learnt_features |= self._features(training.model.eval(), number)
        training.end_task()
        if not isinstance(buffer := stream.buffer, Coreset):
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

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint holds besides the network: features, traces, and what a coreset has chosen."""
        found = {f"features_{task}": features for task, features in self.learnt_features.items()}
        found |= {f"trace_{task}": torch.tensor(rows, dtype=torch.float64) for task, rows in self.traces.items()}
        found = {name: value for name, value in found.items() if value.isfinite().all()}
        buffer = self.stream.buffer
        if isinstance(buffer, Coreset) and buffer.chosen is not None:
            found["chosen"] = torch.from_numpy(buffer.chosen)
        return found

    def load_state_dict(self, tensors: dict[str, Tensor], position: Position) -> None:
        """Go on from what `state_dict` returned at a position.

        Raises:
            InputError: it does not fit this stream.
        """
        for name, value in tensors.items():
            kind, _, number = name.rpartition("_")
            task = int(number) if number.isdecimal() else 0
            if kind == "features" and self._is_features(value, task, position):
                self.learnt_features[task] = value
            elif kind == "trace" and self._is_trace(value, task, position):
                self.traces[task] = value.tolist()
            elif name != "chosen":
                raise InputError(f"its {name} does not fit this stream at this position", "run.resume")
        if isinstance(self.stream.buffer, Coreset):
            self._restore_coreset(self.stream.buffer, tensors.get("chosen"), position)

    def _is_features(self, value: Tensor, task: int, position: Position) -> bool:
        """Whether they can be features of the test sequences of a task that has ended."""
        if not 1 <= task <= position.segment:
            return False
        count = min(COMPARED, len(self.stream.tasks[task - 1].validation))
        return value.dtype == torch.float32 and value.shape == (count, self.training.model.num_features)

    def _is_trace(self, value: Tensor, task: int, position: Position) -> bool:
        """Whether it can be the trace of a task that has begun: rising steps, and a cosine of each earlier task."""
        begun = position.segment + 1  # also at its first step, where a trace starts
        if not 2 <= task <= min(begun, len(self.stream.tasks)):
            return False
        if value.dtype != torch.float64 or value.ndim != 2 or value.shape[1] != task or not len(value):
            return False
        steps, cosines = value[:, 0], value[:, 1:]
        last = self._steps(task) if task < begun else position.step
        whole = (steps == steps.round()).all() and (steps.diff() > 0).all() and steps[0] >= 0 and steps[-1] <= last
        return bool(whole) and bool((cosines.abs() <= 1 + 1e-6).all())

    def _restore_coreset(self, buffer: Coreset, chosen: Tensor | None, position: Position) -> None:
        if chosen is None:
            if position.segment:
                raise InputError("it lacks the images that its buffer held", "run.resume")
            return
        found, size = set(chosen.flatten().tolist()), buffer.config.size
        known = found <= {image for task in self.stream.tasks for image in task.train.tolist()}
        if chosen.dtype != torch.int64 or not known or not self.stream.replayed <= len(found) == chosen.numel() <= size:
            raise InputError("its buffer does not hold images of this stream", "run.resume")
        buffer.chosen = chosen.flatten().numpy()

    def matrices(self, rows: list[dict[str, Any]]) -> dict[str, Matrix]:
        """Scores by measure: row i has those on each task after task i. Measures that the task lacks are left out."""
        numbers = range(1, len(self.stream.tasks) + 1)
        names = {measure: [f"task_{measure}_{task}" for task in numbers] for measure in MEASURES}
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
        """Names of the tasks; by measure the matrix of its scores, the untrained network's, and summaries; and more.

        There are no measures if a row is missing. `drift` says how alike features were to those of the time when their
        task had just been learnt, row by row after each task, and how alike the untrained network's were; `traces` are
        those of the earlier tasks' cosine while a task was learnt.
        """
        untrained, measures = self.matrices([self.untrained]), {}
        numbers = range(1, len(self.stream.tasks) + 1)
        whole = [row["epoch"] for row in rows] == list(numbers)
        for measure, matrix in self.matrices(rows).items() if whole else ():
            before = untrained[measure][0]
            measures[measure] = {"matrix": matrix, "untrained": before, **stream_scores(matrix, before)}
        drift = {
            name: {
                "rows": [[row.get(f"task_{name}_{task}") for task in range(1, row["epoch"])] for row in rows],
                "untrained": [
                    compare(self.learnt_features[task], self.untrained_features[task])
                    if task in self.learnt_features
                    else None
                    for task in numbers
                ],
            }
            for name, compare in DRIFTS.items()
        }
        names = [task.name for task in self.stream.tasks]
        return {"tasks": names, "measures": measures, "drift": drift, "traces": self.traces}

    def told(self, scores: dict[str, float]) -> list[str]:
        """A line for each measure: the score on each task, and on the untrained network."""
        lines = []
        for measure, (row,) in self.matrices([scores]).items():
            (before,) = self.matrices([self.untrained])[measure]
            pairs = (f"{number(now)} ({number(then)})" for now, then in zip(row, before, strict=True))
            lines.append(f"{measure} by task (untrained): {', '.join(pairs)}")
        learnt = sorted(self.learnt_features.items())
        ended = {task: features for task, features in learnt if f"task_cka_{task}" in scores}
        if ended and self.untrained_features:
            likeness = [
                f"{number(scores[f'task_cka_{task}'])} ({number(linear_cka(features, self.untrained_features[task]))})"
                for task, features in ended.items()
            ]
            lines.append(f"features as they were, CKA by task (untrained): {', '.join(likeness)}")
        return lines

    def _features(self, model: Any, *tasks: int) -> dict[int, Tensor]:
        """Features of the test sequences of tasks, or of all, by number."""
        given = self.loaders, self.training.accelerator
        wanted = tasks or range(1, len(self.stream.tasks) + 1)
        return {task: task_features(model, *given, self.stream.tasks[task - 1], most=COMPARED) for task in wanted}

    def _drift(self, number: int) -> dict[str, float]:
        """How alike the features of earlier tasks are to what they were when the task had just been learnt."""
        earlier = [task for task in self.learnt_features if task < number]
        now, found = self._features(self.training.model, *earlier) if earlier else {}, {}
        for name, compare in DRIFTS.items():
            values = {task: compare(self.learnt_features[task], now[task]) for task in earlier}
            found |= {f"task_{name}_{task}": value for task, value in values.items()}
            if len(earlier) == number - 1 > 0:
                found[f"stream_{name}"] = fmean(values.values())
        return found

    def _stability(self, number: int) -> dict[str, float]:
        """The largest fall of the earlier tasks' mean cosine after a boundary, and the most steps to come back.

        The steps are NaN if it did not come back after each; both are left out if a task was not traced to its end.
        """
        whole = {
            task: [(int(step), fmean(cosines)) for step, *cosines in rows]
            for task, rows in self.traces.items()
            if rows[0][0] == 0 and rows[-1][0] == self._steps(task)
        }
        if number < 2 or whole.keys() != set(range(2, number + 1)):
            return {}
        falls, steps = zip(*map(stability, whole.values()), strict=True)
        slowest = math.nan if any(map(math.isnan, steps)) else max(steps)
        return {"stream_cosine_drop": max(falls), "stream_cosine_recovery": slowest}

    def _scores(self, model: Any, check: Callable[[], None] = lambda: None) -> dict[str, float]:
        training = self.training
        shuffled = training.config.ablation.shuffle_actions
        given = training.objective, self.loaders, training.accelerator
        return task_scores(model.eval(), *given, shuffled=shuffled, progress=check)


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
