"""Reports how fast a training step is, where its time goes, what it costs, and how far it is from the hardware's limit.

    python bench/report.py                                  # the paper's configuration on this machine
    python bench/report.py --task cifar10_rot --price 0.20 run.compile=graph

Prints tables and writes bench/history/<date>-report-<machine>.json. Peaks of the hardware are measured; for
cards that are not present there is a projection, which is labelled as one. bench/draw.py draws the results.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from common import command_line, cpu, history, kept_for_backward, loaders_of, random_images, wait
from rich.console import Console
from rich.table import Table
from roofline import CARDS, card_of, convolution_seconds, matmul_peak, seconds_of, training_flops

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator, compile_mode
from seqjepa.engine.runtime.provenance import commit, versions
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.validation import validate
from seqjepa.loaders.batch import each

EPOCHS, TRAIN, TEST = 2000, 50_000, 10_000  # of the paper's run
MIB, GIB = 2**20, 2**30
BATCHES = {"cpu": (16, 32, 64, 128), "cuda": (64, 128, 256, 512, 1024)}


class Run:
    """A training step on noise images, whose parts can be timed."""

    def __init__(self, words: list[str], batch_size: int):
        config = compose([*words, f"data.batch_size={batch_size}"]).config
        self.config, self.batch_size = config, batch_size
        self.accelerator = build_accelerator(config.run, 1)
        self.device = self.accelerator.device
        self.mode = compile_mode(config.run, self.accelerator)
        self.dtype = torch.bfloat16 if self.accelerator.mixed_precision == "bf16" else torch.float32
        images = random_images(config.data.dataset, 4 * batch_size)
        compiled = self.mode != "none" and self.device.type == "cuda"
        self.loaders = loaders_of(images, config, self.device, compiled=compiled)
        self.training = TrainingStep(config, self.loaders, self.accelerator)
        self.batches = (batch for epoch in range(10**6) for batch in self.loaders.train.epoch(epoch))
        self.done = 0

    def step(self) -> torch.Tensor:
        """One step, including its data."""
        self.done += 1
        return self.training.step(next(self.batches), self.done)

    def parts(self) -> dict[str, float]:
        """Seconds of each part of a step, timed alone with a sync; of validation, per batch."""
        training, batch = self.training, next(self.batches)
        training.losses.train()
        (given,) = training.step_inputs(batch).split(1)

        def forward():
            return training.wrapped(given, training.device_step)

        def both():
            measured = forward()
            self.accelerator.backward(measured.total)
            return measured

        measured = both()
        seconds = {"data": seconds_of(lambda: next(self.batches)), "forward": seconds_of(forward)}
        seconds["backward"] = seconds_of(both) - seconds["forward"]

        def update():
            for parameter, gradient in gradients:
                parameter.grad = gradient
            training._update()

        gradients = [(p, p.grad) for p in training.trainable]
        features = measured.features
        seconds["optimiser and EMA"] = seconds_of(update)
        seconds["probes' optimiser"] = seconds_of(training.probe_optimizer.step)
        seconds["metrics"] = seconds_of(lambda: training._record(batch, [measured], measured.loss))

        def probes():
            outputs = training.probes(features)
            losses = training.probes.losses(outputs, batch.labels, batch.actions)
            torch.stack(list(losses.values())).sum().backward()

        seconds["(probes alone, within forward and backward)"] = seconds_of(probes)
        batches = len(self.loaders.validation)
        seconds["(validation, a batch)"] = (
            seconds_of(lambda: validate(training, self.loaders.validation).metrics, 3) / batches
        )
        return seconds

    def flops(self) -> float:
        """FLOPs per sequence: products and convolutions of the losses and their gradients, uncompiled."""
        training, count = self.training, 2
        given = training.step_inputs(next(self.batches))
        small = each(given, lambda x: x[:count])
        forward = partial(type(training.losses).forward, training.losses)
        total = training_flops(lambda: forward(small, training.device_step).total)
        training.losses.zero_grad(set_to_none=True)
        return total / count

    def kept(self) -> float:
        """Bytes per further sequence that the losses keep for the backward pass, uncompiled."""
        training = self.training
        given = training.step_inputs(next(self.batches))
        forward = partial(type(training.losses).forward, training.losses)

        def of(count: int) -> int:
            few = each(given, lambda x: x[:count])
            with self.accelerator.autocast():
                return kept_for_backward(partial(forward, few, training.device_step), *training.losses.parameters())

        return (of(4) - of(2)) / 2

    def roofline(self) -> float:
        """Seconds of the convolutions and batch norms of a step; a teacher's views need no gradients."""
        model, side = self.training.model, self.loaders.sequence.image_size
        count = self.config.sequence.num_observed + model.target.joint
        views = torch.randn(self.batch_size * count, 1, 3, *side, device=self.device)
        seconds = convolution_seconds(model.encoder, views, self.dtype, backward=True)
        if not model.target.joint:
            seconds += convolution_seconds(model.encoder, views[: self.batch_size], self.dtype, backward=False)
        return seconds


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("--task", default="cifar100_aug", help="a file of configs/data")
    parser.add_argument("--variant", default="baseline", help="a file of configs/variant")
    parser.add_argument("--batch", type=int, help="sequences in a step: 512 on a GPU, 64 on a CPU")
    parser.add_argument(
        "--sizes", type=whole_numbers, metavar="N,N,...", help="batches to time, in the place of the usual five"
    )
    parser.add_argument("--price", type=float, help="of an hour of this machine")
    parser.add_argument("--memory", type=float, default=24.0, help="GiB of the GPU that may be used")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    on_gpu = torch.cuda.is_available()
    batch = args.batch or (512 if on_gpu else 64)
    if on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * GIB / total))
    words = [f"configs/data/{args.task}.yaml", "configs/tier/paper.yaml", f"configs/variant/{args.variant}.yaml"]
    words += args.settings
    sizes = args.sizes or BATCHES["cuda" if on_gpu else "cpu"]
    try:
        for size in (batch, *sizes):
            compose([*words, f"data.batch_size={size}"])
    except InputError as error:
        parser.error(str(error))
    known = {"task": args.task, "variant": args.variant, "settings": args.settings, "memory_limit_gib": args.memory}
    variant = "" if args.variant == "baseline" else f"-{args.variant}"

    def keep(found: dict) -> Path:
        """Write what was found so far: a measurement on a rented machine may be cut short."""
        path = history(f"report-{args.task}{variant}-{found['compile']}", found["machine"], "json")
        path.write_text(json.dumps(found | known, indent=1) + "\n", encoding="utf-8")
        return path

    found = measure(words, batch, sizes, keep)
    path = keep(found)
    show(found | known, args.price)
    print(f"bench/history/{path.name}")


def whole_numbers(text: str) -> tuple[int, ...]:
    """Argument type: whole numbers with commas between them."""
    return tuple(map(int, text.split(",")))


def measure(words: list[str], batch: int, sizes: Sequence[int], keep: Callable[[dict], object]) -> dict:
    """Measure everything that `show` prints; of batches of other sizes, the throughput. `keep` gets the first half."""
    run = Run(words, batch)
    on_gpu = run.device.type == "cuda"
    started = time.perf_counter()
    run.step()
    wait()
    first = time.perf_counter() - started  # with compilation
    step = seconds_of(run.step, 20 if on_gpu else 7)
    print(f"a step of {batch} sequences takes {1e3 * step:.1f} ms; now its parts", flush=True)
    found = {
        "machine": torch.cuda.get_device_name() if on_gpu else cpu(),
        "device": run.device.type,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "compile": run.mode,
        "batch": batch,
        "first_step_seconds": first,
        "step_seconds": step,
        "eval_every": run.config.eval.every,
    }
    keep(found)
    found["parts"] = run.parts()
    keep(found)
    found["flops_per_sequence"] = run.flops()
    found["kept_per_sequence"] = run.kept()
    found["matmul_flops"] = matmul_peak(run.device, run.dtype)
    found["convolution_seconds"] = run.roofline()
    if on_gpu:
        run.training._step(next(run.batches), measured=True)  # a logged step is not part of a CUDA graph
        found["peak_memory_gib"] = torch.cuda.max_memory_reserved() / GIB
    found["rates"] = {batch: batch / step}
    for size in sizes:
        if size != batch:
            del run
            gc.collect()  # a training step and its graph refer to each other
            torch.compiler.reset()
            if on_gpu:
                torch.cuda.empty_cache()
            try:
                run = Run(words, size)
                found["rates"][size] = size / seconds_of(run.step, 5)
            except torch.cuda.OutOfMemoryError:
                break
    return found


def epoch_seconds(found: dict) -> float:
    """Seconds of an epoch of 50,000 images, with its share of the validations."""
    steps, batches = TRAIN // found["batch"], -(-TEST // found["batch"])
    validation = found["parts"]["(validation, a batch)"] * batches / found["eval_every"]
    return steps * found["step_seconds"] + validation


def show(found: dict, price: float | None) -> None:
    console = Console(width=110, highlight=False)
    step, batch = found["step_seconds"], found["batch"]
    epoch = epoch_seconds(found)
    hours = EPOCHS * epoch / 3600
    achieved = found["flops_per_sequence"] * batch / step
    machine = f"{found['machine']}, {found['dtype']}, compile {found['compile']}"
    if found["device"] == "cpu":
        machine += f", {found['threads']} threads"
    table = Table("measured", "", title=f"{found['task']}, batch {batch}: {machine}", title_justify="left")
    rows = {
        "a step": f"{1e3 * step:.1f} ms, {batch / step:,.1f} sequences/s",
        "the first steps, with compilation": f"{found['first_step_seconds']:.1f} s",
        "an epoch of 50,000, validation shared": f"{epoch:,.1f} s",
        f"{EPOCHS:,} epochs": f"{hours:,.1f} hours"
        + (f", {hours * price:,.2f} at {price:.2f} an hour" if price else ""),
        "products and convolutions": f"{found['flops_per_sequence'] / 1e9:.2f} GFLOP a sequence",
        "MFU": f"{achieved / found['matmul_flops']:.1%} of {found['matmul_flops'] / 1e12:.2f} TFLOP/s, "
        "the best matrix product here",
        "kept for the backward pass": f"{found['kept_per_sequence'] / MIB:.1f} MiB a sequence, uncompiled",
    }
    if found["convolution_seconds"]:
        rows["of the convolution and batch-norm roofline"] = (
            f"{found['convolution_seconds'] / step:.1%}: these alone take {1e3 * found['convolution_seconds']:.1f} ms"
        )
    if "peak_memory_gib" in found:
        rows["peak memory"] = f"{found['peak_memory_gib']:.1f} GiB of the {found['memory_limit_gib']:g} that it may use"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)

    table = Table("part of a step", "ms", "share", title="each by itself, and waited for", title_justify="left")
    for name, seconds in found["parts"].items():
        table.add_row(name, f"{1e3 * seconds:.2f}", f"{seconds / step:.1%}")
    console.print(table)

    table = Table("batch", "sequences/s", title="throughput by batch", title_justify="left")
    for size, rate in sorted(found["rates"].items()):
        table.add_row(str(size), f"{rate:,.1f}")
    console.print(table)
    if found["device"] == "cuda":
        console.print(projection(found))
    else:
        console.print("No projection to GPUs: the efficiency of a CPU says nothing of theirs.")


def projection(found: dict) -> Table:
    """Projected epochs on cards that are not present.

    The time is the larger of two: the step's arithmetic over the card's published peak, at the share of the peak that
    this card reached; and this step's time scaled by bandwidth.
    """
    known = card_of(found["machine"])
    title = "PROJECTION, not measured: this card's share of its published peak (SXM), or bandwidth, whichever is slower"
    table = Table("card", "an epoch", f"{EPOCHS:,} epochs", title=title, title_justify="left")
    if known is None:
        table.add_row("(no published peak of this card is known)", "", "")
        return table
    _, here = known
    epoch = epoch_seconds(found)
    for name, card in CARDS.items():
        seconds = epoch * max(here.tflops / card.tflops, here.bandwidth / card.bandwidth)
        table.add_row(name, f"{seconds:,.1f} s", f"{EPOCHS * seconds / 3600:,.1f} hours")
    return table


if __name__ == "__main__":
    main()
