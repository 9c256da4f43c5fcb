"""What is looked at before a machine costs money: images, mirror, config, and the commands of a file that rents one."""

import http.server
import json
import os
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from seqjepa.configs.cli import BAD_INPUT, DONE
from seqjepa.engine.remote import main as remote
from seqjepa.engine.runs.mirror import Mirror
from seqjepa.engine.train import main as train

ROOT = Path(__file__).resolve().parent.parent
SKY, DSTACK = ROOT / "configs/launch/sky.yaml", ROOT / "configs/launch/dstack.yml"


# -- seqjepa train --check


def test_a_run_that_would_work(tiny, tmp_path, capsys):
    words = tiny(f"run.mirror={tmp_path / 'mirror'}", "run.device=cuda", "run.max_hours=3", "run.price=0.5")
    checkpoint = tmp_path / "mirror/run/checkpoints/epoch-0003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    (checkpoint.with_name("epoch-0004")).mkdir()  # not whole
    before = sorted(tmp_path.rglob("*"))
    assert train([*words, "--check"]) == DONE
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in said] == ["images", "mirror", "rehearsal", "cost"]
    assert said[1].endswith("has epoch-0003")
    assert "at most 3 h x 0.5 = 1.50" in said[3]
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("split", [("train",), ("train", "test")])
def test_images_of_ones_own_are_rehearsed_with_a_few_of_each_class(tiny, tmp_path, capsys, split):
    from seqjepa.engine.rehearsal import BATCH, _link
    from seqjepa.loaders.images import find_dataset
    from seqjepa.loaders.images.sources import find_layout

    for part in split:
        for label in ("ab", "c d"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for number in range(7):
                (tmp_path / "images" / part / label / f"{number}.png").touch()
    layout = find_layout(find_dataset("imagefolder"), str(tmp_path / "images"))
    _link(tmp_path / "few", layout)
    linked = [path for path in (tmp_path / "few").rglob("*") if path.is_symlink()]
    assert len(linked) == len(split) * 2 * BATCH
    for link in linked:
        assert link.resolve() == tmp_path / "images" / link.relative_to(tmp_path / "few")


def test_everything_that_is_wrong_is_told_at_once(tiny, tmp_path, capsys):
    """The images, the mirror, and a setting of which only a run finds out that it does not fit."""
    (tmp_path / "file").write_text("no folder")
    words = ["data.dataset=cifar10", f"data.root={tmp_path / 'nothing'}", "data.name=cifar10_affine"]
    words += ["model.encoder.kind=timm", "model.encoder.name=vit_tiny_patch16_224", f"run.mirror={tmp_path / 'file'}"]
    plain = [word for word in tiny() if not word.startswith("model.encoder.")]
    assert train([*plain, *words, "--check"]) == BAD_INPUT
    said = capsys.readouterr()
    told = said.err.splitlines()
    assert [line.partition(":")[0] for line in told] == ["error"] * len(told)
    for part in ("data.root: ", "run.mirror: ", "model.encoder.input_size: vit_tiny_patch16_224"):
        assert sum(part in line for line in told) == 1, told
    assert "rehearsal:" not in said.out


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200 if self.path == "/there" else 404)
        self.end_headers()

    def log_message(self, *args):
        pass


def test_images_that_are_still_to_be_downloaded(tiny, tmp_path, capsys, monkeypatch):
    from torchvision.datasets import CIFAR10, MNIST

    from seqjepa.engine import rehearsal

    monkeypatch.setattr(rehearsal, "_rehearse", lambda config, folder: "left out")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/"
        words = tiny("data.dataset=cifar10", "data.name=cifar10_affine", f"data.root={tmp_path}")
        for path, code in (("there", DONE), ("gone", BAD_INPUT)):
            monkeypatch.setattr(CIFAR10, "url", address + path)
            assert train([*words, "data.download=true", "--check"]) == code
            said = capsys.readouterr()
            assert address + path in (said.out if code == DONE else said.err)
        monkeypatch.setattr(CIFAR10, "url", address + "there")
        assert train([*words, "--check"]) == BAD_INPUT  # it may not be downloaded
        assert "data.download=true fetches it" in capsys.readouterr().err
        # any of a data set's mirrors will do
        monkeypatch.setattr(MNIST, "mirrors", [address + "gone/", address])
        monkeypatch.setattr(MNIST, "resources", [("there", "")])
        words = tiny("data.dataset=mnist", "data.name=mnist_affine", f"data.root={tmp_path}", "data.download=true")
        assert train([*words, "--check"]) == DONE
        assert f"{address}there has it" in capsys.readouterr().out
        server.shutdown()


def test_a_mirror_that_forgets(tmp_path, monkeypatch):
    from seqjepa.configs.errors import InputError

    mirror = Mirror(str(tmp_path / "bucket"), tmp_path / "run")
    monkeypatch.setattr(type(mirror.files), "cat_file", lambda *args, **kwargs: b"something else")
    with pytest.raises(InputError, match="does not give back what was written"):
        mirror.try_out()


# -- seqjepa remote check


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A checkout with a file that a machine gets, and one that it does not get."""
    folder = tmp_path / "project"
    folder.mkdir()
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    for name, text in {".gitignore": "ignored", "ignored": "", "new file": ""}.items():
        (folder / name).write_text(text)
    monkeypatch.chdir(folder)
    return folder


def task(folder: Path, run: str, **more: object) -> str:
    """A task of SkyPilot's in this folder."""
    given = {"workdir": ".", "envs": {"SEQJEPA_WORDS": "--help", "MIRROR": None}, "secrets": {"TOKEN": ""}, "run": run}
    (folder / "task.yaml").write_text(json.dumps(given | more))
    return str(folder / "task.yaml")


def test_commands_run_as_on_the_machine(project, tmp_path, capfd, monkeypatch):
    """On a copy of what git does not ignore, with nothing of this machine's own that could help."""
    monkeypatch.setenv("HF_TOKEN", "of this machine")
    run = f"printenv > {tmp_path / 'variables'}; ls > {tmp_path / 'files'}; pwd; exec seqjepa train $SEQJEPA_WORDS\n"
    assert remote(["check", task(project, run), "MIRROR=s3://bucket", "TOKEN=given"]) == DONE
    said = capfd.readouterr().out
    assert "usage: seqjepa train" in said
    assert "task.yaml: all that can be known from here is in order" in said
    variables = dict(line.split("=", 1) for line in (tmp_path / "variables").read_text().splitlines())
    assert (variables["MIRROR"], variables["TOKEN"]) == ("s3://bucket", "given")
    assert variables["SEQJEPA_WORDS"].split() == ["--help", "--check"]
    assert "HF_TOKEN" not in variables
    assert variables["HOME"] != os.environ["HOME"]
    assert (tmp_path / "files").read_text().splitlines() == ["new file", "task.yaml"]


def test_images_that_are_mounted_are_looked_for_where_they_are(project, capfd):
    mounts = {"/images": "pictures", "/bucket": {"source": "s3://bucket"}}
    run = "echo $SEQJEPA_WORDS; SEQJEPA_WORDS=--help; exec seqjepa train $SEQJEPA_WORDS"
    given = ["MIRROR=x", "SEQJEPA_WORDS=data.root=/images/birds"]
    assert remote(["check", task(project, run, file_mounts=mounts), *given]) == DONE
    assert capfd.readouterr().out.startswith(f"data.root={project}/pictures/birds --check\n")


@pytest.mark.parametrize("path", [SKY, DSTACK], ids=["sky", "dstack"])
def test_the_projects_own_files(path, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = f"SEQJEPA_WORDS={' '.join(tiny())} model.encoder.width=-1"
    assert remote(["check", str(path), f"MIRROR={tmp_path / 'mirror'}", words]) == BAD_INPUT
    assert "model.encoder.width = -1: must be" in capfd.readouterr().err


@pytest.mark.slow  # its parts are tested above
@pytest.mark.parametrize("path", [SKY, DSTACK], ids=["sky", "dstack"])
def test_a_rehearsal_of_the_projects_own_files(path, tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert remote(["check", str(path), f"MIRROR={tmp_path / 'mirror'}", f"SEQJEPA_WORDS={' '.join(tiny())}"]) == DONE
    assert "rehearsal: " in capfd.readouterr().out


def test_in_a_container(project, tmp_path, monkeypatch):
    """Docker gets the machine's disk, the variables by name, so that none of them is in a list of processes, and all
    commands of the file."""
    (tmp_path / "docker").write_text(
        f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/words; echo $TOKEN > {tmp_path}/token\n'
    )
    (tmp_path / "docker").chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file = task(project, "exec seqjepa train", setup="pip install here")
    assert remote(["check", file, "MIRROR=x", "TOKEN=secret", "--image", "python:3.12"]) == DONE
    words = (tmp_path / "words").read_text()
    assert (tmp_path / "token").read_text() == "secret\n"
    assert "secret" not in words
    for part in ("--env\nTOKEN\n", "python:3.12\nbash\n", "pip install here\nexec seqjepa train"):
        assert part in words
    (tmp_path / "docker").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert remote(["check", file, "MIRROR=x", "--image", "python:3.12"]) == BAD_INPUT


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        (None, [], "cannot be read (No such file or directory)"),
        ("{", [], "is not YAML"),
        ("[]", [], "is no task; SkyPilot's"),
        ("name: something", [], "is no task; SkyPilot's"),
        ("{run: train, envs: {A: 1}}", [], "has no variable SEQJEPA_WORDS"),
        ("{run: 'true', envs: {SEQJEPA_WORDS: a, MIRROR: null}}", [], "leaves MIRROR to you; MIRROR=VALUE sets it"),
        ("{run: 'true', envs: {SEQJEPA_WORDS: a}}", ["B=1"], "B=1: must be NAME=VALUE, with one of"),
        ("{run: 'true', envs: {SEQJEPA_WORDS: a}}", [], "its commands end before `seqjepa train` begins"),
        ("{commands: ['true'], env: [SEQJEPA_WORDS], repos: [.]}", [], "leaves SEQJEPA_WORDS to you"),
    ],
)
def test_files_of_which_nothing_can_be_said(tmp_path, capsys, monkeypatch, text, words, told):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        Path("file.yaml").write_text(text)
    assert remote(["check", "file.yaml", *words]) == BAD_INPUT
    line = capsys.readouterr().err
    assert line.startswith("error: ")
    assert line.count("\n") == 1
    assert told in line
