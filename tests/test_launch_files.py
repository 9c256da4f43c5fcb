"""Files that rent machines: their services accept them, and what they run there survives the loss of its machine."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from seqjepa.configs.cli import BAD_INPUT, DIVERGED, DONE, GATE_FAILED, IDLE, MACHINE_FAILED, OUT_OF_TIME
from seqjepa.engine.config import compose

ROOT = Path(__file__).resolve().parent.parent
SKY, DSTACK = ROOT / "configs/launch/sky.yaml", ROOT / "configs/launch/dstack.yml"
CLOUD = ROOT / ".venv-cloud/bin"  # made by `make test-cloud`
CODES = {DONE, GATE_FAILED, BAD_INPUT, DIVERGED, MACHINE_FAILED, OUT_OF_TIME, IDLE, 128 + signal.SIGTERM}
TRIED_AGAIN = {MACHINE_FAILED, 128 + signal.SIGTERM}  # a gate, bad input or divergence would come again


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def environment(path: Path) -> dict[str, str]:
    """What the file sets; None is what the user has to set."""
    given = read(path)
    if path == SKY:
        return {
            name: value if value is None else str(value) for name, value in (given["envs"] | given["secrets"]).items()
        }
    return {name: value if equals else None for name, equals, value in (word.partition("=") for word in given["env"])}


def block(path: Path) -> str:
    """What is run after everything is installed."""
    return read(path)["run"] if path == SKY else read(path)["commands"][-1]


# -- the services


OF_SKYPILOT = """
import json, sys, sky
try:
    task = sky.Task.from_yaml(sys.argv[1])
except ValueError as error:
    sys.exit(str(error))
features = sky.clouds.CloudImplementationFeatures
for each in task.resources:
    needed = each.get_required_cloud_features() | {features.AUTODOWN}
    each.cloud.check_features_are_supported(each, needed)
    said = {"cloud": str(each.cloud), "cards": list(each.accelerators), "spot": features.SPOT_INSTANCE in needed}
    said |= {"autostop": [each.autostop_config.enabled, each.autostop_config.down], "recovery": each.job_recovery}
    print(json.dumps(said))
"""
OF_DSTACK = """
import json, sys, yaml
from dstack._internal.core.errors import ConfigurationError
from dstack._internal.core.models.configurations import parse_run_configuration
given = yaml.safe_load(open(sys.argv[1])) | json.loads(sys.argv[2])
try:
    task = parse_run_configuration(given)
except ConfigurationError as error:
    sys.exit(str(error))
policy = task.utilization_policy
print(json.dumps([policy.min_gpu_utilization, policy.time_window, task.max_duration, [b.value for b in task.backends]]))
"""


def ask(script: str, *words: str, home: Path) -> subprocess.CompletedProcess:
    """Run a script beside the services' own code, which makes folders in the home directory."""
    command, environment = [CLOUD / "python", "-c", script, *words], os.environ | {"HOME": str(home)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.cloud
def test_skypilot_accepts_its_file(tmp_path):
    refused = ask(OF_SKYPILOT, str(SKY), home=tmp_path)
    assert (refused.returncode, "MIRROR" in refused.stderr) == (1, True)
    (tmp_path / "sky.yaml").write_text(SKY.read_text().replace("MIRROR: null", "MIRROR: s3://bucket/runs"))
    accepted = ask(OF_SKYPILOT, str(tmp_path / "sky.yaml"), home=tmp_path)
    assert accepted.returncode == 0, accepted.stderr
    asked = [json.loads(line) for line in accepted.stdout.splitlines()]
    wanted = {(cloud, card) for cloud in ("Vast", "RunPod") for card in ("RTX4090", "RTX3090")}
    assert {(each["cloud"], *each["cards"]) for each in asked} == wanted
    for each in asked:
        assert each["spot"]
        assert each["autostop"] == [True, True]
        assert each["recovery"]["recover_on_exit_codes"] == sorted(TRIED_AGAIN)
        assert "max_restarts_on_errors" not in each["recovery"]  # it counts every other code


@pytest.mark.cloud
def test_dstack_accepts_its_file(tmp_path):
    accepted = ask(OF_DSTACK, str(DSTACK), "{}", home=tmp_path)
    assert accepted.returncode == 0, accepted.stderr
    utilisation, window, duration, backends = json.loads(accepted.stdout)
    assert min(utilisation, window, duration) > 0
    assert backends == ["vastai", "runpod"]
    for wrong, named in (
        ({"max_prise": 0.5}, "max_prise"),
        ({"utilization_policy": {"min_gpu_utilization": 5}}, "time_window"),
    ):
        refused = ask(OF_DSTACK, str(DSTACK), json.dumps(wrong), home=tmp_path)
        assert (refused.returncode, named in refused.stderr) == (1, True)


# -- what the files say


def test_the_codes_that_are_tried_again():
    assert set(read(SKY)["resources"]["job_recovery"]["recover_on_exit_codes"]) == TRIED_AGAIN
    assert "error" not in read(DSTACK)["retry"]["on_events"]  # it knows no codes
    table = (ROOT / "docs/remote.md").read_text().split("| exit code |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert {int(code) for code, *_ in rows if code.isdecimal()} == CODES | {128 + signal.SIGKILL}
    assert {int(code) for code, _, again, _ in rows if again.startswith("yes")} == TRIED_AGAIN
    assert all(again.startswith(("yes", "no")) for _, _, again, _ in rows)


@pytest.mark.parametrize("path", [SKY, DSTACK], ids=lambda path: path.stem)
def test_what_a_file_sets(path):
    given = environment(path)
    assert [name for name, value in given.items() if value is None] == ["MIRROR"]
    compose(given["SEQJEPA_WORDS"].split())
    dearest = read(SKY)["resources"]["max_hourly_cost"] if path == SKY else read(DSTACK)["max_price"]
    assert float(given["PRICE"]) == dearest
    if path == DSTACK:
        hours = re.fullmatch(r"(\d+)h", read(DSTACK)["max_duration"])
        assert float(given["HOURS"]) < int(hours[1])
    assert str(Path.home()) not in path.read_text()


# -- what is run on the machine


@pytest.fixture
def rented(tmp_path, monkeypatch):
    """Start what a file runs, in a session of its own and on a disk of its own, with this script in seqjepa's place."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "disk").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def start(path: Path, script: str = f'exec {sys.executable} -m seqjepa "$@"\n', **given: str) -> subprocess.Popen:
        (tmp_path / "bin/seqjepa").write_text(f"#!/bin/bash\n{script}")
        (tmp_path / "bin/seqjepa").chmod(0o755)
        settings = environment(path) | {"MIRROR": str(tmp_path / "mirror"), "HOME": str(tmp_path)} | given
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        command = ["bash", "-c", block(path)]
        return subprocess.Popen(
            command, cwd=tmp_path / "disk", env=os.environ | settings, start_new_session=True, **pipes
        )

    return start


@pytest.mark.parametrize("path", [SKY, DSTACK], ids=lambda path: path.stem)
def test_the_words_of_the_command(rented, tmp_path, path):
    """Each as it was given, the user's own ones last, so that they decide; keys that are empty are not set."""
    for name in ("eval.lengths=1", "data.root=ab"):  # the words below are patterns of these
        (tmp_path / "disk" / name).touch()
    script = 'printf "%s\\n" "$@"; echo "${HF_TOKEN-unset} ${WANDB_API_KEY-unset}"\n'
    words = "configs/smoke.yaml eval.lengths=[1,3] data.root=a*"
    said, _ = rented(path, script, SEQJEPA_WORDS=words, MIRROR="s3://a b", WANDB_API_KEY="key").communicate(timeout=60)
    first, *lines, keys = said.splitlines()
    assert (first, keys) == ("train", "unset key")
    assert lines[-3:] == words.split()
    given = environment(path)
    ours = {"run.device=cuda", "run.resume=auto", "run.name=auto", "run.mirror=s3://a b", "tracking.wandb=online"}
    assert set(lines[:-3]) == ours | {
        f"run.max_hours={given['HOURS']}",
        f"run.price={given['PRICE']}",
        "run.max_idle=30",
    }
    assert rented(path, script).communicate(timeout=60)[0].splitlines()[-1] == "unset unset"


@pytest.mark.parametrize("code", sorted(CODES))
def test_exit_codes_reach_the_service(rented, code):
    """But a machine failure before anything is saved: SkyPilot would try again without end, at the user's cost."""
    place = "runs/run/checkpoints/epoch-0001"
    save = f"mkdir -p {place}; touch -d tomorrow {place}/manifest.json\n"  # files' clock has ticks of milliseconds
    fetch = f"{save} touch -d @0 {place}/manifest.json\n"
    for path, before in ((SKY, ""), (SKY, fetch), (SKY, save), (DSTACK, "")):
        job = rented(path, f"{before}exit {code}\n")
        said, _ = job.communicate(timeout=60)
        ended = path == SKY and before != save and code == MACHINE_FAILED
        assert job.returncode == (GATE_FAILED if ended else code)
        assert ("not tried again" in said) == ended


@pytest.mark.slow  # test_mirror.py and the test above have its parts
def test_an_empty_machine_goes_on_and_the_results_are_in_the_mirror(tiny, rented, tmp_path):
    lose_machines(1, tiny, rented, tmp_path)


@pytest.mark.soak
def test_twenty_machines_are_lost(tiny, rented, tmp_path, record_property):
    record_property("faults", 20)
    lose_machines(20, tiny, rented, tmp_path)


def lose_machines(number: int, tiny, rented, tmp_path: Path) -> None:
    """Kill what sky.yaml runs, and delete its disk, so often; the mirror then has what an undisturbed run has."""
    from seqjepa.engine.runs.checkpoints import find_checkpoint
    from seqjepa.engine.runs.metrics_file import read_rows
    from seqjepa.engine.train import main

    epochs = f"run.epochs={20 * number}"
    assert main(tiny(epochs, run="whole")) == 0
    words = {"SEQJEPA_WORDS": " ".join(tiny(epochs, "run.overwrite=false", run="disk/run"))}
    there, draw = tmp_path / "mirror/run", random.Random(0)

    def copied() -> set[Path]:
        return set(there.glob("checkpoints/*/manifest.json"))

    for _ in range(number):
        before, job = copied(), rented(SKY, **words)
        deadline = time.monotonic() + 300
        while not copied() - before and job.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.2))
        os.killpg(job.pid, signal.SIGKILL)
        said, _ = job.communicate()
        assert job.returncode == -signal.SIGKILL, said
        assert ("fetched from" in said) == bool(before), said
        shutil.rmtree(tmp_path / "disk")
        (tmp_path / "disk").mkdir()
    job = rented(SKY, **words)
    said, _ = job.communicate(timeout=600)
    assert job.returncode == DONE, said
    assert f"fetched from {there}" in said
    newest, whole = max(copied()).parent, find_checkpoint(tmp_path / "whole")
    assert newest.name == whole.name
    assert find_checkpoint(there) == newest  # the mirror is read as a run
    assert (newest / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    rows, others = (
        [{name: value for name, value in row.items() if name != "timing"} for row in read_rows(path / "metrics.jsonl")]
        for path in (there, tmp_path / "whole")
    )
    assert rows == others
    assert (there / "summary.json").read_bytes() == (tmp_path / "disk/run/summary.json").read_bytes()
