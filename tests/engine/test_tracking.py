"""Weights & Biases, for real: its files are read back, it dies, its server refuses; keys stay where they are."""

import http.server
import json
import os
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

ROOT = Path(__file__).resolve().parents[2]
TRAIN = (sys.executable, "engine/train.py")
KEY = "c0ffee" + "0" * 28 + "c0ffee"  # of 40 characters, as a real one
BLOCK = 32768  # of a .wandb file: LevelDB's log format, after a header of 7 bytes


def records(path: Path):
    """The records of a .wandb file, as far as it was written."""
    content, position, parts = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:  # too little for a header: zeros
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        if kind == 0:
            return
        parts += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def history(path: Path) -> list[dict]:
    """What was logged, with its step."""
    found = [record.history for record in records(path) if record.HasField("history")]
    return [{item.key or item.nested_key[0]: json.loads(item.value_json) for item in entry.item} for entry in found]


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return os.environ | {"HOME": str(tmp_path), "WANDB_API_KEY": KEY} | more


@pytest.mark.soak
def test_offline_folders_of_one_run_are_one_run(tiny, tmp_path):
    """Killed before anything was saved, killed later, and ended: three folders of one id."""
    run = tmp_path / "run"
    words = tiny("tracking.wandb=offline", "run.epochs=40", "run.resume=auto", "run.overwrite=false", "run.log_every=5")
    for epochs in (0, 3):
        process = subprocess.Popen(
            [*TRAIN, *words], cwd=ROOT, env=environment(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + 300
        while not list((run / "wandb").glob("offline-run-*/*.wandb")) or len(lines(run / "metrics.jsonl")) < epochs:
            assert time.monotonic() < end
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert subprocess.run([*TRAIN, *words], cwd=ROOT, env=environment(tmp_path), capture_output=True).returncode == 0
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3
    ids = {record.run.run_id for path in files for record in records(path) if record.HasField("run")}
    assert ids == {(run / "tracker-id").read_text()}
    logged = [[row["epoch"] for row in history(path) if "epoch" in row] for path in files]
    assert logged[2] == list(range(logged[2][0], 41))
    assert 2 < logged[2][0] < 40
    # what W&B's process had not written when it was killed is missing there, and nowhere else
    assert logged[1] == list(range(1, len(logged[1]) + 1))


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


KILLED_TRACKER = """
import os, signal, sys
from pathlib import Path
from seqjepa.engine.learner import Learner
from seqjepa.engine.train import main

original = Learner.step

def step(self, batch, at):
    if at == 7 and self.train_model:
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                text = status.read_text()
            except OSError:
                continue
            if "wandb-core" in text.splitlines()[0] and f"PPid:\\t{os.getpid()}" in text:
                os.kill(int(status.parent.name), signal.SIGKILL)
                print("killed", flush=True)
    return original(self, batch, at)

Learner.step = step
sys.exit(main(sys.argv[1:]))
"""


def test_a_tracker_that_dies_does_not_take_the_run_along(tiny, tmp_path):
    words = tiny("tracking.wandb=offline", "run.epochs=4", "run.log_every=2")
    command = [sys.executable, "-c", KILLED_TRACKER, *words]
    result = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    said = result.stdout + result.stderr
    assert "killed" in said
    assert result.returncode == 0, said
    assert said.count("tracking has stopped (") == 1
    assert "Traceback" not in said
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 4


@pytest.fixture
def refusing_server():
    """Says to everything that the key is wrong."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = b'{"errors": [{"message": "user is not logged in"}]}'
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("key", [KEY, "too-short-" + "c0ffee"])
def test_a_wrong_key_is_one_line_and_is_never_written(tiny, tmp_path, refusing_server, key):
    """Neither in what is printed, nor in any file of the run; and no .env is read."""
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={KEY}\nSECRET=c0ffee-from-a-file\n")
    words = tiny("tracking.wandb=online", "tracking.init_timeout=10", "run.epochs=1")
    given = environment(tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL=refusing_server, PYTHONPATH=str(ROOT))
    result = subprocess.run(
        [sys.executable, str(ROOT / "engine" / "train.py"), *words],
        cwd=tmp_path,
        env=given,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("W&B cannot go online (") == 1
    assert "Traceback" not in result.stdout + result.stderr
    assert "c0ffee" not in result.stdout + result.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        assert b"c0ffee" not in path.read_bytes(), path
