"""Jobs of several processes: started, stopped, gone on with, and what their launchers say."""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.runtime.interrupts import Interrupted, Interrupts
from seqjepa.engine.train import main

ROOT = Path(__file__).resolve().parents[3]


def last_row(run: Path) -> dict:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.soak
def test_a_run_goes_on_with_another_number_of_processes(tiny, tmp_path, ranks):
    """An epoch each on 2, 1 and 4: nothing in a schedule here depends on how many epochs there will be."""
    fixed = ("model.aggregator.dropout=0.0", "optim.schedule=constant", "target.schedule=constant", "optim.lr=1e-4")
    for epochs, number in enumerate((2, 1, 4), start=1):
        words = tiny(*fixed, f"run.epochs={epochs}", "run.resume=auto", "run.overwrite=false", run="changing")
        result = ranks(number, "engine/train.py", *words)
        assert result.returncode == 0, result.stderr
        assert f"{number} process(es)" in result.stdout
    assert ranks(1, "engine/train.py", *tiny(*fixed, "run.epochs=3", run="alone")).returncode == 0
    changing, alone = (last_row(tmp_path / run) for run in ("changing", "alone"))
    assert [changing["epoch"], alone["epoch"]] == [3, 3]
    for name in ("ep_loss", "val_loss", "online_linacc_test", "rank_eq_eff"):
        assert changing[name] == pytest.approx(alone[name], rel=1e-3, abs=1e-3), name


def test_a_rank_that_dies_is_named_and_ends_the_job(tiny, tmp_path):
    """Within a minute, without a hang; what was saved can be gone on from."""
    run = tmp_path / "run"
    words = tiny("run.epochs=2000", "eval.every=50", "checkpoint.every=2", "run.resume=auto", "run.overwrite=false")
    job = start(2, words)
    wait_for_epochs(run, 4, job)
    (victim,) = (pid for pid in children(job.pid) if environ(pid).get("RANK") == "1")
    os.kill(victim, signal.SIGKILL)
    died = time.monotonic()
    printed = job.communicate(timeout=120)[0]
    assert time.monotonic() - died < 60
    assert job.returncode != 0
    assert "rank      : 1 (local_rank: 1)" in printed.split("Root Cause")[1]
    assert "SIGKILL" in printed or "-9" in printed
    assert not children(job.pid)
    epochs = int(find_checkpoint(run).name.split("-")[1]) + 1
    assert main([*words, f"run.epochs={epochs}", "eval.every=1"]) == 0


OUT_OF_MEMORY = """
import os, sys, torch
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.train import main
step = TrainingStep.step

def failing(self, batch, at):
    if at == 3 and self.train_model and os.environ["RANK"] == "1":
        torch.empty(2**50)
    return step(self, batch, at)

TrainingStep.step = failing
code = main(sys.argv[1:])
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.soak
def test_a_rank_that_fails_says_why_and_is_named(tiny, tmp_path, ranks):
    script = tmp_path / "failing.py"
    script.write_text(OUT_OF_MEMORY)
    result = ranks(2, str(script), *tiny("run.epochs=3"))
    said = result.stdout + result.stderr
    assert said.count("process 1: out of memory with data.batch_size=") == 1
    assert said.count("lost the connection to another process") == 1
    assert 'Traceback (most recent call last):\n  File "engine' not in said
    assert "rank      : 1 (local_rank: 1)" in said.split("Root Cause")[1]
    assert "exitcode  : 4 " in said.split("Root Cause")[1]


@pytest.mark.soak
@pytest.mark.parametrize("told", ["the launcher", "a rank"])
def test_sigterm_to_one_of_two_processes_stops_both(tiny, tmp_path, told, ranks):
    """They leave in the same step, long before the next line of the log; both go on from there."""
    fixed = tiny("run.epochs=20", "run.log_every=1000", "run.overwrite=false", "run.resume=auto", run="cut")
    run, job = tmp_path / "cut", start(2, fixed)
    wait_for_epochs(run, 3, job)
    (second,) = (pid for pid in children(job.pid) if environ(pid).get("RANK") == "1")
    os.kill(job.pid if told == "the launcher" else second, signal.SIGTERM)
    printed = job.communicate(timeout=30)[0]
    assert printed.count("interrupted by SIGTERM: saved ") == 1
    assert not (run / "summary.json").exists()
    again = ranks(2, "engine/train.py", *fixed)
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
    undisturbed = ranks(2, "engine/train.py", *fixed, f"run.dir={tmp_path / 'whole'}")
    assert undisturbed.returncode == 0, undisturbed.stderr
    cut, whole = (find_checkpoint(path) / "model.safetensors" for path in (run, tmp_path / "whole"))
    assert cut.read_bytes() == whole.read_bytes()
    ours, theirs = (read_rows(path / "metrics.jsonl") for path in (run, tmp_path / "whole"))
    assert len(ours) == len(theirs) == 20
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() - {"timing", "z_grad_norm_prediction"}:  # an epoch that was cut is summed in two parts
            # figures that no step of an epoch has logged are null in both
            assert one[name] == (pytest.approx(other[name], rel=1e-6) if other[name] is not None else None), name


def test_processes_ask_each_other_by_the_clock(monkeypatch):
    """Seldom in short steps, and within seconds also where long ones follow; what one was told reaches all."""
    clock, asked = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    class Accelerator:
        device = torch.device("cpu")
        num_processes = 2
        other = 0

        def gather(self, mine):
            asked.append(clock[0])
            return torch.cat([mine, torch.tensor([[float(self.other), 0.0]])])

    accelerator, interrupts = Accelerator(), Interrupts(os.getppid())

    def steps(number, seconds):
        interrupts.new_pace()
        asked.clear()
        for _ in range(number):
            clock[0] += seconds
            interrupts.check_together(accelerator)
        return [after - before for before, after in itertools.pairwise(asked)]

    assert len(steps(10_000, 0.01)) < 100
    assert max(steps(10, 3.0)) <= 3.1
    assert max(steps(1000, 0.1)) <= 2.1
    accelerator.other = signal.SIGTERM
    with pytest.raises(Interrupted):
        steps(10, 1.0)
    assert interrupts.cause == signal.SIGTERM


def start(number: int, words: list[str]) -> subprocess.Popen:
    launch = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={number}", "engine/train.py")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
    return subprocess.Popen([sys.executable, *launch, *words], cwd=ROOT, env=environment, **pipes)


def wait_for_epochs(run: Path, epochs: int, job: subprocess.Popen) -> None:
    end, metrics = time.monotonic() + 300, run / "metrics.jsonl"
    while not metrics.exists() or len(metrics.read_text().splitlines()) < epochs:
        assert time.monotonic() < end
        assert job.poll() is None
        time.sleep(0.02)


def environ(pid: int) -> dict[str, str]:
    content = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(pair.split("=", 1) for pair in content.split("\0") if "=" in pair)


def children(parent: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if f"\nPPid:\t{parent}\n" in status.read_text():
                found.append(int(status.parent.name))
    return found


DIFFERENT = """
import os, sys
from seqjepa.engine.train import main
rank = os.environ["RANK"]
{change}
code = main([*sys.argv[1:], *extra])
sys.stderr.flush()
os._exit(code)
"""


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("extra = ['optim.lr=1e-5'] if rank == '1' else []", "the config"),
        pytest.param(
            "from seqjepa.engine.runtime import provenance\nextra = []\n"
            "if rank == '1': provenance.code_digest = lambda: 'another'",
            "the code",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "from seqjepa.engine.runtime import accelerator as e; extra = []\ne._use_bf16 = lambda *given: rank == '1'",
            "the precision",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "import dataclasses, seqjepa.engine.training.trainer as t; extra, o = [], t.open_loaders\n"
            "t.open_loaders = lambda *given: dataclasses.replace(o(*given), fingerprint=rank)",
            "the data",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "import seqjepa.engine.runs.folder as f; extra = ['run.resume=auto']\n"
            "there = lambda self, say: (self.path.parent / rank / 'checkpoints' / 'epoch-0001', [])\n"
            "f.RunFolder.checkpoint_to_resume = there",
            "the checkpoint",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_ranks_that_differ_are_refused(tiny, tmp_path, change, name, ranks):
    if name == "the checkpoint":  # one process sees an older disk than the other
        for rank, seed in enumerate((42, 43)):
            assert main(tiny("run.epochs=1", f"run.seed={seed}", run=f"{rank}")) == 0
            (state,) = (tmp_path / f"{rank}").glob("checkpoints/epoch-0001/state.json")
            state.write_text(state.read_text().replace('"seed": 43', '"seed": 42'))
            (state.parent / "manifest.json").unlink()
            seal(state.parent)
    script = tmp_path / "different.py"
    script.write_text(DIFFERENT.format(change=change))
    result = ranks(2, str(script), *tiny())
    assert result.returncode != 0
    assert f"error: {name} of process 1 is not that of process 0: all must run the same" in result.stderr
    assert not (tmp_path / "run").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.soak
def test_two_machines_as_the_readme_says(tiny, tmp_path):
    """Two launchers that meet on loopback, each with a process of its own."""
    words = tiny("model.aggregator.dropout=0.0", "optim.lr=1e-4", run="two")
    commands = [
        (
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                "configs/accelerate/multi_node.yaml",
            ),
            *("--num_processes", "2", "--main_process_ip", "127.0.0.1", "--main_process_port", str(port)),
            *("--machine_rank", str(machine), "engine/train.py", *words),
        )
        for port in [free_port()]
        for machine in (0, 1)
    ]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    launchers = [subprocess.Popen(command, cwd=ROOT, **pipes) for command in commands]
    printed = [launcher.communicate(timeout=600)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], printed
    assert "2 process(es)" in printed[0]
    assert main(tiny("model.aggregator.dropout=0.0", "optim.lr=1e-4", run="one")) == 0
    one, two = (last_row(tmp_path / run) for run in ("one", "two"))
    assert two["ep_loss"] == pytest.approx(one["ep_loss"], rel=1e-4)
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-4)


SRUN = """while [[ $1 == --* ]]; do shift; done
for node in 0 1; do SLURM_NODEID=$node "$@" & jobs[$node]=$!; done
wait "${jobs[0]}" && wait "${jobs[1]}"
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of two nodes, whose tools are these scripts."""

    def environment(**scripts: str) -> dict[str, str]:
        scripts = {"scontrol": "echo 127.0.0.1\necho 127.0.0.2\n"} | scripts
        for name, text in scripts.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
            (tmp_path / name).chmod(0o755)
        return os.environ | {
            "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_ID": str(os.getpid()),  # decides the port
            "SLURM_GPUS_ON_NODE": "1",
        }

    return environment


@pytest.mark.parametrize("cores", ["64", None])
def test_the_slurm_script_asks_for_what_the_job_was_given(slurm, cores, tmp_path):
    """Processes for the GPUs of all nodes, the task's cores, and every word as it was given; in any folder."""
    each = 'printf "%s\\n" "$@"\n'
    given = slurm(srun=f'{each}while [[ $1 == --* ]]; do shift; done\nSLURM_NODEID=1 "$@"\n', accelerate=each)
    given |= {"SLURM_GPUS_ON_NODE": "8"} | ({"SLURM_CPUS_PER_TASK": cores} if cores else {})
    words = ["data.root=/a b/größe", "run.name='x  y'", "optim.lr=1e-3"]
    command = ["bash", str(ROOT / "configs/launch/slurm.sh"), *words]
    ended = subprocess.run(command, cwd=tmp_path, env=given, capture_output=True, text=True, check=True)
    lines = ended.stdout.splitlines()
    asked = lines[: lines.index("bash")]
    assert asked == ["--kill-on-bad-exit=0", "--wait=300", *(["--cpus-per-task=64"] if cores else [])]
    launched = lines[len(lines) - lines[::-1].index("launch") - 1 :]
    options = dict(zip(launched[1:13:2], launched[2:13:2], strict=True))
    assert options["--num_machines"] == "2"
    assert options["--num_processes"] == "16"
    assert options["--main_process_ip"] == "127.0.0.1"
    assert options["--machine_rank"] == "1"
    assert Path(options["--config_file"]).read_text() == (ROOT / "configs/accelerate/multi_node.yaml").read_text()
    assert launched[13:] == ["--module", "seqjepa.engine.train", *words, "run.resume=auto"]


@pytest.mark.soak
def test_the_slurm_script_runs(tiny, tmp_path, slurm):
    """With a SLURM that runs both nodes' tasks here; given twice, the second goes on where the first ended."""
    environment = slurm(srun=SRUN)
    for epochs in (1, 2):
        words = tiny(f"run.epochs={epochs}", "run.overwrite=false")
        command = ["bash", "configs/launch/slurm.sh", *words]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "2 process(es)" in result.stdout
    assert "resumed from" in result.stdout
    assert last_row(tmp_path / "run")["epoch"] == 2
