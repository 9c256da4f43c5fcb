"""A run that is killed, again and again, at any moment, and started again, is the run that it would have been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE, STDOUT

import pytest

from seqjepa.engine.reports.trackers import Trackers
from seqjepa.engine.runs import checkpoints
from seqjepa.engine.runs import metrics_file as records
from seqjepa.engine.runs import tensors as checkpoint_files
from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.train import main
from seqjepa.engine.training import trainer
from seqjepa.engine.training.step import TrainingStep

pytestmark = pytest.mark.usefixtures("blank_figures")
WORDS = ("run.resume=auto", "run.overwrite=false", "run.log_every=2", "checkpoint.keep=2")
WORDS += ("eval.best_metric=ep_loss", "eval.best_mode=max")  # the first epoch is the best, and is to be kept
TRACKED = ("tracking.wandb=offline", "tracking.tensorboard=true")


def start(words, moment="never") -> subprocess.Popen:
    """Train in a process of its own, which dies at a moment of `MOMENTS`; a fork could inherit autograd's threads."""
    return subprocess.Popen([sys.executable, "-P", __file__, moment, *words], stdout=PIPE, stderr=STDOUT, text=True)


def finish(words) -> None:
    assert main(words) == 0


def timeless(record: dict) -> dict:
    return {key: value for key, value in record.items() if key != "timing"}


def assert_same_run(one: Path, other: Path) -> None:
    """Weights, teacher, probes, optimisers and generators to the last bit; metrics and verdict but for their timing."""
    ours, theirs = (find_checkpoint(path) for path in (one, other))
    assert ours.name == theirs.name
    for name in ("model", "probes", "trainer", "rng-00000"):
        assert (ours / f"{name}.safetensors").read_bytes() == (theirs / f"{name}.safetensors").read_bytes(), name
    rows, others = ([timeless(row) for row in read_rows(path / "metrics.jsonl")] for path in (one, other))
    assert rows == others
    assert [row["epoch"] for row in rows] == list(range(1, len(rows) + 1))
    verdicts = [timeless(json.loads((path / "summary.json").read_text())) for path in (one, other)]
    assert verdicts[0] == verdicts[1]


def kill_before(place, name, calls):
    """Die when a function is called for that many a time."""
    original, left = getattr(place, name), [calls]

    def deadly(*args, **kwargs):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(place, name, deadly)


def kill_after(place, name, calls):
    """Die when a function has been called that often."""
    original, left = getattr(place, name), [calls]

    def deadly(*args, **kwargs):
        original(*args, **kwargs)
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(place, name, deadly)


def kill_half_way_through(place, name, calls):
    """Die with half of what the function writes on the disk; its last argument is the path, or its object has one."""
    original, left = getattr(place, name), [calls]

    def deadly(*args):
        left[0] -= 1
        result = original(*args)
        if not left[0]:
            path = args[-1] if isinstance(args[-1], Path) else args[0].path
            os.truncate(path, path.stat().st_size - 100)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(place, name, deadly)


def kill_half_way_through_a_folder(place, name, calls):
    """Die with half of a folder deleted, the last one of some calls that find any."""
    original, left = getattr(place, name), [calls]

    def deadly(path, **kwargs):
        left[0] -= Path(path).is_dir()
        if not left[0] and Path(path).is_dir():
            for file in sorted(Path(path).iterdir())[:3]:
                file.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, **kwargs)

    setattr(place, name, deadly)


MOMENTS = {
    "never": lambda: None,
    "in the control": lambda: kill_before(TrainingStep, "step", 3),
    "in a step": lambda: kill_before(TrainingStep, "_record", 18),
    "in a validation": lambda: kill_before(TrainingStep, "share_buffers", 4),
    "while tensors are written": lambda: kill_half_way_through(checkpoint_files, "save_tensors", 6),
    "before the manifest": lambda: kill_before(checkpoint_files, "seal", 2),
    "before a checkpoint is renamed": lambda: kill_before(checkpoints.Checkpoints, "publish", 2),
    "before the best is linked": lambda: kill_before(checkpoints.Checkpoints, "_link_best", 1),
    "before old checkpoints go": lambda: kill_before(checkpoints, "to_disk", 3),
    "while old checkpoints go": lambda: kill_half_way_through_a_folder(checkpoints.shutil, "rmtree", 1),
    "in a line of metrics": lambda: kill_half_way_through(records.MetricsFile, "append", 3),
    "before the tracker is told": lambda: kill_before(Trackers, "log", 7),
    "while the tracker writes": lambda: kill_after(Trackers, "log", 7),
    "before the verdict": lambda: kill_before(trainer, "write_atomically", 1),
    "after the verdict": lambda: kill_before(Trackers, "summarise", 1),
}


@pytest.fixture(scope="module")
def whole(tiny_for_module, folder_of):
    words = tiny_for_module(*WORDS, "run.epochs=4")
    finish(words)
    return folder_of(words)


SOME = ("while tensors are written", "in a line of metrics")


@pytest.mark.parametrize(
    "moment", [m if m in SOME else pytest.param(m, marks=pytest.mark.soak) for m in MOMENTS if m != "never"]
)
def test_killed_at_a_chosen_moment(tiny, whole, folder_of, moment):
    words = tiny(*WORDS, "run.epochs=4")
    if moment == "while the tracker writes":
        words += TRACKED
    process = start(words, moment)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, said
    finish(words)
    assert_same_run(folder_of(words), whole)
    left = {path.name for path in (folder_of(words) / "checkpoints").iterdir()}
    assert left == {path.name for path in (whole / "checkpoints").iterdir()}
    assert os.readlink(folder_of(words) / "checkpoints" / "best") == "epoch-0001"


@pytest.mark.soak
def test_killed_at_random_moments(tiny, tmp_path, record_property):
    """From outside, by the clock, in one training; the seed is fixed, the machine's speed is not."""
    kills = 50
    record_property("faults", kills)
    epochs = f"run.epochs={8 * kills}"
    begun = time.monotonic()
    finish(tiny(*WORDS, epochs, run="whole"))
    an_epoch = (time.monotonic() - begun) / (8 * kills)
    draw, done = random.Random(0), []
    words = tiny(*WORDS, *TRACKED, epochs, run="killed")
    while len(done) < kills:
        process = start(words)
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith(("resumed from", "epoch 1/")))  # it trains
        time.sleep(draw.uniform(0, 8 * an_epoch))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it was killed often enough"
        done.append(find_checkpoint(tmp_path / "killed"))
    finish(words)
    assert len(set(done)) > kills // 2  # it came on in between
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.soak
def test_a_stream_that_is_killed_twenty_times(tiny, tmp_path, record_property):
    """Ten tasks with a buffer; each process dies in one of its first steps, within a task or after the next began."""
    kills, draw = 20, random.Random(1)
    record_property("faults", kills)
    stream = ("configs/stream/classes.yaml", "stream.tasks=10", "stream.steps=6", "stream.buffer.kind=balanced")
    stream += ("stream.buffer.size=40", "eval.best_metric=val_loss", "eval.best_mode=min", "checkpoint.keep=2")
    finish(tiny(*stream, run="whole"))
    words = tiny(*stream, "run.resume=auto", "run.overwrite=false", run="killed")
    for _ in range(kills):
        process = start(words, f"in step {draw.randint(2, 8)}")
        said, _ = process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL, said
    assert len(read_rows(tmp_path / "killed" / "metrics.jsonl")) in range(3, 10)  # it came on in between
    finish(words)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


if __name__ == "__main__":
    if sys.argv[1].startswith("in step "):
        kill_before(TrainingStep, "_record", int(sys.argv[1].removeprefix("in step ")))
    else:
        MOMENTS[sys.argv[1]]()
    sys.exit(main(sys.argv[2:]))
