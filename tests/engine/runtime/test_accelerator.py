"""What the machine and Accelerate's launcher say, and what the config decides."""

import os
import shutil
import subprocess
import sys
import time

import psutil
import pytest
import torch
from accelerate.utils import DynamoBackend

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.engine.runtime.accelerator import build_accelerator, crowded, overruled
from seqjepa.engine.runtime.provenance import PACKAGE, code_digest
from seqjepa.engine.train import main


@pytest.fixture
def accelerator(monkeypatch):
    """An accelerator under environment variables, and what is said of those that the config overrules."""

    def make(words=(), **environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        config = compose(["configs/smoke.yaml", "run.device=cpu", *words]).config
        made = build_accelerator(config.run, config.optim.accumulate)
        return made, overruled(config.run, config.optim.accumulate, made)

    return make


def test_the_config_decides_on_accumulation(accelerator):
    made, said = accelerator(ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert made.gradient_accumulation_steps == 1
    weight = torch.ones((), requires_grad=True)
    made.backward(weight * 3)
    assert weight.grad.item() == 3  # not divided
    assert said == ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4 is not used: optim.accumulate decides, and is 1"]
    _, said = accelerator(["optim.accumulate=4"], ACCELERATE_GRADIENT_ACCUMULATION_STEPS="4")
    assert said == []


def test_the_config_decides_on_the_compiler(accelerator):
    environment = {"BACKEND": "inductor", "MODE": "max-autotune", "USE_FULLGRAPH": "rubbish", "USE_DYNAMIC": "rubbish"}
    made, said = accelerator(**{f"ACCELERATE_DYNAMO_{name}": value for name, value in environment.items()})
    assert made.state.dynamo_plugin.backend == DynamoBackend.NO
    module = torch.nn.Linear(2, 2)
    assert made.prepare_model(module) is module
    assert said == ["ACCELERATE_DYNAMO_BACKEND=inductor is not used: run.compile decides, and is none"]


@pytest.mark.parametrize("asked", ["bf16", "fp16", "fp8"])
def test_the_config_decides_on_the_precision(accelerator, asked):
    made, said = accelerator(["run.precision=fp32"], ACCELERATE_MIXED_PRECISION=asked)
    assert (made.mixed_precision, made.scaler) == ("no", None)
    assert said == [f"ACCELERATE_MIXED_PRECISION={asked} is not used: run.precision decides, and is fp32"]
    _, said = accelerator(["run.precision=bf16"], ACCELERATE_MIXED_PRECISION="no")  # as the launcher says by itself
    assert said == []


@pytest.mark.parametrize("name", ["DEEPSPEED", "SAGEMAKER", "FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_what_cannot_be_honoured_is_refused(accelerator, name, tiny, refused, tmp_path):
    with pytest.raises(InputError, match=f"ACCELERATE_USE_{name}"):
        accelerator(**{f"ACCELERATE_USE_{name}": "true"})
    refused(tiny(), "the launcher asks for ", "is not supported; accelerate launch --multi_gpu")
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_its_config_overrules(tiny, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    assert main(tiny("run.epochs=1")) == 0
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=8 is not used" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "environment", "threads"),
    [
        ([], {"OMP_NUM_THREADS": "3"}, 3),
        (["run.threads=2"], {"OMP_NUM_THREADS": "3"}, 2),
        ([], {"OMP_NUM_THREADS": "3", "ACCELERATE_MIXED_PRECISION": "no"}, None),  # launchers set both by themselves
        ([], {"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "1"}, None),
        ([], {"OMP_NUM_THREADS": "none"}, None),
    ],
)
def test_the_users_number_of_threads_counts(accelerator, words, environment, threads):
    before = torch.get_num_threads()
    try:
        accelerator(words, **environment)
        assert torch.get_num_threads() == (threads or len(os.sched_getaffinity(0)))
    finally:
        torch.set_num_threads(before)


def test_a_busy_machine_is_reported():
    """Threads that wait for each other by spinning are much slower than one where others take the cores."""
    cores = len(os.sched_getaffinity(0))
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2 * cores)]
    try:
        while not all(sum(psutil.Process(other.pid).cpu_times()[:2]) > 0.05 for other in others):
            time.sleep(0.02)
        said = crowded(max(2, cores))
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert said is not None
    assert f"of {cores} cores are free: run.threads=1 can be much faster than" in said
    assert crowded(1) is None


def test_a_change_of_any_module_changes_the_code_digest(tmp_path):
    """On which the cached controls depend: each module in turn, a new one, and one of another name."""
    for part in ("engine", "kernels", "loaders", "configs"):
        shutil.copytree(PACKAGE / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    whole = code_digest(tmp_path)
    assert whole == code_digest()
    modules = sorted(tmp_path.rglob("*.py"))
    assert {"philox.py", "matmul.py", "optimizers.py", "draws.py", "compose.py"} <= {path.name for path in modules}
    for path in modules:
        text = path.read_text()
        path.write_text(text + "# changed\n")
        assert code_digest(tmp_path) != whole, path
        path.write_text(text)
    (tmp_path / "kernels" / "new.py").write_text("")
    assert code_digest(tmp_path) != whole
    (tmp_path / "kernels" / "new.py").unlink()
    (tmp_path / "loaders" / "draws.py").rename(tmp_path / "loaders" / "drawn.py")
    assert code_digest(tmp_path) != whole


def test_a_rank_that_a_launcher_left_over_is_one_line(tiny, run_process):
    result = run_process(sys.executable, "-W", "ignore", "engine/train.py", *tiny(), LOCAL_RANK="0")
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "unset what was left over" in result.stderr


@pytest.mark.parametrize("value", ["x", "0"])
def test_a_number_of_processes_that_is_none_is_one_line(tiny, refused, monkeypatch, value):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", value)
    refused(tiny(), f"LOCAL_WORLD_SIZE={value} in the environment: must be a whole number")


def test_an_empty_rank_is_none(tiny, monkeypatch):
    monkeypatch.setenv("RANK", "")
    assert main(["--print-config"]) == 0
    assert main(tiny("run.epochs=1")) == 0
