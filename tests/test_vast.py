"""A machine of Vast's destroys itself, however its run ends: Vast's client, against a provider on this machine."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from seqjepa.configs.cli import BAD_INPUT, DIVERGED, DONE, GATE_FAILED, IDLE, OUT_OF_TIME

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "configs/launch/vast.sh"
LONGEST = 4048  # characters of an onstart script, by Vast's documentation

CLOUD = ROOT / ".venv-cloud/bin"  # made by `make test-cloud`
pytestmark = pytest.mark.cloud


class Provider(ThreadingHTTPServer):
    """Has one machine to offer; renting it runs the onstart script, destroying it ends what runs and its disk."""

    def __init__(self, folder: Path, path: str):
        super().__init__(("127.0.0.1", 0), Request)
        self.folder, self.path = folder, path
        self.machines: dict[int, subprocess.Popen] = {}
        self.destroyed: dict[int, str] = {}  # by which key
        self.refusals = 0  # times that it does not destroy what it should
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def rent(self, wanted: dict) -> int:
        number = 1000 + len(self.machines)
        disk = self.folder / f"disk{number}"
        disk.mkdir()
        (disk / "onstart.sh").write_text(wanted["onstart"])
        own = {"CONTAINER_ID": str(number), "CONTAINER_API_KEY": f"key of {number}", "VAST_URL": self.address}
        environment = {"PATH": self.path, "HOME": str(disk), "OMP_NUM_THREADS": "1", **own, **wanted["env"]}
        command = ["bash", str(disk / "onstart.sh")]
        with (disk / "output").open("w") as output:
            self.machines[number] = subprocess.Popen(
                command, cwd=disk, env=environment, stdout=output, stderr=output, start_new_session=True
            )
        return number

    def end(self, number: int) -> None:
        machine = psutil.Process(self.machines[number].pid)
        for process in [machine, *machine.children(recursive=True)]:  # `timeout` makes a group of its own
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.machines[number].wait()

    def destroy(self, number: int, key: str) -> None:
        self.destroyed[number] = key
        self.end(number)
        shutil.rmtree(self.folder / f"disk{number}", ignore_errors=True)


class Request(BaseHTTPRequestHandler):
    """The four questions of Vast's interface that a rental needs."""

    server: Provider

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        given = json.loads(body) if body else {}
        number = int((re.search(r"/(\d+)/?$", self.path.partition("?")[0]) or ["", "0"])[1])
        said: dict = {"success": True}
        if "/bundles" in self.path or "search" in self.path:
            said = {"offers": [{"id": 7, "gpu_name": "RTX 4090", "num_gpus": 1, "dph_total": 0.4}]}
        elif self.command == "PUT" and number == 7:
            said["new_contract"] = self.server.rent(given)
        elif self.command == "DELETE":
            self.server.refusals -= 1
            allowed = self.server.refusals < 0 and key in ("account", f"key of {number}")
            if allowed and number not in self.server.destroyed:
                threading.Timer(0.5, self.server.destroy, (number, key)).start()
            said = {"success": allowed}
        elif "/instances" in self.path:
            alive = sorted(set(self.server.machines) - set(self.server.destroyed))
            said = {"instances": [{"id": number, "actual_status": "running"} for number in alive]}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(said).encode())

    do_GET = do_PUT = do_POST = do_DELETE = answer

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def vast(tmp_path):
    """A provider, whose machines have everything installed, and how its client is called."""
    programs = tmp_path / "programs"
    programs.mkdir()
    python = f'exec {sys.executable} "$@"'
    scripts = {"pip": "exit 0", "uv": "exit 0", "python3": python, "seqjepa": python.replace('"', '-P -m seqjepa "', 1)}
    for name, script in scripts.items():
        (programs / name).write_text(f"#!/bin/bash\n{script}\n")
        (programs / name).chmod(0o755)
    path = f"{programs}:{CLOUD}:{os.environ['PATH']}"
    provider = Provider(tmp_path, path)

    def call(*words: str) -> object:
        environment = {"PATH": path, "HOME": str(tmp_path), "VAST_URL": provider.address, "VAST_API_KEY": "account"}
        command = ["vastai", *words, "--raw"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    yield provider, call
    for number in provider.machines:
        if number not in provider.destroyed:
            provider.end(number)
    provider.shutdown()
    provider.server_close()


def rent(call, **variables: str) -> int:
    """Rent the machine that is offered, as docs/remote.md does; returns its number."""
    offers = call("search", "offers", "gpu_name=RTX_4090 num_gpus=1 reliability>0.98", "-o", "dph")
    options = " ".join(f"-e {name}={shlex.quote(value)}" for name, value in variables.items())
    words = ["--image", "pytorch/pytorch", "--disk", "50", "--ssh", "--onstart", str(FILE), "--env", options]
    return call("create", "instance", str(offers[0]["id"]), *words)["new_contract"]


def test_the_script_is_short_enough():
    assert len(FILE.read_text()) <= LONGEST


ENDS = {
    "done": ([], DONE),
    "a failed gate": (["gates.enforce=true", 'gates.rules={"digits":[{"metric":"ep_loss","min":1e9}]}'], GATE_FAILED),
    "bad input": (["model.encoder.width=-1"], BAD_INPUT),
    "divergence": (["optim.lr=1e30"], DIVERGED),
    "its hours": (["run.epochs=9999", "run.max_hours=0.002"], OUT_OF_TIME),
    "idleness": (["run.epochs=9999", "run.max_idle=1e-4"], IDLE),
    "a variable that is missing": (None, 1),
}


def wait_for_the_end(provider: Provider, number: int) -> None:
    deadline = time.monotonic() + 120
    while number not in provider.destroyed and time.monotonic() < deadline:
        time.sleep(0.2)


def test_the_machine_is_destroyed_after_a_signal_to_all_that_runs(vast, tiny, tmp_path):
    """Then the program that writes the log gets it too."""
    provider, call = vast
    words = " ".join(tiny("run.epochs=9999", "run.overwrite=false"))
    number = rent(call, MIRROR=str(tmp_path / "mirror"), SOURCE="git+https://nowhere", AGAIN="1", SEQJEPA_WORDS=words)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("mirror/run/checkpoints/*/manifest.json")) and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(provider.machines[number].pid, signal.SIGTERM)
    wait_for_the_end(provider, number)
    log = (tmp_path / "mirror/logs" / f"{number}.txt").read_text()
    assert provider.destroyed == {number: f"key of {number}"}, log
    assert "interrupted by SIGTERM: saved " in log
    assert "exit code 143: destroying this machine" in log


@pytest.mark.parametrize("end", ENDS)
def test_the_machine_is_destroyed_after(vast, tiny, tmp_path, end):
    provider, call = vast
    words, code = ENDS[end]
    provider.refusals = 2 if words is None else 0
    variables = {"MIRROR": str(tmp_path / "mirror"), "SOURCE": "git+https://nowhere", "AGAIN": "1"}
    if words is None:
        variables.pop("SOURCE")
    else:
        given = tiny(*words, "run.overwrite=false", run="run")
        variables["SEQJEPA_WORDS"] = " ".join(given)
    number = rent(call, **variables)
    wait_for_the_end(provider, number)
    log = tmp_path / "mirror/logs" / f"{number}.txt"
    said = log.read_text() if log.exists() else ""
    assert provider.destroyed == {number: f"key of {number}"}, said
    assert call("show", "instances") == []
    assert f"exit code {code}: destroying this machine" in said
    assert (tmp_path / "mirror/run/summary.json").exists() == (code in (DONE, GATE_FAILED) and words is not None)
