"""Real processes: launchers, signals, several processes, trackers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from seqjepa.engine.train import main

ROOT = Path(__file__).resolve().parents[3]
LAUNCH = (
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    *[
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "engine/train.py",
    ],
)
LONG = ("run.epochs=30", "eval.every=15", "checkpoint.every=10")  # a few seconds


def start(command):
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(command, seconds=600, **environment):
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | environment, timeout=seconds
    )


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0


def weights(run):
    return (run / "checkpoints" / "epoch-0030" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tiny_for_module, folder_of):
    """Weights of an undisturbed run, to compare with."""
    words = tiny_for_module(*LONG)
    assert main(words) == 0
    return weights(folder_of(words))


def test_sigterm_to_the_launcher_alone_saves_and_resumes(tiny, tmp_path, whole, capsys):
    run = tmp_path / "cut"
    launcher = start([*LAUNCH, *tiny(*LONG, run="cut")])
    wait_for(lambda: lines(run / "metrics.jsonl") >= 3)
    launcher.send_signal(signal.SIGTERM)  # it dies without telling its child
    printed = launcher.communicate(timeout=30)[0]  # ends when the child has closed the pipe too
    assert "interrupted by SIGTERM: saved " in printed
    assert list((run / "checkpoints").glob("epoch-*"))
    assert not (run / "summary.json").exists()
    assert main(tiny(*LONG, "run.resume=auto", run="cut")) == 0
    assert "resumed from" in capsys.readouterr().out
    assert weights(run) == whole


def test_ctrl_c_saves_and_resumes(tiny, tmp_path, whole):
    run = tmp_path / "cut"
    process = start([sys.executable, "engine/train.py", *tiny(*LONG, run="cut")])
    wait_for(lambda: lines(run / "metrics.jsonl") >= 2)
    process.send_signal(signal.SIGINT)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 130
    assert "interrupted by SIGINT: saved " in printed
    assert "Traceback" not in printed
    assert main(tiny(*LONG, "run.resume=auto", run="cut")) == 0
    assert weights(run) == whole


def test_exit_codes_of_the_script_and_of_the_launcher(tiny):
    wrong = tiny("optim.lr=fast")
    alone = finish([sys.executable, "engine/train.py", *wrong])
    assert alone.returncode == 2
    assert alone.stderr == "error: override optim.lr=fast: optim.lr = 'fast': must be a number >= 0\n"
    assert finish([*LAUNCH, *wrong]).returncode == 1


def test_two_processes_share_a_run(tiny, tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "engine/train.py",
    ]
    # a rule about all epochs, whose metrics the main process alone has
    gate = ("gates.enforce=true", "gates.rules.digits_affine=[{metric: val_loss, over: epochs, min: 2}]")
    words = tiny("model.aggregator.dropout=0.0", *gate, run="two")
    result = finish([*command, *words], ACCELERATE_USE_CPU="1")
    assert result.returncode == 0, result.stderr
    assert "2 process(es)" in result.stdout
    assert result.stdout.count("gate_pass: True") == 1
    assert main(tiny("model.aggregator.dropout=0.0", run="one")) == 0
    one, two = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("one", "two"))
    for name in ("ep_loss", "val_loss"):  # not to the last bits, which grow at this learning rate
        assert two["final"][name] == pytest.approx(one["final"][name], rel=1e-2)
    assert two["final"].keys() == one["final"].keys()
    folder = tmp_path / "two" / "checkpoints" / "epoch-0002"
    assert {p.name for p in folder.glob("rng-*")} == {"rng-00000.safetensors", "rng-00001.safetensors"}


TWO_RANKS = """
import copy, os, sys, torch
from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.training.loading import open_loaders
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.training.validation import validate

config = compose(sys.argv[1:]).config
accelerator = build_accelerator(config.run, config.optim.accumulate)
loaders = open_loaders(config, accelerator)
torch.manual_seed(0)
training = TrainingStep(config, loaders, accelerator)
seen, untrained = [], copy.deepcopy(training.model)
for step, batch in enumerate(loaders.train.epoch(0)):
    training.step(batch, step)
    untrained(batch.views, batch.actions)
    seen.append(batch.index)
pairs = zip(training.model.encoder.buffers(), untrained.encoder.buffers())
strayed = max((a - b).abs().max().item() for a, b in pairs)
validate(training, loaders.validation).metrics
tensors = [*training.model.state_dict().values(), *training.probes.state_dict().values()]
weights = accelerator.gather(torch.cat([t.double().flatten() for t in tensors])[None])
index = accelerator.gather(torch.cat(seen)[None])
if accelerator.is_main_process:
    shared = set(index[0].tolist()) & set(index[1].tolist())
    print("statistics strayed", strayed)
    print("shared images", len(shared), "largest difference", (weights[0] - weights[1]).abs().max().item())
sys.stdout.flush()
accelerator.wait_for_everyone()
os._exit(0)  # gloo's threads may abort an interpreter that is torn down: not what is tested here
"""


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("optim.accumulate=1",), marks=pytest.mark.slow),
        ("optim.accumulate=2",),
        pytest.param(("run.batch_statistics=process", "optim.lr=0.0", "optim.min_lr=0.0"), marks=pytest.mark.slow),
    ],
)
def test_two_processes_end_with_one_network(tiny, tmp_path, words):
    """Each sees other images: only averaged gradients and batch statistics leave the ranks equal.

    Where they train nothing, and each keeps statistics of its own, these are those of its own images until they are
    averaged.
    """
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    result = finish([*command, *tiny(*words)], ACCELERATE_USE_CPU="1")
    assert result.returncode == 0, result.stderr
    if "optim.lr=0.0" in words:
        assert "statistics strayed 0.0\n" in result.stdout, result.stdout
    assert result.stdout.strip().endswith("shared images 0 largest difference 0.0"), result.stdout


def test_wandb_online_falls_back_when_nobody_answers(tiny, tmp_path):
    environment = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path)}
    words = tiny("tracking.wandb=online", "tracking.init_timeout=3", "run.epochs=1")
    result = finish([sys.executable, "engine/train.py", *words], **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "W&B cannot go online" in result.stdout
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_tensorboard_files_hold_the_metrics(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(tiny("tracking.tensorboard=true")) == 0
    (events,) = (tmp_path / "run" / "tensorboard" / "seqjepa").iterdir()
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    assert "figures/curves" in accumulator.Tags()["images"]
    assert "control/online_r2_test/text_summary" in accumulator.Tags()["tensors"]
    assert "_hparams_/experiment" in accumulator.PluginTagToContent("hparams")
    logged = [event.value for event in accumulator.Scalars("val/online_r2_test")]
    written = [
        json.loads(line)["online_r2_test"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert logged == pytest.approx(written, rel=1e-6)
    assert torch.get_num_threads() == 1  # run.threads
