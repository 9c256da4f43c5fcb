"""Copies of a run at a second place: an empty disk goes on from them, and nothing that is wrong there stops a run."""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from seqjepa.configs.errors import InputError
from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.runs.mirror import Mirror
from seqjepa.engine.train import main

pytestmark = pytest.mark.usefixtures("blank_figures")
ROOT = Path(__file__).resolve().parents[3]
WORDS = ("run.resume=auto", "run.overwrite=false", "run.epochs=4", "checkpoint.keep=2")
WORDS += ("eval.best_metric=ep_loss", "eval.best_mode=max")  # the first epoch is the best, and is to be kept


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr("seqjepa.engine.runs.mirror.WAITS", (0.0, 0.0))


def killed_in_step(number: int, words: list[str]) -> None:
    script = Path(__file__).with_name("test_survival.py")
    command = [sys.executable, "-P", str(script), f"in step {number}", *words]
    assert subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == -signal.SIGKILL


def outcome(run: Path) -> tuple[bytes, list[dict]]:
    """The last weights, and the rows of metrics but for their timing."""
    rows = [{key: value for key, value in row.items() if key != "timing"} for row in read_rows(run / "metrics.jsonl")]
    return (find_checkpoint(run) / "model.safetensors").read_bytes(), rows


@pytest.fixture(scope="module")
def whole(tiny_for_module, folder_of):
    words = tiny_for_module(*WORDS, "run.log_every=1")
    assert main(words) == 0
    return folder_of(words)


@pytest.fixture(scope="module")
def lost(whole, tiny_for_module, tmp_path_factory):
    """The mirror of a run that was killed, and whose disk is gone."""
    bucket = tmp_path_factory.mktemp("lost") / "bucket"
    words = tiny_for_module(*WORDS, "run.log_every=1", f"run.mirror={bucket}", run="lost")
    steps = read_rows(whole / "steps.jsonl", "step")[-1]["step"]
    killed_in_step(3 * steps // 4 + 1, words)
    Mirror(str(bucket), whole.with_name("lost"))._copied()  # what its thread may not have come to
    return bucket


@pytest.mark.parametrize("damaged", [False, True])
def test_an_empty_disk_goes_on_from_the_mirror(tiny, tmp_path, capsys, whole, lost, damaged):
    shutil.copytree(lost, tmp_path / "bucket")
    words = tiny(*WORDS, "run.log_every=1", f"run.mirror={tmp_path / 'bucket'}", run="lost")
    there = tmp_path / "bucket" / "lost" / "checkpoints"
    copied = sorted(path.parent.name for path in there.glob("*/manifest.json"))
    assert len(copied) > 1
    if damaged:
        weights = there / copied[-1] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"{copied[-2 if damaged else -1]} fetched from {tmp_path / 'bucket' / 'lost'}" in said
    assert ("damaged checkpoint passed over" in said) == damaged
    assert outcome(tmp_path / "lost") == outcome(whole)
    # results are at home
    assert (there.parent / "summary.json").read_bytes() == (tmp_path / "lost" / "summary.json").read_bytes()
    assert {path.name for path in there.iterdir()} == {"epoch-0001", "epoch-0003", "epoch-0004", "best"}
    assert (there / "best").read_text() == "epoch-0001"
    newest = find_checkpoint(tmp_path / "lost")
    for file in newest.iterdir():
        assert (there / newest.name / file.name).read_bytes() == file.read_bytes()


def test_a_mirror_that_cannot_be_written_is_one_line(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert main(tiny("run.epochs=3", f"run.mirror={tmp_path / 'file' / 'bucket'}")) == 0
    said = capsys.readouterr().out
    assert said.count("is not written (") == 1
    assert "the run goes on" in said


@pytest.mark.parametrize("address", ["nowhere://bucket", "s3://bucket"])
def test_an_address_that_cannot_be_reached_is_refused_before_training(tiny, capsys, address, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    assert main(tiny(f"run.mirror={address}")) == 2
    assert f"run.mirror: {address}: " in capsys.readouterr().err


def mirror_of_a_run(tmp_path: Path) -> tuple[Mirror, Path]:
    """A mirror, and a checkpoint in the folder of a run."""
    checkpoint = tmp_path / "run" / "checkpoints" / "epoch-0003"
    checkpoint.mkdir(parents=True)
    for name in ("model.safetensors", "manifest.json"):
        (checkpoint / name).write_text(name)
    return Mirror(str(tmp_path / "bucket"), tmp_path / "run"), checkpoint


def test_a_copy_that_ends_between_two_files_is_passed_over(tiny, tmp_path, monkeypatch):
    """Its process is killed, so that nothing of it is cleaned up."""
    assert main(tiny("run.epochs=2")) == 0
    older, newer = sorted((tmp_path / "run/checkpoints").glob("epoch-*"))
    put, left = Mirror._put, 0

    def put_or_die(mirror: Mirror, file: Path, place: str) -> None:
        nonlocal left
        if not left:
            raise KeyboardInterrupt
        left -= 1
        put(mirror, file, place)

    monkeypatch.setattr(Mirror, "_put", put_or_die)
    files = len(list(newer.iterdir()))
    for count in range(files + 1):
        mirror = Mirror(str(tmp_path / f"bucket{count}"), tmp_path / "run")
        left = len(list(older.iterdir()))
        mirror._copy_checkpoint(older)
        left = count
        with contextlib.nullcontext() if count == files else pytest.raises(KeyboardInterrupt):
            mirror._copy_checkpoint(newer)
        said: list[str] = []
        empty = tmp_path / f"disk{count}" / "run"
        Mirror(str(tmp_path / f"bucket{count}"), empty).fetch(said.append)
        whole = newer if count == files else older
        assert [line.partition(" in ")[0] for line in said] == [f"{whole.name} fetched from {mirror.address}"]
        assert [path.name for path in (empty / "checkpoints").iterdir()] == [whole.name]
        for file in whole.iterdir():
            assert (empty / "checkpoints" / whole.name / file.name).read_bytes() == file.read_bytes()


def goes_on_from(address: str, tiny, tmp_path: Path, capsys) -> None:
    """A run is mirrored there; its disk is lost; the same words bring back what it had."""
    words = tiny(*WORDS, f"run.mirror={address}")
    assert main(words) == 0
    before = outcome(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    assert main([*words, "--check"]) == 0
    assert f"mirror: {address}/run can be written and read, and has epoch-0004" in capsys.readouterr().out
    assert main(words) == 0
    assert f"epoch-0004 fetched from {address}/run" in capsys.readouterr().out
    assert outcome(tmp_path / "run") == before


@pytest.mark.cloud
def test_s3(tiny, tmp_path, capsys, monkeypatch):
    """By s3fs, from a server on this machine that answers as S3 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    command = [ROOT / ".venv-cloud/bin/moto_server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    urllib.request.urlopen(address, timeout=5).close()
                    break
                time.sleep(0.1)
            import s3fs

            s3fs.S3FileSystem().mkdir("runs")
            goes_on_from("s3://runs/of/mine", tiny, tmp_path, capsys)
            # a bucket that is not there is found out before, and is no reason for a run to fail
            assert main([*tiny("run.mirror=s3://nothing"), "--check"]) == 2
            assert "error: override run.mirror=s3://nothing: run.mirror: " in capsys.readouterr().err
        finally:
            server.terminate()


def test_a_full_mirror_is_one_line(tiny, tmp_path, capsys):
    """The device gives the system's own error."""
    (tmp_path / "bucket/run").mkdir(parents=True)
    (tmp_path / "bucket/run/metrics.jsonl.new").symlink_to("/dev/full")
    assert main(tiny("run.epochs=3", f"run.mirror={tmp_path / 'bucket'}")) == 0
    said = capsys.readouterr().out
    assert said.count("No space left on device") == 1
    assert "the run goes on" in said


def test_a_slow_mirror_holds_nothing_up(tmp_path, monkeypatch):
    mirror, _checkpoint = mirror_of_a_run(tmp_path)
    going_on = threading.Event()
    monkeypatch.setattr(mirror, "_put", lambda file, place: going_on.wait(60))
    began = time.monotonic()
    mirror.copy()
    mirror.finish(seconds=0.2)
    assert time.monotonic() - began < 30
    assert ["not everything is copied" in line for line in mirror.lines] == [True]
    going_on.set()


def test_a_mirror_that_loses_bytes_is_found_out(tmp_path, monkeypatch):
    mirror, _checkpoint = mirror_of_a_run(tmp_path)
    monkeypatch.setattr(shutil, "copyfileobj", lambda source, target, size: target.write(source.read()[:-1]))
    mirror.copy()
    mirror.finish(seconds=1)
    assert len(mirror.lines) == 2
    assert "is not written (" in mirror.lines[0]
    assert "not everything is copied" in mirror.lines[1]
    assert "has 16 of 17 bytes" in mirror.lines[0]
    assert not (tmp_path / "bucket" / "run" / "checkpoints" / "epoch-0003" / "manifest.json").exists()


def test_the_last_copy_is_tried_again(tmp_path, monkeypatch):
    mirror, checkpoint = mirror_of_a_run(tmp_path)
    put, failures = mirror._put, [OSError("503"), OSError("503")]

    def put_later(file: Path, place: str) -> None:
        if failures:
            raise failures.pop()
        put(file, place)

    monkeypatch.setattr(mirror, "_put", put_later)
    mirror.copy()
    mirror.finish(seconds=60)
    there = tmp_path / "bucket/run/checkpoints" / checkpoint.name
    assert {path.name for path in there.iterdir()} == {path.name for path in checkpoint.iterdir()}
    assert [line.partition(" is ")[2] for line in mirror.lines] == [
        "not written (503); the run goes on",
        "written again",
    ]


def test_the_best_checkpoint_is_copied_however_many_have_come_since(tmp_path):
    mirror, checkpoint = mirror_of_a_run(tmp_path)
    best = checkpoint.with_name("epoch-0001")
    shutil.copytree(checkpoint, best)
    (checkpoint.parent / "best").symlink_to(best.name)
    mirror.copy()
    mirror.finish(seconds=60)
    there = tmp_path / "bucket/run/checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["best", "epoch-0001", "epoch-0003"]
    assert (there / "best").read_text() == "epoch-0001"


@pytest.fixture
def mirrored(tiny, tmp_path):
    """A mirror of a run of two epochs, and the folder of a run on an empty disk."""
    assert main(tiny("run.epochs=2")) == 0
    assert Mirror(str(tmp_path / "bucket"), tmp_path / "run")._copied()
    empty = tmp_path / "disk/run"
    empty.mkdir(parents=True)
    return Mirror(str(tmp_path / "bucket"), empty), empty


def test_a_mirror_that_answers_late_is_waited_for(mirrored, monkeypatch):
    mirror, empty = mirrored
    listing, failures, said = mirror.files.ls, [OSError("503"), OSError("503")], []

    def list_later(*args, **options):
        if failures:
            raise failures.pop()
        return listing(*args, **options)

    monkeypatch.setattr(mirror.files, "ls", list_later)
    mirror.fetch(said.append)
    assert [line.partition(" from ")[0] for line in said] == ["epoch-0002 fetched"]
    assert find_checkpoint(empty).name == "epoch-0002"


def test_what_could_not_be_read_is_not_written_over(mirrored, tmp_path, monkeypatch):
    """The run begins anew; the mirror's records stay with its checkpoint until the run has come further."""
    mirror, empty = mirrored
    before = (tmp_path / "bucket/run/metrics.jsonl").read_bytes()
    with monkeypatch.context() as broken:
        broken.setattr(mirror.files, "ls", lambda *args, **options: 1 / 0)
        said: list[str] = []
        mirror.fetch(said.append)
    assert len(said) == 1
    assert "cannot be read" in said[0]
    (empty / "metrics.jsonl").write_text("{}")
    for name, copied in (("epoch-0001", False), ("epoch-0003", True)):
        shutil.copytree(tmp_path / "run/checkpoints/epoch-0002", empty / "checkpoints" / name)
        assert mirror._copied()
        assert ((tmp_path / "bucket/run/metrics.jsonl").read_bytes() == before) == (not copied)
        assert (tmp_path / "bucket/run/checkpoints" / name).exists() == copied
    assert ["nothing is copied before the run is past it" in line for line in mirror.lines] == [True]


def test_the_newest_checkpoint_appears_last(mirrored, monkeypatch):
    """With it the next start would think that it has everything."""
    mirror, empty = mirrored

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(mirror.files, "cat_file", die)
    with pytest.raises(KeyboardInterrupt):
        mirror.fetch(print)
    assert find_checkpoint(empty) is None


def test_later_checkpoints_of_the_mirror_are_not_deleted(tmp_path):
    """They are of a run that this one did not go on from: its mirror could not be read, for example."""
    mirror, _checkpoint = mirror_of_a_run(tmp_path)
    for name in ("epoch-0001", "epoch-0007"):
        (tmp_path / "bucket" / "run" / "checkpoints" / name).mkdir(parents=True)
    mirror.copy()
    mirror.finish(seconds=60)
    assert mirror.lines == []
    there = tmp_path / "bucket" / "run" / "checkpoints"
    assert sorted(path.name for path in there.iterdir()) == ["epoch-0003", "epoch-0007"]


def test_a_run_ends_when_its_hours_are_over_and_tells_what_it_cost(tiny, tmp_path, capsys):
    bucket = f"run.mirror={tmp_path / 'bucket'}"
    assert main(tiny(*WORDS, bucket, "run.max_hours=1e-9", "run.price=3600")) == 5
    said = capsys.readouterr().out
    assert "run.max_hours=1e-09 is over: saved " in said
    saved = find_checkpoint(tmp_path / "run")
    state = json.loads((saved / "state.json").read_text())
    assert (tmp_path / "bucket" / "run" / "checkpoints" / saved.name / "manifest.json").exists()
    assert main(tiny(*WORDS, bucket, "run.max_hours=1", "run.price=3600")) == 0
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    costs = [row["timing"]["cost"] for row in rows]
    assert costs == sorted(costs)
    assert all(row["timing"]["cost_expected"] >= row["timing"]["cost"] for row in rows)
    # at 3600 an hour, a second costs one
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # what the first start paid for, without an epoch, is in it too
    assert state["whole_seconds"] > state["seconds"]
    assert costs[0] > state["whole_seconds"]
    assert summary["timing"]["cost"] >= max(summary["timing"]["seconds"], costs[-1])
    assert "cost " in capsys.readouterr().out


def test_no_kind_of_address(tmp_path):
    with pytest.raises(InputError, match="nowhere"):
        Mirror("nowhere://bucket", tmp_path / "run")
