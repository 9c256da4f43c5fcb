"""A training run from start to verdict: control, epochs, checkpoints, gates, summary."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from seqjepa.engine import checkpoints as ckpt
from seqjepa.engine.compose import dump
from seqjepa.engine.config import Config
from seqjepa.engine.console import Reporter, Stopwatch, closing_block
from seqjepa.engine.control import untrained_control
from seqjepa.engine.environment import build_accelerator, commit, hardware, versions
from seqjepa.engine.figures import draw_curves
from seqjepa.engine.gates import check_rules, judge
from seqjepa.engine.interrupts import Interrupted, Interrupts
from seqjepa.engine.learner import Learner, metric_names
from seqjepa.engine.optimizers import learning_rate
from seqjepa.engine.records import MetricsFile, to_json, write_atomically
from seqjepa.engine.tracking import Trackers
from seqjepa.loaders import InputError
from seqjepa.loaders.loader import build_loaders

__all__ = ["DIVERGED", "DONE", "GATE_FAILED", "Trainer", "train"]

DONE, GATE_FAILED, DIVERGED = 0, 1, 3

# a resumed run must be the same experiment: these decide what is learnt
FIXED_SECTIONS = ("data", "sequence", "model", "target", "objective", "optim", "probes", "ablation")
FREE_FIELDS = {"data.root", "data.loader", "data.download"}


class Diverged(Exception):
    """A loss or a gradient is no longer finite."""


def train(config: Config) -> int:
    """Train, evaluate and judge; returns the exit code.

    Raises:
        InputError: the config, the data or the checkpoint cannot be used.
    """
    accelerator = build_accelerator(config.run, config.optim.accumulate)
    with Interrupts() as interrupts, Reporter(accelerator.is_main_process) as reporter:
        trainer = None
        try:
            trainer = Trainer(config, accelerator, interrupts, reporter)
            trainer.fit()
            return trainer.finish()
        except Interrupted:
            where = trainer.save_interrupted() if trainer and trainer.learning else "nothing was trained yet"
            reporter.say(f"interrupted by {interrupts.cause}: {where}")
            return interrupts.exit_code
        except Diverged as problem:
            reporter.say(str(problem))
            return DIVERGED
        finally:
            accelerator.end_training()  # closes the trackers and the process group


class Trainer:
    """One run: its parts, its position, and what it writes."""

    def __init__(self, config: Config, accelerator, interrupts: Interrupts, reporter: Reporter):
        self.config = config
        self.accelerator = accelerator
        self.interrupts = interrupts
        self.reporter = reporter
        self.run_dir = Path(config.run.dir or f"runs/{config.run.name}").expanduser()
        self.checkpoints = ckpt.Checkpoints(self.run_dir / "checkpoints", config.checkpoint.keep)
        self.learning = False  # from here on an interrupt has something to save
        self.epoch = 0  # complete epochs
        self.step = 0  # steps done in the next one
        self.best: dict[str, Any] = {"epoch": 0, "value": math.nan, "metrics": {}}
        self.seconds = 0.0  # of training, over all restarts
        self.wandb_id: str | None = None
        self.commit = commit()  # of the code that runs, whatever is checked out by the end

        resumed = self._find_checkpoint()
        tensors, state = ckpt.read_checkpoint(resumed, accelerator.process_index) if resumed else (None, None)
        if state:
            self._check_same_experiment(state["config"], resumed)
        self.loaders = build_loaders(
            config.data,
            config.sequence,
            seed=config.run.seed,
            device=accelerator.device,
            rank=accelerator.process_index,
            num_processes=accelerator.num_processes,
            threads=_threads(),
        )
        check_rules(config, metric_names(self.loaders.sequence.factors))
        local_batch = config.data.batch_size // accelerator.num_processes
        if local_batch % config.optim.accumulate:
            raise InputError(f"does not divide the {local_batch} sequences of a process", "optim.accumulate")
        if accelerator.is_main_process:
            self._open_folder(fresh=resumed is None)

        reporter.say(
            f"{config.run.name}: {config.data.name}, {len(self.loaders.train.sampler.indices)} training and "
            f"{len(self.loaders.validation.sampler.indices)} test images, {self.loaders.kind} loader, {accelerator.device.type}, "
            f"{'bf16' if accelerator.mixed_precision == 'bf16' else 'fp32'}, {accelerator.num_processes} process(es)"
        )
        # before the control: a tracker that cannot start should say so now
        self.trackers = Trackers(accelerator, config, self.run_dir, state["wandb_id"] if state else None, reporter.say)
        self.wandb_id = self.trackers.wandb_id
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
        self.learner = Learner(config, self.loaders, accelerator)
        set_seed(config.run.seed, device_specific=True)  # dropout differs between processes
        if state:
            self._restore(tensors, state)
            reporter.say(f"resumed from {resumed}: epoch {self.epoch + 1}, step {self.step}")
        self.metrics_file = MetricsFile(self.run_dir / "metrics.jsonl", self.epoch) if accelerator.is_main_process else None
        self.learning = True

    @property
    def global_step(self) -> int:
        """Optimiser steps done."""
        return self.epoch * self.learner.steps_per_epoch + self.step

    # -- the loop

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Interrupted: the run was asked to stop.
            Diverged: a loss or a gradient is no longer finite.
        """
        config = self.config
        self.reporter.advance("training", self.global_step, total=self.learner.total_steps)
        while self.epoch < config.run.epochs:
            watch = Stopwatch()
            self._train_epoch(watch)
            train_seconds = watch.seconds
            number = self.epoch + 1
            validated = number % config.eval.every == 0 or number == config.run.epochs
            # the interrupt comes first: validation repeats, the accumulated metrics would not
            metrics = self.learner.validate(self.loaders.validation, self._check_interrupt) if validated else {}
            self._refuse_divergence()
            metrics = self.learner.epoch_metrics() | metrics
            self.epoch, self.step = number, 0
            self.seconds += watch.seconds
            self._end_epoch(metrics, validated, train_seconds, watch)

    def _train_epoch(self, watch: Stopwatch) -> None:
        log_every = self.config.run.log_every
        recent = Stopwatch()
        for batch in self.loaders.train.epoch(self.epoch, self.step):
            loss = self.learner.step(batch, self.global_step)
            self.step += 1
            watch.count(self.config.data.batch_size)
            recent.count(self.config.data.batch_size)
            self.reporter.advance()
            if self.global_step % log_every == 0:
                value = loss.item()  # the one host sync of the loop
                self._refuse_divergence()
                self._log_step(value, recent)
                recent.restart()
            if self.accelerator.num_processes == 1:
                self.interrupts.check()
            elif self.global_step % log_every == 0:
                self.interrupts.check_together(self.accelerator)

    def _log_step(self, loss: float, recent: Stopwatch) -> None:
        status = f"loss {loss:.4f}  {1e3 * recent.seconds / recent.steps:.0f} ms/step  {recent.rate:.0f} seq/s"
        self.reporter.advance(amount=0, status=status)
        lr = learning_rate(self.config.optim, self.global_step - 1, self.learner.steps_per_epoch, self.learner.total_steps)
        self.trackers.log({"step_loss": loss, "lr": lr, "sequences_per_second": recent.rate}, self.global_step)

    def _end_epoch(self, metrics: dict[str, float], validated: bool, train_seconds: float, watch: Stopwatch) -> None:
        config = self.config
        is_best = validated and self._is_best(metrics)
        if is_best:
            name = config.eval.best_metric
            self.best = {"epoch": self.epoch, "value": metrics[name], "metrics": metrics}
        timing = {"ep_time": watch.seconds, "train_time": train_seconds, "sequences_per_second": watch.sequences / train_seconds}
        untrained = {f"untrained_{name}": value for name, value in (self.untrained or {}).items() if name.endswith("_test")}
        if self.metrics_file:
            self.metrics_file.append({"epoch": self.epoch, **metrics, "timing": timing})
        self.trackers.log({"epoch": self.epoch, **metrics, **untrained, **timing}, self.global_step)
        title = f"epoch {self.epoch}/{config.run.epochs}  {timing['sequences_per_second']:.0f} sequences/s"
        if validated:
            self.reporter.epoch(title, metrics, self.untrained)
        last = self.epoch == config.run.epochs
        if is_best or last or self.epoch % config.checkpoint.every == 0:
            self.save(best=is_best)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        value, best = metrics[self.config.eval.best_metric], self.best["value"]
        if math.isnan(value) or math.isnan(best):
            return not math.isnan(value)
        return value > best if self.config.eval.best_mode == "max" else value < best

    def _refuse_divergence(self) -> None:
        found = self.learner.diverged()
        if found is not None:
            step, term = found
            good = self.checkpoints.newest()
            raise Diverged(
                f"diverged: {term} was not finite at step {step} (epoch {step // self.learner.steps_per_epoch + 1}); "
                f"last good checkpoint: {good or 'none'}"
            )

    def _check_interrupt(self) -> None:
        if self.accelerator.num_processes == 1:
            self.interrupts.check()

    def _control_progress(self, description: str, amount: int) -> None:
        if description:
            self.reporter.advance(description, 0, total=amount)
        else:
            self.reporter.advance()

    # -- checkpoints

    def save(self, *, best: bool = False) -> Path:
        """Write a checkpoint of the present position; returns its folder."""
        learner, accelerator = self.learner, self.accelerator
        partial, final = self.checkpoints.partial(self.epoch, self.step)
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        accelerator.wait_for_everyone()
        ckpt.write_tensors(ckpt.rng_tensors(), partial / f"rng-{accelerator.process_index:05d}.safetensors")
        # each process holds its own part of the metrics: their sum goes into the file
        metrics = {
            f"{bank_name}.{key}": value
            for bank_name in ("train_losses", "train_metrics")
            for key, value in getattr(learner, bank_name).collect(accelerator).state_dict().items()
        }
        if accelerator.is_main_process:
            optimizers = ckpt.optimizer_tensors(learner.optimizer, learner.model, "optimizer")
            optimizers |= ckpt.optimizer_tensors(learner.probe_optimizer, learner.probes, "probe_optimizer")
            ckpt.write_tensors(learner.model.state_dict(), partial / "model.safetensors")
            ckpt.write_tensors(learner.probes.state_dict(), partial / "probes.safetensors")
            ckpt.write_tensors(optimizers | metrics, partial / "trainer.safetensors")
            ckpt.write_state(self._state(), partial / "state.json")
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            self.checkpoints.publish(partial, final, best=best)
        return final

    def save_interrupted(self) -> str:
        """Save where the loop was left; returns what to tell the user."""
        if self.learner.diverged() is not None:
            return f"it had diverged; last good checkpoint: {self.checkpoints.newest() or 'none'}"
        path = self.save()
        return f"saved {path}; run.resume=auto continues in epoch {self.epoch + 1}"

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "step": self.step,
            "global_step": self.global_step,
            "processes": self.accelerator.num_processes,
            "best": self.best,
            "seconds": self.seconds,
            "wandb_id": self.wandb_id,
            "commit": self.commit,
            "config": self.config.model_dump(),
        }

    def _restore(self, tensors: dict[str, dict[str, Any]], state: dict[str, Any]) -> None:
        learner = self.learner
        learner.model.load_state_dict(tensors["model"])
        learner.probes.load_state_dict(tensors["probes"])
        ckpt.load_optimizer(learner.optimizer, learner.model, "optimizer", tensors["trainer"])
        ckpt.load_optimizer(learner.probe_optimizer, learner.probes, "probe_optimizer", tensors["trainer"])
        if self.accelerator.is_main_process:  # the others add to the sum from zero
            for bank_name in ("train_losses", "train_metrics"):
                start = f"{bank_name}."
                own = {k.removeprefix(start): v for k, v in tensors["trainer"].items() if k.startswith(start)}
                getattr(learner, bank_name).load_state_dict(own)
        ckpt.load_rng(tensors["rng"])
        self.epoch, self.step = state["epoch"], state["step"]
        self.best = state["best"] | {"value": math.nan if state["best"]["value"] is None else state["best"]["value"]}
        self.seconds = state["seconds"]
        learner.device_step.fill_(self.global_step)

    def _find_checkpoint(self) -> Path | None:
        resume = self.config.run.resume
        if resume == "none":
            return None
        if resume == "auto":
            return self.checkpoints.newest()
        path = Path(resume).expanduser()
        if (path / "checkpoints").is_dir():  # a run folder
            path = ckpt.Checkpoints(path / "checkpoints", 1).newest() or path
        if not (path / "state.json").is_file():
            raise InputError(f"{resume}: holds no checkpoint; auto, none, a run folder or a checkpoint is allowed", "run.resume")
        return path

    def _check_same_experiment(self, saved: dict[str, Any], path: Path) -> None:
        now = self.config.model_dump()
        pairs = [
            (f"{section}.{key}", saved.get(section, {}).get(key), value)
            for section in FIXED_SECTIONS
            for key, value in now[section].items()
        ]
        pairs.append(("run.seed", saved["run"]["seed"], now["run"]["seed"]))
        for field, before, value in pairs:
            if field not in FREE_FIELDS and before != value:
                raise InputError(f"is {value!r}, the checkpoint {path} was trained with {before!r}", field)

    def _open_folder(self, fresh: bool) -> None:
        standing = self.checkpoints.newest() or (self.run_dir / "metrics.jsonl").exists()
        if fresh and standing:
            if not self.config.run.overwrite and self.config.run.resume != "auto":
                raise InputError(
                    f"{self.run_dir} holds a run: run.resume=auto continues it, run.overwrite=true replaces it, "
                    "another run.name or run.dir keeps both",
                    "run.dir",
                )
            for name in ("checkpoints", "figures", "tensorboard"):
                shutil.rmtree(self.run_dir / name, ignore_errors=True)
            for name in ("metrics.jsonl", "summary.json"):
                (self.run_dir / name).unlink(missing_ok=True)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(self.run_dir / "config.yaml", dump(self.config))

    # -- the verdict

    def finish(self) -> int:
        """Judge, summarise, draw; returns the exit code."""
        config = self.config
        if not self.accelerator.is_main_process:
            return DONE
        final = {k: v for k, v in self.metrics_file.rows[-1].items() if k not in ("epoch", "timing")}
        judged = [("final epoch", final), (f"best epoch {self.best['epoch']}", self.best["metrics"])]
        # metrics come back from JSON with null for NaN
        judged = [(title, {k: math.nan if v is None else v for k, v in metrics.items()}) for title, metrics in judged]
        reasons = [f"{title}: {reason}" for title, metrics in judged for reason in judge(config.active_rules, metrics, self.untrained)]
        passed = not reasons if config.active_rules else None
        if passed is None:
            reasons = [f"no rules for {config.data.name}: nothing was judged"]
        summary = {
            "gate_pass": passed,
            "gate_reasons": reasons,
            "final": final,
            "best": self.best["metrics"],
            "untrained": self.untrained,
            "best_epoch": self.best["epoch"],
            "epochs": self.epoch,
            "commit": self.commit,
            "timing": {
                "seconds": self.seconds,
                "sequences_per_second": self.epoch * self.learner.steps_per_epoch * config.data.batch_size / self.seconds,
                "hardware": hardware(),
                "versions": versions(),
            },
        }
        write_atomically(self.run_dir / "summary.json", to_json(summary, indent=1) + "\n")
        figure = self.run_dir / "figures" / "curves.png"
        draw_curves(self.metrics_file.rows, self.untrained, figure)
        self.trackers.log_figure("curves", figure, self.global_step)
        self.trackers.summarise({"gate_pass": passed, "gate_reasons": reasons, "best_epoch": self.best["epoch"]})
        for reason in reasons:
            self.reporter.say(f"gate: {reason}")
        self.reporter.say(closing_block(self._closing(summary)))
        return GATE_FAILED if config.gates.enforce and not passed else DONE

    def _closing(self, summary: dict[str, Any]) -> dict[str, Any]:
        final, untrained = summary["final"], self.untrained or {}
        shown = ("online_linacc_test", "leakage_linacc_test", "online_r2_test", "leakage_r2_test", "pred_cosine_centred_test")
        values: dict[str, Any] = {"run": self.run_dir, "epochs": self.epoch, "best_epoch": summary["best_epoch"]}
        for name in shown:
            values[name] = final.get(name)
            if name in untrained:
                values[f"untrained_{name}"] = untrained[name]
        values["gate_pass"] = summary["gate_pass"]
        values["seconds"] = round(self.seconds, 1)
        values["sequences_per_second"] = round(summary["timing"]["sequences_per_second"], 1)
        return values


def _threads() -> int:
    import torch

    return torch.get_num_threads()
