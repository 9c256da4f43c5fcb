"""Faults that are brought about for real: one clear line, the right exit code, and nothing lost."""

import contextlib
import errno
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from image_data import write_images

from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.metrics_file import MetricsFile, read_rows
from seqjepa.engine.runtime.failures import explain
from seqjepa.engine.train import main
from seqjepa.engine.training import trainer, untrained_control
from seqjepa.engine.training.step import TrainingStep
from seqjepa.loaders.loader import SequenceLoader

pytestmark = pytest.mark.usefixtures("blank_figures")
TRAIN = (sys.executable, "engine/train.py")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")


def weights(run: Path) -> bytes:
    return (find_checkpoint(run) / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_for_module, folder_of):
    """Folder of an undisturbed run of four epochs."""
    words = tiny_for_module("run.epochs=4")
    assert main(words) == 0
    return folder_of(words)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, at tmp_path / disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no tmpfs can be mounted here: {mounted.stderr.decode().strip()}")
    yield disk
    while os.path.ismount(disk):  # a test may have mounted over it
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves so many bytes of the disk."""
    ballast = disk / "ballast"
    with ballast.open("wb") as file:
        file.write(b"\0" * (shutil.disk_usage(disk).free - leave))
    return ballast


@needs_root
def test_disk_full_while_a_checkpoint_is_written(tiny, small_disk, whole, capsys):
    words = tiny("run.epochs=4", f"run.dir={small_disk / 'run'}", "run.overwrite=false", "run.resume=auto")
    assert main([*words, "run.epochs=4"]) == 0
    size = sum(path.stat().st_size for path in find_checkpoint(small_disk / "run").iterdir())
    shutil.rmtree(small_disk / "run")
    ballast = fill(small_disk, int(2.5 * size) + 200_000)
    capsys.readouterr()
    assert main([*words, "checkpoint.keep=9"]) == 4
    printed = capsys.readouterr().out
    last = [line for line in printed.splitlines() if "cannot read or write: " in line]
    assert len(last) == 1
    assert re.search(r"checkpoints/\S+: No space left on device", last[0]), last[0]
    good = find_checkpoint(small_disk / "run")
    assert f"last good checkpoint: {good}" in last[0]
    assert not list((small_disk / "run").rglob(".*partial*"))
    ballast.unlink()
    assert main([*words, "checkpoint.keep=9"]) == 0
    assert "damaged" not in capsys.readouterr().out
    assert weights(small_disk / "run") == weights(whole)


@needs_root
def test_disk_full_while_metrics_are_written(tiny, small_disk, capsys, monkeypatch):
    words = tiny("run.epochs=4", f"run.dir={small_disk / 'run'}")
    original = MetricsFile.append

    def append(self, row):
        if row["epoch"] == 3:
            fill(small_disk, 0)
        original(self, row | {f"filler_{number}": 0.0 for number in range(1000)})

    monkeypatch.setattr(MetricsFile, "append", append)
    assert main(words) == 4
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.startswith(f"cannot read or write: {small_disk}/run/metrics.jsonl: No space left on device; last good ")
    (small_disk / "ballast").unlink()
    monkeypatch.undo()
    assert main([*words, "run.resume=auto"]) == 0
    assert [row["epoch"] for row in read_rows(small_disk / "run" / "metrics.jsonl")] == [1, 2, 3, 4]


@needs_root
def test_a_disk_that_becomes_read_only(tiny, small_disk, whole, capsys, refused, monkeypatch):
    words = tiny("run.epochs=4", f"run.dir={small_disk / 'run'}", "run.overwrite=false", "run.resume=auto")
    original = TrainingStep.step

    def step(self, batch, at):
        if at == 12 and self.train_model:
            for words in (["--bind", str(small_disk)], ["-o", "remount,ro,bind"]):
                subprocess.run(["mount", *words, str(small_disk)], check=True)
        return original(self, batch, at)

    monkeypatch.setattr(TrainingStep, "step", step)
    assert main(words) == 4
    assert "cannot read or write: " in (line := capsys.readouterr().out.splitlines()[-1])
    assert "Read-only file system; last good checkpoint: " in line
    monkeypatch.undo()
    refused(words, "run.dir: ", "cannot be written (Read-only file system)")
    subprocess.run(["umount", str(small_disk)], check=True)
    assert main(words) == 0
    assert weights(small_disk / "run") == weights(whole)


def test_two_runs_in_one_folder(tiny, tmp_path, refused):
    """The second is refused while the first lives; its death, however sudden, leaves nothing that is in the way."""
    words = tiny("run.epochs=500", "eval.every=500", "run.resume=auto", "run.overwrite=false")
    first = subprocess.Popen([*TRAIN, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while len(read_rows(tmp_path / "run" / "metrics.jsonl")) < 2:
            assert time.monotonic() < end
            time.sleep(0.02)
        for way in ("run.resume=auto", "run.overwrite=true"):
            refused([*words, way], "run.dir: ", "another run is training in it")
    finally:
        first.kill()
        first.wait()
    epochs = len(read_rows(tmp_path / "run" / "metrics.jsonl")) + 1
    assert main([*words, f"run.epochs={epochs}"]) == 0


def test_a_run_that_another_overtook(tiny, tmp_path, capfd, monkeypatch):
    """Both saw no folder; the other trained there, and ended, while this one opened its data."""
    words = tiny("run.resume=auto", "run.overwrite=false")
    original = trainer.open_loaders

    def slow(*args):
        monkeypatch.undo()
        assert main(words) == 0
        return original(*args)

    monkeypatch.setattr(trainer, "open_loaders", slow)
    capfd.readouterr()
    assert main(words) == 2
    assert "another run wrote here after this one started" in capfd.readouterr().err
    assert find_checkpoint(tmp_path / "run").name == "epoch-0002"
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 2


def test_out_of_memory_gives_advice(tiny, tmp_path):
    """A batch that needs more than the process may have."""
    words = tiny("data.batch_size=1024", "data.train_subset=1024", "model.encoder.width=64", "control.enabled=false")
    words += ["gates.rules.digits_affine=[]"]

    def limit():
        resource.setrlimit(resource.RLIMIT_DATA, (3 << 29, 3 << 29))

    result = subprocess.run([*TRAIN, *words], capture_output=True, text=True, timeout=600, preexec_fn=limit)
    assert result.returncode == 4, result.stdout + result.stderr
    line = result.stdout.splitlines()[-1]
    assert line.startswith("out of memory with data.batch_size=1024 optim.accumulate=1; optim.accumulate=2 keeps")
    assert line.endswith("nothing was saved")


def test_a_validation_without_memory_is_not_cut_smaller(tiny, capsys, monkeypatch):
    """Its batches are whole: more micro-batches would not help."""
    original = SequenceLoader.epoch

    def epoch(self, *args):
        if not self.sampler.train:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return original(self, *args)

    monkeypatch.setattr(SequenceLoader, "epoch", epoch)
    assert main(tiny("control.enabled=false", "gates.rules.digits_affine=[]")) == 4
    assert "out of memory in the validation" in (line := capsys.readouterr().out.splitlines()[-1])
    assert "a run with a smaller data.batch_size" in line


def test_a_cache_of_controls_that_cannot_be_written_costs_a_word(tiny, capsys, monkeypatch):
    def fail(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(untrained_control, "write_atomically", fail)
    assert main(tiny("run.epochs=1")) == 0
    assert "(Permission denied); the next run makes it again" in capsys.readouterr().out


def test_advice_on_memory_is_what_the_next_command_takes():
    """The next larger number of micro-batches that divides a process's part and leaves batch norm two sequences."""
    for sizes, word in (
        ((64, 1, 1), "optim.accumulate=2 "),
        ((64, 2, 1), "optim.accumulate=4 "),
        ((60, 2, 2), "optim.accumulate=3 "),  # of 30
        ((50, 5, 1), "optim.accumulate=10 "),
        ((64, 32, 1), "a run with a smaller data.batch_size"),
        ((6, 3, 1), "a run with a smaller data.batch_size"),
    ):
        assert f"; {word}" in explain(MemoryError(), *sizes)


def spoil_image(training, batch):
    batch.views[0, 0, 0, 0, 0] = float("nan")


def spoil_teacher(training, batch):
    weight = next(training.model.target.parameters()).data
    weight[(0,) * weight.ndim] = float("nan")


def spoil_gradient(training, batch):
    parameter = training.trainable[0]
    handle = parameter.register_hook(lambda gradient: (handle.remove(), gradient * float("nan"))[1])


@pytest.mark.parametrize("spoil", [spoil_image, spoil_teacher, spoil_gradient])
def test_a_number_that_is_not_finite_ends_the_run(tiny, tmp_path, whole, capsys, monkeypatch, spoil):
    """It ends the run by the end of the epoch, nothing of it is saved, and from what was the run goes on."""
    original = TrainingStep.step

    def step(self, batch, at):
        if at == 12 and self.train_model:
            spoil(self, batch)
        return original(self, batch, at)

    monkeypatch.setattr(TrainingStep, "step", step)
    words = tiny("run.epochs=4", "run.overwrite=false", "run.resume=auto")
    assert main(words) == 3
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("diverged: ")
    assert "not finite at step 12 (epoch 3)" in line
    assert find_checkpoint(tmp_path / "run").name == "epoch-0002"
    assert [row["epoch"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    monkeypatch.undo()
    assert main(words) == 0
    assert weights(tmp_path / "run") == weights(whole)


def test_a_checkpoint_with_a_nan_is_refused(whole, tiny, tmp_path, refused):
    """Even one whose checksums agree."""
    from safetensors.torch import load_file, save_file

    from seqjepa.engine.runs.checksums import seal

    path = shutil.copytree(find_checkpoint(whole), tmp_path / "spoilt")
    tensors = load_file(path / "model.safetensors")
    name = next(name for name in tensors if name.startswith("target.") and name.endswith("running_mean"))
    tensors[name][0] = float("nan")
    save_file(tensors, path / "model.safetensors")
    (path / "manifest.json").unlink()
    seal(path)
    refused(tiny("run.epochs=5", f"run.resume={path}", run="b"), "run.resume: ", f"model {name} is not finite")


@pytest.mark.parametrize("out", ["closed pipe", "full disk"])
def test_nobody_can_be_told(tiny, tmp_path, whole, monkeypatch, out):
    """As after `train.py | head -1`, and `train.py > log` where nothing fits any more."""
    read, write = os.pipe()
    os.close(read)
    with open(write if out == "closed pipe" else "/dev/full", "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        assert main(tiny("run.epochs=4")) == 0
    assert weights(tmp_path / "run") == weights(whole)


@pytest.mark.soak
def test_a_terminal_that_goes_away(tiny, tmp_path):
    """As when a connection is lost: saved, by the SIGHUP that comes of it, though nobody can be told any more."""
    words = tiny("run.epochs=400", "checkpoint.every=400", "eval.every=400")
    process, terminal = pty.fork()
    if not process:
        os.execv(TRAIN[0], [*TRAIN, *words])
    run, end = tmp_path / "run", time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text():
        assert time.monotonic() < end
        with contextlib.suppress(BlockingIOError):
            os.set_blocking(terminal, False)
            os.read(terminal, 65536)
        time.sleep(0.02)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 128 + signal.SIGHUP
    epochs = int(find_checkpoint(run).name.split("-")[1]) + 1
    assert main([*words, f"run.epochs={epochs}", "eval.every=1", "run.resume=auto"]) == 0


def test_a_hangup_that_was_to_be_ignored(tiny, interrupt_at):
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        interrupt_at(3, signal.SIGHUP)
        assert main(tiny()) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_clock_that_jumps_back(tiny, tmp_path, whole, monkeypatch):
    """By an hour at each look; durations stay positive, the run is the same."""
    hours = iter(range(10**9))
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(hours))
    assert main(tiny("run.epochs=4")) == 0
    assert weights(tmp_path / "run") == weights(whole)
    timing = json.loads((tmp_path / "run" / "summary.json").read_text())["timing"]
    assert timing["seconds"] > 0
    assert all(row["timing"]["ep_time"] > 0 for row in read_rows(tmp_path / "run" / "metrics.jsonl"))


CUT = """
import os, signal, sys
from seqjepa.engine.training.step import TrainingStep
from seqjepa.loaders.loader import SequenceLoader
from seqjepa.engine.train import main

original = TrainingStep.step

def step(self, batch, at):
    if at == 50 and self.train_model:
        {fault}
    return original(self, batch, at)

TrainingStep.step = step
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def beton(tmp_path_factory):
    pytest.importorskip("ffcv")
    from seqjepa.loaders.write import main as write

    folder = tmp_path_factory.mktemp("beton")
    assert write(["digits", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("fault", ["os.truncate(PATH, 4096)", pytest.param("os.unlink(PATH)", marks=pytest.mark.soak)])
def test_data_that_vanish_under_a_run(tiny, tmp_path, beton, fault):
    """FFCV maps the file: cut short, it faults within compiled code; without its name, the epoch is read on."""
    data = shutil.copytree(beton, tmp_path / "data")
    words = tiny(f"data.root={data}", "data.train_subset=1408", "run.epochs=3", "run.resume=auto")  # 44 steps an epoch
    script = CUT.format(fault=fault.replace("PATH", repr(str(data / "train.beton"))))
    result = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=600)
    said = (result.stdout + result.stderr).splitlines()
    assert "Traceback" not in result.stdout + result.stderr
    good = find_checkpoint(tmp_path / "run")
    if "truncate" in fault:
        assert result.returncode == 128 + signal.SIGBUS, said
        shrunk = "a file that was being read has shrunk or is gone (SIGBUS); last good checkpoint: "
        assert said[-1] == f"{shrunk}{good}; run.resume=auto continues from it"
        assert good.name == "epoch-0001"
    else:
        assert result.returncode == 2, said
        assert f"{data / 'train.beton'}: 0 bytes, its sidecar says" in said[-1]
        assert good.name == "epoch-0002"
    shutil.copy(beton / "train.beton", data)
    assert main(words) == 0


@needs_root
def test_disk_full_while_a_beton_is_written(small_disk):
    """The betons need 34 MB, the disk has 8; what stood there stays."""
    pytest.importorskip("ffcv")
    (small_disk / "train.beton").write_bytes(b"of before")
    (small_disk / "train.beton.json").write_text("{}")
    command = [sys.executable, "-m", "seqjepa.loaders.write", "digits", str(small_disk)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert "No space left on device" in said[0]
    assert "Traceback" not in result.stderr
    assert {path.name for path in small_disk.iterdir()} == {"train.beton", "train.beton.json"}
    assert (small_disk / "train.beton").read_bytes() == b"of before"


FILLS_MEANWHILE = """
import shutil, sys
from seqjepa.loaders.write import main
real = shutil.disk_usage
shutil.disk_usage = lambda path: real("/")._replace(free=1 << 40)
sys.exit(main(sys.argv[1:]))
"""


@needs_root
def test_a_disk_that_fills_while_a_beton_is_written(small_disk, tmp_path):
    """There seemed to be room; FFCV's writer would wait for ever."""
    source = write_images(tmp_path / "images", count=1000, size=(64, 64))  # 25 MB of pixels
    pytest.importorskip("ffcv")
    before = set(os.listdir("/dev/shm"))
    command = [sys.executable, "-c", FILLS_MEANWHILE, str(source), str(small_disk)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    said = [line for line in result.stderr.splitlines() if "error: " in line]
    assert len(said) == 1
    assert said[0].endswith(f"No space left on device: '{small_disk}/train.beton'")
    assert "Traceback" not in result.stderr
    assert not list(small_disk.iterdir())
    assert set(os.listdir("/dev/shm")) <= before
