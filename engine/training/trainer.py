"""A training run from start to verdict: untrained control, segments, checkpoints, gates, summary."""

import math
import shutil
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from safetensors import SafetensorError

from ...configs.cli import DIVERGED, DONE, GATE_FAILED, MACHINE_FAILED, OUT_OF_TIME
from ...configs.errors import InputError, shown
from ...configs.files import to_json, write_atomically
from ..analysis.spectra import collapse_warnings
from ..config import Config
from ..models.white_box.layers import LONG_STEP
from ..reports.console import Reporter, closing_block
from ..reports.figures.curves import draw_curves
from ..reports.figures.stream import draw_stream
from ..reports.figures.terms import draw_terms
from ..reports.trackers import Trackers, end_tracking
from ..runs import tensors as files
from ..runs.folder import RunFolder
from ..runs.metrics_file import MetricsFile, StepsFile
from ..runs.state import Best, Position, Waiting
from ..runtime.accelerator import build_accelerator
from ..runtime.distributed import check_agreement
from ..runtime.failures import PEER_LOST, explain, sigbus_handler
from ..runtime.idle import IdleWatch
from ..runtime.interrupts import Interrupted, Interrupts
from ..runtime.provenance import code_digest, commit, hardware, versions
from .alarms import alarms, pinned_sigreg
from .diagnostics import diagnose
from .gates import check_rules, improves, judge_epochs, waited
from .loading import open_loaders
from .opening import opening_lines
from .resume import Resumed, changes, settle
from .segments import segments_of
from .step import Diverged, TrainingStep
from .stream import TaskMeasures
from .times import Stopwatch, Times
from .untrained_control import untrained_control
from .validation import Validation, metric_names, validate


def train(config: Config, parent: int) -> int:
    """Train, evaluate and judge; returns the exit code. `parent` is the process that started this one.

    Raises:
        InputError: the config, the data or the checkpoint cannot be used.
    """
    accelerator = build_accelerator(config.run, config.optim.accumulate)
    with (
        Interrupts(parent) as interrupts,
        Reporter(accelerator.is_main_process) as reporter,
        RunFolder(config, config.run, config.checkpoint.keep, main=accelerator.is_main_process) as folder,
        sigbus_handler(lambda: f"a file that was being read has shrunk or is gone (SIGBUS); {folder.last_good}"),
        IdleWatch(interrupts, config.run.max_idle, lambda: _say_idle(config, reporter, folder)),
    ):
        try:
            trainer = Trainer(config, accelerator, interrupts, reporter, folder)
            try:
                trainer.fit()
            except Interrupted:
                raise Interrupted(trainer.save_interrupted()) from None
            interrupts.keep_alive()
            code = trainer.finish()
            interrupts.keep_alive(folder.mirror_seconds)
            folder.end_mirror(reporter.say)  # which the main process alone has; a launcher may end it once others leave
            accelerator.wait_for_everyone()  # no process leaves the group while another still uses it
            return code
        except Interrupted as stop:
            if interrupts.out_of_time:
                hours = f"run.max_hours={config.run.max_hours:g} is over"
                reporter.say(f"{hours}: {str(stop) or 'nothing new was trained'}")
                return OUT_OF_TIME
            folder.mirror_seconds = 30.0  # a machine that is taken away gives little more
            reporter.say(f"interrupted by {interrupts.cause.name}: {str(stop) or 'nothing new was trained'}")
            return 128 + interrupts.cause
        except Diverged as problem:
            reporter.say(f"{problem}; {folder.last_good}")
            return DIVERGED
        except (OSError, MemoryError, RuntimeError, SafetensorError) as error:
            cause = explain(error, config.data.batch_size, config.optim.accumulate, accelerator.num_processes)
            if cause is None:
                raise
            if accelerator.is_main_process:
                reporter.say(f"{cause}; {folder.last_good}")
            else:
                print(f"process {accelerator.process_index}: {cause}", file=sys.stderr, flush=True)
            if cause.startswith(PEER_LOST):
                time.sleep(5)  # the launcher blames the process that ends first, which should be the lost one
            return MACHINE_FAILED
        finally:
            interrupts.keep_alive(folder.mirror_seconds)
            folder.end_mirror(reporter.say)
            interrupts.keep_alive()
            end_tracking(accelerator, reporter.say)
            accelerator.end_training()  # closes the process group


def _say_idle(config: Config, reporter: Reporter, folder: RunFolder) -> None:
    """The last words of a run in which nothing happens; those of its threads are on stderr."""
    reporter.say(f"idle: no step for run.max_idle={config.run.max_idle:g} minutes; {folder.last_good}")
    folder.mirror_seconds = 30.0
    folder.end_mirror(reporter.say)


class Trainer:
    """A run: its parts, its position, and what it writes."""

    def __init__(
        self, config: Config, accelerator: Accelerator, interrupts: Interrupts, reporter: Reporter, folder: RunFolder
    ):
        self.config = config
        self.accelerator = accelerator
        self.interrupts = interrupts
        self.check_interrupt = partial(interrupts.check_together, accelerator)
        self.reporter = reporter
        self.folder = folder
        self.position = Position(0)
        self.global_step = 0  # optimiser steps done
        self.best = Best(segment=0, value=None, metrics={})
        self.final: dict[str, float] = {}  # metrics of the last complete segment
        self.waiting = Waiting(best=None, waited=0)
        self.times = Times(config.run.price)
        self.logs = 0  # of this start
        self.commit = commit()  # now: by the end of the run something else may be checked out
        self.settled = settle(config.run, accelerator)
        say = reporter.say

        # First of all: processes that differ would wait for each other in vain, or train different networks unnoticed.
        # Machines may keep the data in different places, and the main process alone has trackers.
        same = config.model_dump_json(exclude={"data": {"root", "cache"}, "tracking": True})
        precision = f"{self.settled.precision}, compile {self.settled.compile}"
        facts = {"the code": code_digest(), "the version of torch": torch.__version__, "the config": same}
        check_agreement(accelerator, {**facts, "the precision": precision})

        # The checkpoint comes before the images, which can take minutes to read: one with other settings is refused at
        # once. A signal stops the reading wherever it is, since there are no steps yet to look for signals between.
        folder.fetch(say)
        accelerator.wait_for_everyone()  # the main process alone reads the mirror
        path, damaged = folder.checkpoint_to_resume(say)
        resumed = Resumed.read(path, folder, accelerator.process_index) if path else None
        with interrupts.at_once():
            self.loaders = open_loaders(config, accelerator)
        self.segments = segments_of(config, self.loaders)
        identity = resumed.identity if resumed else "none"
        check_agreement(accelerator, {"the checkpoint": identity, "the data": self.loaders.fingerprint})
        if resumed:
            resumed.check_fits(self.loaders, self.segments)
        model = resumed.config.model if resumed else config.model.settled(self.loaders.sequence.image_size)
        config = self.config = folder.config = config.model_copy(update={"model": model})
        check_rules(config, metric_names(config, self.loaders.num_classes, self.loaders.sequence.factors))

        # The folder changes only after everything above has passed. The main process renames and deletes checkpoints in
        # it, which the others must have read by then.
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            folder.open(path, resumed.state if resumed else None, damaged)
        accelerator.wait_for_everyone()
        if not folder.path.is_dir():
            raise InputError(f"{folder.path} is not on a disk that all machines share", "run.dir")
        for line in opening_lines(config, self.loaders, self.segments, self.settled, accelerator):
            say(line)

        # Trackers start before the untrained control, which can take minutes: one that cannot start says so now.
        self.trackers = Trackers(accelerator, config.tracking, folder, say)
        self.pinned = pinned_sigreg(config, accelerator.num_processes, accelerator.device)
        self.untrained = None
        if config.control.enabled:
            self.untrained = untrained_control(config, self.loaders, accelerator, reporter, interrupts)
        # The control began with the same seed: its network is the one that training starts from. Processes share their
        # weights and then draw different dropout masks. A checkpoint's generators replace these, so it comes last.
        set_seed(config.run.seed)
        self.training = TrainingStep(config, self.loaders, accelerator)
        self.tasks = TaskMeasures(self.training, self.loaders, stream) if (stream := self.loaders.stream) else None
        if self.tasks and self.untrained is not None:
            self.untrained |= self.tasks.untrained
        self.trackers.summarise("control", self.untrained or {})
        set_seed(config.run.seed, device_specific=True)
        if resumed:
            self._restore(resumed)
        if config.run.max_hours is not None:
            interrupts.deadline = self.times.deadline(config.run.max_hours)
        self.metrics_file, self.steps_file = None, None
        if accelerator.is_main_process:
            self.steps_file = StepsFile(folder.steps, self.global_step)
            self.metrics_file = MetricsFile(folder.metrics, self.position.segment)
            if self.metrics_file.lost:
                epochs = ", ".join(map(str, self.metrics_file.lost))
                say(f"{folder.metrics}: the lines of epoch {epochs} are missing or damaged")

    def _restore(self, resumed: Resumed) -> None:
        """Go to the position of a checkpoint, and say what has changed since."""
        state, say = resumed.state, self.reporter.say
        self.position = state.position
        self.global_step = self.segments.start(self.position.segment) + self.position.step
        self.best, self.final, self.waiting = state.best, state.final, state.patience
        self.times.restore(state)
        files.restore(self.training, self.accelerator, resumed.tensors, self.global_step)
        if self.tasks:
            self.tasks.load_state_dict(files.under("stream.", resumed.tensors["trainer"]), self.position)
        if notice := state.notice(resumed.path):
            say(notice)
        segment, step = self.position
        say(f"resumed from {resumed.path}: {self.segments.name} {segment + 1}, step {step}")
        for line in changes(resumed, self.training, self.settled, None if self.done else self.global_step):
            say(line)

    @property
    def stopped_early(self) -> bool:
        """Whether too many validations have passed without an improvement."""
        return self.config.early_stop.metric is not None and self.waiting.waited >= self.config.early_stop.patience

    @property
    def done(self) -> bool:
        """Whether there is no segment left."""
        return self.position.segment == len(self.segments) or self.stopped_early

    # -- the loop

    def fit(self) -> None:
        """Train to the end of the last segment.

        Raises:
            Interrupted: the run was asked to stop.
            Diverged: a loss or a gradient is no longer finite.
        """
        times = self.times
        self.reporter.advance("training", self.global_step, total=self.training.total_steps)
        while not self.done:
            times.segment = Stopwatch()
            self._train_segment()
            if self.settled.device == "cuda":
                torch.cuda.synchronize()  # what is queued belongs to this segment's time
            train_seconds = times.segment.seconds
            number = self.position.segment + 1
            validated = number % self.config.eval.every == 0 or number == len(self.segments)
            # an interrupted validation is repeated by the resumed run; only then may the training metrics be read
            self.interrupts.new_pace()
            validation = validate(self.training, self.loaders.validation, self.check_interrupt) if validated else None
            self._refuse_divergence()
            measured = {}
            if self.tasks:
                alone = self.accelerator.num_processes == 1
                check = self.check_interrupt if alone else self.interrupts.keep_alive
                measured = self.tasks.after(number, self.metrics_file.rows if self.metrics_file else [], check)
                self.tasks.end(number)
            metrics = self.training.epoch_metrics() | (validation.metrics if validation else {}) | measured
            self.position, self.final = Position(number), metrics
            times.seconds += times.segment.seconds
            times.train_seconds += train_seconds
            self._end_segment(metrics, validation, train_seconds)

    def _train_segment(self) -> None:
        recent = Stopwatch()
        self.interrupts.new_pace()
        if not self.position.step:
            self._trace(recent)
        for batch in self.segments.batches(self.position):
            loss = self.training.step(batch, self.global_step)
            self.position = Position(self.position.segment, self.position.step + 1)
            self.global_step += 1
            self.times.segment.count(self.config.data.batch_size)
            recent.count(self.config.data.batch_size)
            self.reporter.advance()
            if self.global_step % self.config.run.log_every == 0:
                mean: Any = self.accelerator.reduce(loss, "mean")
                value = mean.item()  # the one host sync of the loop
                self._refuse_divergence()
                self._log_step(value, recent)
                recent = Stopwatch()
            self._trace(recent)
            if self.training.compiled and not self.times.compilation:
                loss.item()  # waits for the compiler and the step
                self.times.compiled()
                self.reporter.say(f"compiled in {self.times.compilation:.0f} s")
                recent = Stopwatch()
            self.check_interrupt()

    def _trace(self, recent: Stopwatch) -> None:
        """Measure the earlier tasks of a stream, if it is time; that is no part of the time of training."""
        if self.tasks:
            seconds = self.tasks.trace(self.position)
            for watch in (recent, self.times.segment):
                watch.leave_out(seconds)
            self.times.seconds += seconds

    def _log_step(self, loss: float, recent: Stopwatch) -> None:
        self.logs += 1
        status = f"loss {loss:.4f}  {1e3 * recent.seconds / recent.steps:.0f} ms/step  {recent.rate:.0f} seq/s"
        lr = float(self.training.optimizer.param_groups[0]["lr"])  # of the last step
        values = {"step_loss": loss, "lr": lr}
        values |= {name: norm.item() for name, norm in self.training.term_grad_norms.items()}
        values |= self.training.embeddings() | self.training.code_changes()
        cost = self.times.cost((self.training.total_steps - self.global_step) * recent.seconds / recent.steps)
        if cost:
            status += f"  cost {cost['cost']:.2f} of about {cost['cost_expected']:.2f}"
            if self.logs == 2:  # the first steps warm up; the end of a segment can be hours away
                self.reporter.say(
                    f"by its last {recent.steps} steps, the run will cost about {cost['cost_expected']:.2f}"
                )
        self.reporter.advance(amount=0, status=status)
        timing = {"sequences_per_second": recent.rate, **cost}
        self.trackers.log(self.global_step, train=values, system=timing)
        if self.steps_file:
            self.steps_file.append({"step": self.global_step, **values, "timing": timing})

    def _end_segment(self, metrics: dict[str, float], validation: Validation | None, train_seconds: float) -> None:
        """Record a segment, show it, and save what is due; sweeps are made first, since their metrics are recorded."""
        config, times, number, say = self.config, self.times, self.position.segment, self.reporter.say
        watch = times.segment
        is_best = False
        if validation:
            value = metrics.get(config.eval.best_metric, math.nan)  # some need a second task
            is_best = improves(value, self.best.value, config.eval.best_mode)
            if is_best:  # unvalidated: metrics may be NaN
                self.best = Best.model_construct(segment=number, value=value, metrics=metrics)
            self.waiting = waited(self.waiting, config.early_stop, metrics)
        swept, figures, seconds = {}, [], 0.0
        every = config.diagnostics.every
        if validation and every and self.accelerator.is_main_process and (number % every == 0 or self.done):
            before, loader = watch.seconds, self.loaders.validation
            swept, figures = diagnose(self.training, loader, validation.moments, self.folder, number, say)
            seconds = watch.seconds - before
            times.seconds += seconds
        timing, rate = {"ep_time": watch.seconds, "train_time": train_seconds}, None
        if watch.steps:  # else an earlier start made them all, or the only one was compiled
            timing["sequences_per_second"] = rate = watch.sequences / train_seconds
        if times.compilation and watch.steps < self.segments.steps(number - 1):
            timing["compile_time"] = times.compilation
        if swept:
            timing["diagnostics_time"] = seconds
        left = 0 if self.done else len(self.segments) - number
        timing |= (cost := times.cost(left * watch.seconds))
        if self.metrics_file:
            self.metrics_file.append({"epoch": number, **metrics, **swept, "timing": timing})
        of_tasks = {name for name in metrics if name.startswith(("task_", "stream_"))}
        val = {name: metrics[name] for name in of_tasks | set(validation.metrics if validation else ())}
        train = {name: value for name, value in metrics.items() if name not in val}
        self.trackers.log(self.global_step, number, train=train, val=val | swept, system=timing)
        for path in figures:
            self.trackers.log_figure(path, self.global_step)
        if validation:
            title = f"{self.segments.name} {number}/{len(self.segments)}"
            title += f"  {rate:.0f} sequences/s" if rate else ""
            if cost:
                title += f"  cost {cost['cost']:.2f} of about {cost['cost_expected']:.2f}"
            self.reporter.epoch(title, metrics, self.untrained)
            for line in self.tasks.told(metrics) if self.tasks else ():
                say(line)
            for warning in collapse_warnings(metrics, config.diagnostics):
                say(f"collapse? {warning}")
            for line in alarms(self.metrics_file.rows, config, self.pinned) if self.metrics_file else ():
                say(f"alarm: {line}")
            for name in config.model.crate_parts:
                if (length := metrics[f"dictionary_step_{name}"]) > LONG_STEP:
                    limit = f"model.{name}.longest_step=1 limits it"
                    say(f"a step of the sparse coding is {length:.2f} long; beyond 2 it need not descend: {limit}")
        if self.stopped_early:
            say(f"stopped early: {config.early_stop.metric} has not improved for {self.waiting.waited} validations")
        if is_best or self.done or number % config.checkpoint.every == 0:
            self.save(best=is_best)

    def _refuse_divergence(self) -> None:
        if found := self.training.diverged():
            step, term = found
            where = f"step {step} ({self.segments.name} {self.segments.segment_of(step) + 1})"
            raise Diverged(f"diverged: {term} was not finite at {where}")

    # -- checkpoints

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint of the present position; returns its folder."""
        state = {
            "position": self.position._asdict(),
            "best": self.best.model_dump(),
            "final": self.final,
            "patience": self.waiting.model_dump(),
            **self.times.state_dict(),
            "images": self.loaders.fingerprint,
            "wandb_id": self.folder.tracker_id,
            "commit": self.commit,
            "config": self.config.model_dump(),
            "settled": self.settled.model_dump(),
            "pillow": PIL.__version__,
            "pixels": {
                "mean": self.loaders.train.mean.flatten().tolist(),
                "std": self.loaders.train.std.flatten().tolist(),
                "size": list(self.loaders.image_size),
                "classes": self.loaders.classes,
            },
        }
        self.training.share_buffers()
        checkpoints = self.folder.checkpoints
        partial, final = checkpoints.partial(self.segments.name, self.position)
        try:
            stream = self.tasks.state_dict() if self.tasks and self.accelerator.is_main_process else {}
            broken = files.write(partial, self.training, self.accelerator, state, stream)
            if broken:
                raise Diverged(f"diverged: {broken} is not finite")
            if self.accelerator.is_main_process:
                checkpoints.publish(partial, final, best=best)
                self.folder.copy(self.reporter.say)
        finally:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)  # there only if something failed
        return final

    def save_interrupted(self) -> str:
        """Save the position at which the loop stopped; returns a line for the user."""
        self._refuse_divergence()
        self.times.interrupted()
        where = f"{self.segments.name} {self.position.segment + 1}"
        return f"saved {self.save()}; run.resume=auto continues in {where}"

    # -- the verdict

    def finish(self) -> int:
        """Judge, summarise, draw; returns the exit code."""
        config, times, best, name = self.config, self.times, self.best, self.segments.name
        judged = {f"final {name}": self.final, f"best {name} {best.segment}": best.metrics}
        rows = self.metrics_file.rows if self.metrics_file else []
        judgement: list[Any] = [judge_epochs(config, judged, self.untrained, rows)]
        broadcast_object_list(judgement)  # the others have no rows
        passed, reasons = judgement[0]
        if self.metrics_file:
            verdict = {"gate_pass": passed, "gate_reasons": reasons}
            summary = verdict | {
                "final": self.final,
                "best": best.metrics,
                "untrained": self.untrained,
                "largest_class": self.loaders.largest_class,
                "best_epoch": best.segment,
                "final_minus_best": self.final.get(config.eval.best_metric, math.nan)
                - (math.nan if best.value is None else best.value),
                "epochs": self.position.segment,
                "stopped_early": self.stopped_early,
                **({"stream": self.tasks.summary(self.metrics_file.rows)} if self.tasks else {}),
                "commit": self.commit,
                "timing": {
                    **{name: value for name, value in times.cost().items() if name == "cost"},
                    "seconds": times.seconds,
                    "sequences_per_second": self.global_step * config.data.batch_size / max(times.train_seconds, 1e-9),
                    "hardware": hardware(self.accelerator),
                    "versions": versions(),
                },
            }
            write_atomically(self.folder.summary, to_json(summary, indent=1) + "\n")
            try:
                draw_curves(self.metrics_file.rows, self.untrained, self.folder.curves, summary["largest_class"])
                self.trackers.log_figure(self.folder.curves, self.global_step)
                if len(config.objective.terms) > 1:
                    draw_terms(self.metrics_file.rows, self.untrained, self.folder.terms)
                    self.trackers.log_figure(self.folder.terms, self.global_step)
                if self.tasks:
                    draw_stream(summary["stream"], self.folder.stream)
                    self.trackers.log_figure(self.folder.stream, self.global_step)
            except OSError as error:  # no reason to fail a run that has everything else
                where = shown(error.filename or self.folder.curves)
                self.reporter.say(f"curves are not drawn: {where} cannot be written ({error.strerror})")
            self.trackers.summarise("verdict", verdict | {"best_epoch": best.segment}, self.global_step)
            for reason in reasons:
                self.reporter.say(f"gate: {reason}")
            self.reporter.say(closing_block(str(self.folder.path), summary))
        return GATE_FAILED if config.gates.enforce and not passed else DONE
