"""A training run from start to verdict: control, epochs, checkpoints, gates, summary."""

from __future__ import annotations

import math
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors import SafetensorError

from ...configs.errors import InputError, shown
from ...configs.files import to_json, write_atomically
from ..analysis.accumulators import MetricBank
from ..analysis.spectra import collapse_warnings
from ..config import Config
from ..reports.console import Reporter, Stopwatch, closing_block
from ..reports.figures.curves import draw_curves
from ..reports.trackers import Trackers, end_tracking
from ..runs import tensors as files
from ..runs.checksums import MANIFEST
from ..runs.folder import RunFolder
from ..runs.metrics_file import MetricsFile
from ..runs.state import Settled, TrainingState
from ..runtime.accelerator import build_accelerator, compile_mode, crowded, overruled
from ..runtime.distributed import check_agreement
from ..runtime.failures import PEER_LOST, explain, sigbus_handler
from ..runtime.interrupts import Interrupted, Interrupts
from ..runtime.provenance import code_digest, commit, hardware, versions
from .diagnostics import diagnose
from .early_stopping import Patience, improves
from .gates import check_rules, judge_epochs
from .loading import open_loaders
from .optimizers import learning_rate
from .step import Diverged, TrainingStep
from .untrained_control import untrained_control
from .validation import Validation, metric_names, validate

__all__ = ["DIVERGED", "DONE", "GATE_FAILED", "MACHINE_FAILED", "Trainer", "train"]

DONE, GATE_FAILED, DIVERGED, MACHINE_FAILED = 0, 1, 3, 4


def train(config: Config, parent: int) -> int:
    """Train, evaluate and judge; returns the exit code.

    Args:
        config: of the run.
        parent: process that started this one.

    Raises:
        InputError: the config, the data or the checkpoint cannot be used.
    """
    accelerator = build_accelerator(config.run, config.optim.accumulate)
    with (
        Interrupts(parent) as interrupts,
        Reporter(accelerator.is_main_process) as reporter,
        RunFolder(config, config.run, config.checkpoint.keep, main=accelerator.is_main_process) as folder,
        sigbus_handler(lambda: f"a file that was being read has shrunk or is gone (SIGBUS); {folder.last_good}"),
    ):
        try:
            trainer = Trainer(config, accelerator, interrupts, reporter, folder)
            try:
                trainer.fit()
            except Interrupted:
                reporter.say(f"interrupted by {interrupts.cause}: {trainer.save_interrupted()}")
                return interrupts.exit_code
            code = trainer.finish()
            accelerator.wait_for_everyone()  # no process leaves the group while another still uses it
            return code
        except Interrupted:
            reporter.say(f"interrupted by {interrupts.cause}: nothing new was trained")
            return interrupts.exit_code
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
                time.sleep(5)  # the launcher names the process that leaves first: not one that was left alone
            return MACHINE_FAILED
        finally:
            end_tracking(accelerator, reporter.say)
            accelerator.end_training()  # closes the process group


class Trainer:
    """One run: its parts, its position, and what it writes."""

    def __init__(
        self, config: Config, accelerator: Accelerator, interrupts: Interrupts, reporter: Reporter, folder: RunFolder
    ):
        self.config = config
        self.accelerator = accelerator
        self.interrupts = interrupts
        self.reporter = reporter
        self.folder = folder
        self.epoch = 0  # complete epochs
        self.step = 0  # steps done in the next one
        self.best: dict[str, Any] = {"epoch": 0, "value": None, "metrics": {}}
        self.final: dict[str, float] = {}  # metrics of the last complete epoch
        self.patience = Patience(config.early_stop)
        self.seconds = self.train_seconds = 0.0  # with and without validation, over all restarts
        self.watch = Stopwatch()  # of the present epoch
        self.compile_seconds = 0.0  # of this process's first step, which the epoch's time leaves out
        self.commit = commit()  # of the code that runs, whatever is checked out by the end

        # machines may keep their data where they like, and have a W&B environment of their own: the main process tracks
        same = config.model_dump_json(exclude={"data": {"root"}, "tracking": True})
        settled = f"{accelerator.mixed_precision}, compile {compile_mode(config.run, accelerator)}"
        facts = {"the code": code_digest(), "the version of torch": torch.__version__, "the config": same}
        check_agreement(accelerator, {**facts, "the precision": settled})
        resumed, damaged = self.folder.checkpoint_to_resume(reporter.say)
        tensors, state = files.read(resumed, accelerator.process_index) if resumed else (None, None)
        changed = {}
        if state:
            changed = self.folder.check_same_experiment(state.config, resumed)
            begun = state.epoch + (state.step > 0)
            if begun > config.run.epochs:
                reached = f"is in epoch {begun}" if state.step else f"has {begun}"
                allowed = f"at least {begun} is allowed"
                raise InputError(f"is {config.run.epochs}, {resumed} {reached} already; {allowed}", "run.epochs")
        with self.interrupts.at_once():  # images are read for minutes, and nothing asks meanwhile
            self.loaders = open_loaders(config, accelerator)
        sums = (resumed / MANIFEST).read_text() if resumed and (resumed / MANIFEST).exists() else f"{resumed}"
        check_agreement(accelerator, {"the checkpoint": sums, "the data": self.loaders.fingerprint})
        if state and state.images != self.loaders.fingerprint:
            raise InputError(f"holds other images than {resumed} was trained on", "data.root")
        check_rules(config, metric_names(config, self.loaders.num_classes, self.loaders.sequence.factors))
        local_batch = config.data.batch_size // accelerator.num_processes
        if local_batch % config.optim.accumulate:
            raise InputError(f"does not divide the {local_batch} sequences of a process", "optim.accumulate")
        alone = accelerator.num_processes == 1 or config.run.batch_statistics == "process"
        if alone and local_batch // config.optim.accumulate < 2:
            raise InputError("leaves a process one sequence, which batch norm cannot normalise", "data.batch_size")
        accelerator.wait_for_everyone()  # all have read what is moved and dropped now
        if accelerator.is_main_process:
            self.folder.open(resumed, state, damaged)
        accelerator.wait_for_everyone()
        if not self.folder.path.is_dir():
            raise InputError(f"{self.folder.path} is not on a disk that all machines share", "run.dir")
        reporter.say(self._heading())
        alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1 and config.run.threads == "auto"
        advice = crowded(torch.get_num_threads()) if alone else None
        for line in [*overruled(config.run, config.optim.accumulate, accelerator), *([advice] if advice else [])]:
            reporter.say(line)
        # before the control: a tracker that cannot start should say so now
        self.trackers = Trackers(
            accelerator,
            config.tracking,
            config.run.name,
            config.model_dump(),
            self.folder.path,
            self.folder.tracker_id,
            reporter.say,
        )
        self.untrained = None
        if config.control.enabled:
            self.untrained = untrained_control(
                config,
                self.loaders,
                accelerator,
                say=reporter.say,
                progress=self._control_progress,
                check=self._check_interrupt,
            )
        set_seed(config.run.seed)  # the control's network is the one that training starts from
        self.training = TrainingStep(config, self.loaders, accelerator)
        set_seed(config.run.seed, device_specific=True)  # dropout differs between processes
        if state:
            self._restore(tensors, state)
            reporter.say(f"resumed from {resumed}: epoch {self.epoch + 1}, step {self.step}")
            for line in self._news(changed, state.settled):
                reporter.say(line)
        self.metrics_file = MetricsFile(self.folder.metrics, self.epoch) if accelerator.is_main_process else None
        if self.metrics_file and self.metrics_file.lost:
            epochs = ", ".join(map(str, self.metrics_file.lost))
            reporter.say(f"{self.folder.metrics}: the lines of epoch {epochs} are missing or damaged")

    def _heading(self) -> str:
        loaders, accelerator = self.loaders, self.accelerator
        return (
            f"{self.config.run.name}: {self.config.data.name}, {len(loaders.train.sampler.indices)} training and "
            f"{len(loaders.validation.sampler.indices)} test images, {loaders.kind} loader, "
            f"{accelerator.device.type}, {'bf16' if accelerator.mixed_precision == 'bf16' else 'fp32'}, "
            f"{accelerator.num_processes} process(es)"
        )

    @property
    def _settled(self) -> Settled:
        """What this machine makes of the config."""
        accelerator = self.accelerator
        return Settled(
            processes=accelerator.num_processes,
            device=accelerator.device.type,
            precision=accelerator.mixed_precision.replace("no", "fp32"),
            compile=compile_mode(self.config.run, accelerator),
        )

    def _rows(self, accumulate: int, processes: int) -> int:
        """Sequences that batch norm and the terms of the objective see at a time."""
        shared = processes if self.config.run.batch_statistics == "process" else 1
        return self.config.data.batch_size // accumulate // shared

    def _news(self, changed: dict[str, tuple[Any, Any]], settled: Settled | None) -> list[str]:
        """What a resumed run does otherwise than the one that saved the checkpoint, a line each.

        Args:
            changed: fields that differ: value of the checkpoint, value now.
            settled: what the checkpoint's machine had made of the config; None where it does not say.
        """
        config, training, lines = self.config, self.training, []
        now = self._settled
        before = settled or now
        for name in ("device", "precision", "compile"):
            if (old := getattr(before, name)) != (new := getattr(now, name)):
                changed.setdefault(f"run.{name}", (old, new))
        if before.processes != now.processes:
            changed["the number of processes"] = (before.processes, now.processes)
        if changed:
            fields = ", ".join(f"{field} from {old!r} to {new!r}" for field, (old, new) in changed.items())
            lines.append(f"changed since the checkpoint: {fields}")
        accumulate, _ = changed.get("optim.accumulate", (config.optim.accumulate, None))
        old, new = self._rows(accumulate, before.processes), self._rows(config.optim.accumulate, now.processes)
        if old != new:
            lines.append(
                f"batch norm and the terms of the objective now see {new} sequences at a time instead of {old}: "
                "the run goes on, but not as it would have gone"
            )
        if "run.epochs" in changed and not self.done and self.global_step:
            totals = [number * training.steps_per_epoch for number in changed["run.epochs"]]
            last = self.global_step - 1
            for name, schedule in {"learning rate": self._rate, "teacher's decay": self._decay}.items():
                before, same_step, now = (
                    schedule(last, totals[0]),
                    schedule(last, totals[1]),
                    schedule(last + 1, totals[1]),
                )
                if not math.isclose(before, same_step, rel_tol=1e-6):
                    lines.append(
                        f"the {name} was {before:.6g} in the last step and is {now:.6g} in the next: its schedule is "
                        f"now spread over {config.run.epochs} epochs"
                    )
        return lines

    def _rate(self, step: int, total_steps: int) -> float:
        return learning_rate(self.config.optim, step, self.training.steps_per_epoch, total_steps)

    def _decay(self, step: int, total_steps: int) -> float:
        return self.training.model.target.decay(torch.tensor(step), total_steps).item()

    @property
    def global_step(self) -> int:
        """Optimiser steps done."""
        return self.epoch * self.training.steps_per_epoch + self.step

    @property
    def done(self) -> bool:
        """Whether there is no epoch left."""
        return self.epoch == self.config.run.epochs or self.patience.over

    # -- the loop

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Interrupted: the run was asked to stop.
            Diverged: a loss or a gradient is no longer finite.
        """
        self.reporter.advance("training", self.global_step, total=self.training.total_steps)
        while not self.done:
            self.watch = Stopwatch()
            self._train_epoch()
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()  # what is queued belongs to this epoch's time
            train_seconds = self.watch.seconds
            number = self.epoch + 1
            validated = number % self.config.eval.every == 0 or number == self.config.run.epochs
            # an interrupted validation is repeated by the resumed run; only then may the training metrics be read
            self.interrupts.new_pace()
            validation = validate(self.training, self.loaders.validation, self._check_interrupt) if validated else None
            self._refuse_divergence()
            self.final = self.training.epoch_metrics() | (validation.metrics if validation else {})
            self.epoch, self.step = number, 0
            self.seconds += self.watch.seconds
            self.train_seconds += train_seconds
            self._end_epoch(validation, train_seconds)

    def _train_epoch(self) -> None:
        log_every = self.config.run.log_every
        recent = Stopwatch()
        self.interrupts.new_pace()
        for batch in self.loaders.train.epoch(self.epoch, self.step):
            loss = self.training.step(batch, self.global_step)
            self.step += 1
            self.watch.count(self.config.data.batch_size)
            recent.count(self.config.data.batch_size)
            self.reporter.advance()
            if self.global_step % log_every == 0:
                value = self.accelerator.reduce(loss, "mean").item()  # the one host sync of the loop
                self._refuse_divergence()
                self._log_step(value, recent)
                recent.restart()
            if self.training.compiled and not self.compile_seconds:
                loss.item()  # waits for the compiler and the step
                self.compile_seconds = self.watch.seconds
                self.seconds += self.compile_seconds
                self.reporter.say(f"compiled in {self.compile_seconds:.0f} s")
                self.watch.restart()
                recent.restart()
            self._check_interrupt()

    def _log_step(self, loss: float, recent: Stopwatch) -> None:
        status = f"loss {loss:.4f}  {1e3 * recent.seconds / recent.steps:.0f} ms/step  {recent.rate:.0f} seq/s"
        self.reporter.advance(amount=0, status=status)
        lr = self._rate(self.global_step - 1, self.training.total_steps)
        values = {"step_loss": loss, "lr": lr, "sequences_per_second": recent.rate}
        values |= {name: norm.item() for name, norm in self.training.term_grad_norms.items()}
        self.trackers.log(values, self.global_step)

    def _end_epoch(self, validation: Validation | None, train_seconds: float) -> None:
        config, metrics, watch = self.config, self.final, self.watch
        validated = validation is not None
        is_best = validated and improves(metrics[config.eval.best_metric], self.best["value"], config.eval.best_mode)
        if validated:
            self.patience.see(metrics)
        if is_best:
            self.best = {"epoch": self.epoch, "value": metrics[config.eval.best_metric], "metrics": metrics}
        rate = watch.sequences / train_seconds
        diagnostics, figures, seconds = (
            self._diagnose(validation.moments) if validation and self._diagnosed else ({}, [], 0.0)
        )
        timing = {"ep_time": watch.seconds, "train_time": train_seconds, "sequences_per_second": rate}
        if self.compile_seconds and watch.steps < self.training.steps_per_epoch:
            timing["compile_time"] = self.compile_seconds
        if diagnostics:
            timing["diagnostics_time"] = seconds
        untrained = {f"untrained_{name}": value for name, value in (self.untrained or {}).items()}
        if self.metrics_file:
            self.metrics_file.append({"epoch": self.epoch, **metrics, **diagnostics, "timing": timing})
        self.trackers.log({"epoch": self.epoch, **metrics, **diagnostics, **untrained, **timing}, self.global_step)
        for path in figures:
            self.trackers.log_figure(path.stem, path, self.global_step)
        if validated:
            title = f"epoch {self.epoch}/{config.run.epochs}  {rate:.0f} sequences/s"
            self.reporter.epoch(title, metrics, self.untrained)
            for warning in collapse_warnings(metrics, config.diagnostics):
                self.reporter.say(f"collapse? {warning}")
        if self.patience.over:
            waited = f"for {self.patience.waited} validations"
            self.reporter.say(f"stopped early: {config.early_stop.metric} has not improved {waited}")
        if is_best or self.done or self.epoch % config.checkpoint.every == 0:
            self.save(best=is_best)

    @property
    def _diagnosed(self) -> bool:
        """Whether this epoch has factor sweeps."""
        every = self.config.diagnostics.every
        return bool(every) and self.accelerator.is_main_process and (self.epoch % every == 0 or self.done)

    def _diagnose(self, moments: MetricBank) -> tuple[dict[str, float], list[Path], float]:
        """Metrics and figures of factor sweeps, and the seconds that they took."""
        watch, training, folder = Stopwatch(), self.training, self.folder
        try:
            metrics, figures = diagnose(
                training.model,
                self.loaders.validation,
                self.config,
                self.accelerator,
                moments,
                epoch=self.epoch,
                bases=folder.bases,
                figures=folder.figures,
            )
        # out of memory, a full disk: no reason to lose the epoch
        except (RuntimeError, ValueError, OSError, SafetensorError) as error:
            self.reporter.say(f"no sweeps for epoch {self.epoch}: {str(error).splitlines()[0]}")
            metrics, figures = {}, []
        self.seconds += watch.seconds
        return metrics, figures, watch.seconds

    def _refuse_divergence(self) -> None:
        found = self.training.diverged()
        if found is not None:
            step, term = found
            epoch = step // self.training.steps_per_epoch + 1
            raise Diverged(f"diverged: {term} was not finite at step {step} (epoch {epoch})")

    def _check_interrupt(self) -> None:
        if self.accelerator.num_processes == 1:
            self.interrupts.check()
        else:
            self.interrupts.check_together(self.accelerator)

    def _control_progress(self, description: str, amount: int) -> None:
        if description:
            self.reporter.advance(description, 0, total=amount)
        else:
            self.reporter.advance()

    # -- checkpoints

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint of the present position; returns its folder."""
        state = {
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "final": self.final,
            "patience": self.patience.state(),
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "images": self.loaders.fingerprint,
            "wandb_id": self.folder.tracker_id,
            "commit": self.commit,
            "config": self.config.model_dump(),
            "settled": self._settled.model_dump(),
        }
        self.training.share_buffers()
        checkpoints = self.folder.checkpoints
        partial, final = checkpoints.partial(self.epoch, self.step)
        try:
            broken = files.write(partial, self.training, self.accelerator, state)
            if broken:
                raise Diverged(f"diverged: {broken} is not finite")
            if self.accelerator.is_main_process:
                checkpoints.publish(partial, final, best=best)
        finally:
            if self.accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)  # there only if something failed
        return final

    def save_interrupted(self) -> str:
        """Save where the loop was left; returns what to tell the user."""
        self._refuse_divergence()
        self.seconds += self.watch.seconds
        self.train_seconds += self.watch.seconds
        return f"saved {self.save()}; run.resume=auto continues in epoch {self.epoch + 1}"

    def _restore(self, tensors: dict[str, dict[str, Any]], state: TrainingState) -> None:
        self.epoch, self.step = state.epoch, state.step
        if self.step > self.training.steps_per_epoch:
            raise InputError(f"is at step {self.step} of {self.training.steps_per_epoch}", "run.resume")
        self.best, self.final = state.best.model_dump(), state.final
        self.patience.load(state.patience.model_dump())
        self.seconds, self.train_seconds = state.seconds, state.train_seconds
        files.restore(self.training, self.accelerator, tensors, self.global_step)

    # -- the verdict

    def finish(self) -> int:
        """Judge, summarise, draw; returns the exit code."""
        config = self.config
        epochs = {"final epoch": self.final, f"best epoch {self.best['epoch']}": self.best["metrics"]}
        passed, reasons = judge_epochs(config.data.name, config.active_rules, epochs, self.untrained)
        if self.accelerator.is_main_process:
            sequences = self.global_step * config.data.batch_size
            summary = {
                "gate_pass": passed,
                "gate_reasons": reasons,
                "final": self.final,
                "best": self.best["metrics"],
                "untrained": self.untrained,
                "best_epoch": self.best["epoch"],
                "epochs": self.epoch,
                "stopped_early": self.patience.over,
                "commit": self.commit,
                "timing": {
                    "seconds": self.seconds,
                    "sequences_per_second": sequences / max(self.train_seconds, 1e-9),
                    "hardware": hardware(self.accelerator),
                    "versions": versions(),
                },
            }
            write_atomically(self.folder.summary, to_json(summary, indent=1) + "\n")
            try:
                draw_curves(self.metrics_file.rows, self.untrained, self.folder.curves)
                self.trackers.log_figure("curves", self.folder.curves, self.global_step)
            except OSError as error:  # of a run that has all but its picture
                where = shown(error.filename or self.folder.curves)
                self.reporter.say(f"curves are not drawn: {where} cannot be written ({error.strerror})")
            self.trackers.summarise({"gate_pass": passed, "gate_reasons": reasons, "best_epoch": self.best["epoch"]})
            for reason in reasons:
                self.reporter.say(f"gate: {reason}")
            self.reporter.say(closing_block(str(self.folder.path), summary))
        return GATE_FAILED if config.gates.enforce and not passed else DONE
