"""Weights & Biases, for real: its files are read back, it dies, its server refuses; keys stay where they are."""

import gzip
import http.server
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import compose
from seqjepa.engine.reports.config import wandb_layer

ROOT = Path(__file__).resolve().parents[3]
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
    # without the service of a run that was tracked in this process, which would be shared
    inherited = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    return inherited | {"HOME": str(tmp_path), "WANDB_API_KEY": KEY} | more


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
    logged = [[row["train/epoch"] for row in history(path) if "train/epoch" in row] for path in files]
    assert logged[2] == list(range(logged[2][0], 41))
    assert 2 < logged[2][0] < 40
    # what W&B's process had not written when it was killed is missing there, and nowhere else
    assert logged[1] == list(range(1, len(logged[1]) + 1))


def test_wandbs_environment_comes_before_the_defaults(tiny, tmp_path):
    """And the command line before it, with a word; what W&B reads by itself it is left to read."""
    variables = {"MODE": "dryrun", "PROJECT": "mine", "ENTITY": "us", "RUN_GROUP": "theirs", "NAME": "größe/1"}
    variables |= {"TAGS": "first,second", "NOTES": "why", "RUN_ID": "other", "DIR": str(tmp_path / "elsewhere")}
    given = environment(tmp_path, **{f"WANDB_{name}": value for name, value in variables.items()})
    words = [word for word in tiny("run.epochs=1", "tracking.group=ours") if not word.startswith("tracking.wandb=")]
    result = subprocess.run([*TRAIN, *words], cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    told = [line for line in result.stdout.splitlines() if "is not used" in line]
    assert told == [
        "WANDB_RUN_GROUP=theirs is not used: tracking.group decides, and is ours",
        "WANDB_RUN_ID is not used: a run has its own id in W&B, and keeps it when it is resumed",
    ]
    assert f"wandb sync {tmp_path}/elsewhere/wandb/offline-run-* uploads the run" in result.stdout
    (path,) = (tmp_path / "elsewhere" / "wandb").glob("offline-run-*/*.wandb")
    (run,) = (record.run for record in records(path) if record.HasField("run"))
    assert (run.project, run.entity, run.run_group, run.display_name) == ("mine", "us", "ours", "größe/1")
    assert (list(run.tags), run.notes) == (["first", "second"], "why")
    assert run.run_id == (tmp_path / "run" / "tracker-id").read_text()
    assert not (tmp_path / "run" / "wandb").exists()


def test_charts_are_grouped_and_the_control_is_a_value_and_no_curve(tiny, tmp_path):
    """In W&B's own file, as it is uploaded; until then its server hears nothing."""
    words = [word for word in tiny("run.epochs=2", "run.log_every=1") if not word.startswith("tracking.wandb=")]
    with socket.create_server(("127.0.0.1", 0)) as server:
        given = environment(tmp_path, WANDB_BASE_URL=f"http://127.0.0.1:{server.getsockname()[1]}")
        result = subprocess.run([*TRAIN, *words], cwd=ROOT, env=given, capture_output=True, text=True)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert result.returncode == 0, result.stdout + result.stderr
    assert "shutdown" not in result.stderr
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    names = {name.partition("/")[0] for row in history(path) for name in row if not name.startswith("_")}
    assert names == {"train", "val", "system", "figures"}
    rows = [row for row in history(path) if "train/epoch" in row]
    written = [json.loads(line) for line in lines(tmp_path / "run" / "metrics.jsonl")]
    for row, line in zip(rows, written, strict=True):
        assert row["val/online_r2_test"] == line["online_r2_test"]
        assert row["train/online_r2_train"] == line["online_r2_train"]
        assert row["system/ep_time"] == line["timing"]["ep_time"]
    said = [update for record in records(path) for update in record.summary.update]
    summary = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in said}
    untrained = json.loads((tmp_path / "run" / "summary.json").read_text())["untrained"]
    assert summary["control/online_r2_test"] == untrained["online_r2_test"]


def test_trackio_has_the_same_values(tiny, tmp_path):
    pytest.importorskip("trackio")
    words = tiny("run.epochs=2", "tracking.trackio=true", "run.name='größe 1'")
    given = environment(tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"))
    result = subprocess.run([*TRAIN, *words], cwd=ROOT, env=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "trackio show --project seqjepa draws the run" in result.stdout
    assert not [line for line in result.stdout.splitlines() if line.startswith("*")]  # Trackio's own
    code = (
        "import json, trackio\nfrom trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = trackio.Api().runs('seqjepa')\n"
        "kept = SQLiteStorage.get_run_config('seqjepa', run.name)\n"
        "print(json.dumps([run.name, SQLiteStorage.get_logs('seqjepa', run.name), kept]))"
    )
    read = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True)
    name, rows, kept = json.loads(read.stdout.splitlines()[-1])
    assert name == f"größe 1 {(tmp_path / 'run' / 'tracker-id').read_text()}"
    written = [json.loads(line)["online_r2_test"] for line in lines(tmp_path / "run" / "metrics.jsonl")]
    assert [row["val/online_r2_test"] for row in rows if "val/online_r2_test" in row] == written
    untrained = json.loads((tmp_path / "run" / "summary.json").read_text())["untrained"]
    assert kept["control/online_r2_test"] == untrained["online_r2_test"]
    assert not [name for row in rows for name in row if name.startswith("control/")]
    assert kept["run.epochs"] == 2


@pytest.mark.slow
def test_a_tracker_that_cannot_start_leaves_the_others(tiny, tmp_path):
    pytest.importorskip("trackio")
    words = tiny("run.epochs=1", "tracking.trackio=true", "tracking.wandb=offline")
    given = environment(tmp_path, TRACKIO_DIR=str(tmp_path / "trackio"), TRACKIO_SPACE_ID="nobody/nothing")
    given |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([*TRAIN, *words], cwd=ROOT, env=given, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Trackio cannot start (" in result.stdout
    assert "trackio show" not in result.stdout
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    assert [row["train/epoch"] for row in history(path) if "train/epoch" in row] == [1]


@pytest.mark.parametrize(
    ("variables", "field", "value"),
    [
        ({"WANDB_MODE": "online"}, "wandb", "online"),
        ({"WANDB_MODE": "dryrun"}, "wandb", "offline"),
        ({"WANDB_MODE": "online", "WANDB_DISABLED": "true"}, "wandb", "disabled"),
        ({"WANDB_DISABLED": "false"}, "wandb", "offline"),
        ({"WANDB_PROJECT": "4711"}, "project", "4711"),
        ({"WANDB_PROJECT": ""}, "project", "seqjepa"),
        ({"WANDB_INIT_TIMEOUT": "90"}, "init_timeout", 90.0),
        ({}, "run_name", None),
    ],
)
def test_what_wandbs_variables_mean(variables, field, value):
    assert getattr(compose(["configs/smoke.yaml"], wandb_layer(variables)).config.tracking, field) == value


LONG, LONGEST = "n" * 129, "n" * 128


@pytest.mark.parametrize(
    ("words", "variables", "parts"),
    [
        ([f"run.name={LONG}"], {}, ["run.name", "longer than the 128 characters", "tracking.run_name"]),
        ([f"tracking.run_name={LONG}"], {}, ["tracking.run_name", "1 to 128 characters"]),
        ([f"tracking.group={LONG}"], {}, ["tracking.group", "1 to 128 characters"]),
        ([f"tracking.project={LONG}"], {}, ["tracking.project", "1 to 128 characters"]),
        (["tracking.entity=a b"], {}, ["tracking.entity", "or a space"]),
        (["tracking.entity=a/b"], {}, ["tracking.entity", "none of them one of /"]),
        (["tracking.entity=''"], {}, ["tracking.entity", "1 to 128 characters"]),
        ([], {"WANDB_PROJECT": "a/b"}, ["W&B's environment: tracking.project = 'a/b'", "none of them one of /"]),
        ([], {"WANDB_ENTITY": LONG}, ["W&B's environment: tracking.entity", "1 to 128 characters"]),
        ([], {"WANDB_NAME": LONG}, ["W&B's environment: tracking.run_name", "1 to 128 characters"]),
        ([], {"WANDB_MODE": "of"}, ["W&B's environment: tracking.wandb = 'of'", "offline|online|disabled"]),
        ([], {"WANDB_INIT_TIMEOUT": "soon"}, ["W&B's environment: tracking.init_timeout", "a number > 0"]),
    ],
)
def test_what_wandbs_server_would_refuse_is_refused_before_anything_is_done(words, variables, parts):
    with pytest.raises(InputError) as error:
        compose(["configs/smoke.yaml", *words], wandb_layer(variables))
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "words",
    [
        [
            f"run.name={LONGEST}",
            f"tracking.entity={LONGEST}",
            f"tracking.group={LONGEST}",
            f"tracking.project={LONGEST}",
        ],
        [f"run.name={LONG}", "tracking.run_name=short"],
        [f"run.name={LONG}", "tracking.wandb=disabled"],
    ],
)
def test_what_wandbs_server_takes_is_taken(words):
    compose(["configs/smoke.yaml", *words])


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


KILLED_TRACKER = """
import os, signal, sys
from pathlib import Path
from seqjepa.engine.training import trainer
from seqjepa.engine.training.step import TrainingStep
from seqjepa.engine.train import main

moment, words = sys.argv[1], sys.argv[2:]

def kill():
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if "wandb-core" in text.splitlines()[0] and f"PPid:\\t{os.getpid()}" in text:
            os.kill(int(status.parent.name), signal.SIGKILL)
            print("killed", flush=True)

step, end = TrainingStep.step, trainer.end_tracking

def deadly_step(self, batch, at):
    if at == 7 and self.train_model:
        kill()
    return step(self, batch, at)

def deadly_end(*args):
    kill()
    end(*args)

if moment == "training":
    TrainingStep.step = deadly_step
else:
    trainer.end_tracking = deadly_end
sys.exit(main(words))
"""


@pytest.mark.parametrize("moment", ["training", pytest.param("closing", marks=pytest.mark.slow)])
def test_a_tracker_that_dies_does_not_take_the_run_along(tiny, tmp_path, moment):
    words = tiny("tracking.wandb=offline", "tracking.tensorboard=true", "run.epochs=4", "run.log_every=2")
    command = [sys.executable, "-c", KILLED_TRACKER, moment, *words]
    result = subprocess.run(command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=300)
    said = result.stdout + result.stderr
    assert "killed" in said
    assert result.returncode == 0, said
    assert said.count("W&B has stopped (") == 1
    assert said.count("has stopped") == 1
    assert "Traceback" not in said
    assert len(lines(tmp_path / "run" / "metrics.jsonl")) == 4
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run/tensorboard/seqjepa")).Reload()
    assert len(board.Scalars("train/ep_loss")) == 4  # the other goes on


class Server(http.server.BaseHTTPRequestHandler):
    """W&B's, acted: what it was sent is in `runs`, by the run's id, under the names of W&B's files."""

    accepts = True
    runs: dict[str, dict[str, list[dict]]]

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer = {"errors": [{"message": "user is not logged in"}]}
        if self.accepts:
            answer = {}
            if self.path == "/graphql":
                answer = {"data": self.ask(json.loads(body))}
            elif self.path.endswith("/file_stream"):
                self.store(self.runs[self.path.split("/")[-2]], json.loads(body))
        body = json.dumps(answer).encode()
        self.send_response(200 if self.accepts else 401)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def ask(self, asked: dict) -> dict:
        kind, run = asked.get("operationName"), asked["variables"].get("name")
        project = {"id": "1", "name": asked["variables"].get("project"), "entity": {"id": "1", "name": "us"}}
        if kind == "RunResumeStatus":
            return {"model": {**project, "bucket": self.state(run) if run in self.runs else None}}
        if kind == "UpsertBucket":
            new = run not in self.runs
            self.runs.setdefault(run, {})
            return {"upsertBucket": {"bucket": {**self.state(run), "project": project}, "inserted": new}}
        if kind == "CreateRunFiles":
            address = f"http://{self.headers['Host']}/files"
            files = [{"name": name, "uploadUrl": f"{address}/{name}"} for name in asked["variables"]["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}

    def state(self, run: str) -> dict:
        found = {"id": run, "name": run, "displayName": run, "config": "{}", "tags": [], "logLineCount": 0}
        for kind in ("history", "events"):
            kept = self.runs[run].get(f"wandb-{kind}.jsonl", [])
            found |= {f"{kind}LineCount": len(kept), f"{kind}Tail": json.dumps([json.dumps(row) for row in kept[-1:]])}
        summary = self.runs[run].get("wandb-summary.json", [{}])
        return found | {"summaryMetrics": json.dumps(summary[-1]), "wandbConfig": json.dumps({"t": 1})}

    @staticmethod
    def store(run: dict, sent: dict) -> None:
        for name, part in sent.get("files", {}).items():
            kept = run.setdefault(name, [])
            kept[part["offset"] :] = [json.loads(line) for line in part["content"]]

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Start W&B's server; returns its address and what it will have been sent."""
    servers = []

    def start(accepts):
        handler = type("Handler", (Server,), {"accepts": accepts, "runs": {}})
        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}", handler.runs

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.soak)])
def test_online_a_restarted_run_goes_on_in_its_charts(tiny, tmp_path, serve, number):
    address, runs = serve(accepts=True)
    run = tmp_path / "run"
    words = tiny("tracking.wandb=online", "run.epochs=30", "run.resume=auto", "run.overwrite=false", "eval.every=5")
    given = environment(tmp_path, WANDB_BASE_URL=address)
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([*TRAIN, *words], cwd=ROOT, env=given, stdout=said, stderr=said)
    end = time.monotonic() + 300
    while len(lines(run / "metrics.jsonl")) < 7:
        assert time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(number)
    assert process.wait(timeout=300) == (143 if number == signal.SIGTERM else -signal.SIGKILL)
    again = subprocess.run([*TRAIN, *words], cwd=ROOT, env=given, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr
    everything = (tmp_path / "said").read_text() + again.stdout + again.stderr
    assert "resumed from" in everything
    for unwanted in ("offline", "WARNING", "Traceback", KEY):
        assert unwanted not in everything
    assert list(runs) == [(run / "tracker-id").read_text()]
    (files,) = runs.values()
    rows = files["wandb-history.jsonl"]
    assert [row["_step"] for row in rows] == sorted({row["_step"] for row in rows})
    logged = [row["train/epoch"] for row in rows if "train/epoch" in row]
    if number == signal.SIGKILL:  # what W&B's process had not sent is missing, and nothing else
        begun = int(re.search(r"resumed from .*: epoch (\d+),", again.stdout)[1])
        assert logged == sorted(set(logged))
        assert set(range(begun, 31)) <= set(logged)
    else:
        assert logged == list(range(1, 31))
    written = {row["epoch"]: row for row in map(json.loads, lines(run / "metrics.jsonl"))}
    for row in rows:
        assert all(name.startswith(("_", "train/", "val/", "system/", "figures/")) for name in row)
        if "val/online_r2_test" in row:
            assert row["val/online_r2_test"] == written[row["train/epoch"]]["online_r2_test"]
    assert rows[-1]["val/online_r2_test"] == written[30]["online_r2_test"]
    untrained = json.loads((run / "summary.json").read_text())["untrained"]
    assert files["wandb-summary.json"][-1]["control/online_r2_test"] == untrained["online_r2_test"]
    assert (
        files["wandb-summary.json"][-1]["verdict/best_epoch"]
        == json.loads((run / "summary.json").read_text())["best_epoch"]
    )
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize("key", [KEY, pytest.param("too-short-" + "c0ffee", marks=pytest.mark.slow)])
def test_a_wrong_key_is_one_line_and_is_never_written(tiny, tmp_path, serve, key):
    """Neither in what is printed, nor in any file of the run; and no .env is read."""
    (tmp_path / ".env").write_text(f"WANDB_API_KEY={KEY}\nSECRET=c0ffee-from-a-file\n")
    words = tiny("tracking.wandb=online", "tracking.init_timeout=10", "run.epochs=1")
    given = environment(tmp_path, WANDB_API_KEY=key, WANDB_BASE_URL=serve(accepts=False)[0], PYTHONPATH=str(ROOT))
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
    assert f"wandb sync {tmp_path}/run/wandb/offline-run-*" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    assert "c0ffee" not in result.stdout + result.stderr
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 5
    for path in written:
        assert b"c0ffee" not in path.read_bytes(), path
