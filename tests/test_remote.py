"""What is looked at before a machine costs money: images, mirror, config, and the commands of a file that rents one."""

import http.server
import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from seqjepa.configs.cli import BAD_INPUT, DONE
from seqjepa.engine import rehearsal
from seqjepa.engine.config import compose
from seqjepa.engine.remote import CONTAINER_HOME
from seqjepa.engine.remote import main as remote
from seqjepa.engine.runs.mirror import Mirror
from seqjepa.engine.train import main as train
from seqjepa.loaders.images.base import SPLITS

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
    assert said[3].startswith("cost: 0.5 an hour x 3 h = 1.50 at most")
    assert sorted(tmp_path.rglob("*")) == before


def draw(folder: Path, *names: str, side: int = 32) -> None:
    """Image files, each of another colour."""
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (side, side), (number % 256, number // 256, len(name))).save(folder / name)


@pytest.mark.parametrize("splits", [("train",), SPLITS])
def test_images_of_ones_own_are_rehearsed_with_a_few_of_each_class(tiny, tmp_path, splits):
    """Copies of them, although those of a class may lie in folders of its own, under one name."""
    images, few = tmp_path / "images", tmp_path / "few"
    for split in splits:
        draw(images / split, *(f"{label}/{part}/0.PNG" for label in ("ab", "c d") for part in range(7)))
    config = compose(tiny("data.dataset=imagefolder", "data.name=own", f"data.root={images}")).config
    assert f"data.root={few}" in rehearsal._few(config, rehearsal._open(config).few, few)
    places = [path for path in few.rglob("*") if path.is_dir() and path.parent != few]
    assert sorted(place.relative_to(few).as_posix() for place in places) == [
        f"{s}/{c}" for s in sorted(splits) for c in ("ab", "c d")
    ]
    for place in places:
        files = list(place.iterdir())
        contents = {file.read_bytes() for file in files}
        assert len(contents) == len(files) == rehearsal.BATCH
        assert contents < {file.read_bytes() for file in (images / place.relative_to(few)).rglob("*.PNG")}
        assert {(file.suffix, file.is_symlink()) for file in files} == {(".PNG", False)}


NAMES = [f"{label}/{number}.png" for label in range(10) for number in range(7)]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda images: None, None),
        (lambda images: (images / "train/9/6.png").write_text("no image"), "train/9/6.png: not a readable image"),
        (lambda images: draw(images, "test/3/5.png", side=16), "test/3/5.png: 16x16 pixels, the others have 32x32"),
        (lambda images: draw(images, *(f"train/{name}" for name in NAMES), side=16), "images are 16x16, cifar10 has"),
        (lambda images: draw(images, "train/10/0.png", "test/10/0.png"), "11 classes, cifar10 has 10"),
        (lambda images: (images / "test/9").rename(images / "test/other"), "train alone has 9"),
    ],
    ids=["fine", "broken", "one too small", "too small", "too many classes", "unlike"],
)
def test_images_in_class_folders_are_opened(tiny, tmp_path, capsys, monkeypatch, change, told):
    """As a run opens them, so that what it refuses is told, with the file's own path."""
    for split in SPLITS:
        draw(tmp_path / split, *NAMES)
    change(tmp_path)
    rehearsed = []
    monkeypatch.setattr(rehearsal, "_rehearse", lambda config, few, folder: rehearsed.append(few))
    words = tiny("data.dataset=cifar10", "data.name=own", f"data.root={tmp_path}", "data.download=true", "--check")
    assert train(words) == (DONE if told is None else BAD_INPUT)
    error = capsys.readouterr().err
    assert error.count("error: ") == (told is not None)
    assert told is None or (told in error and f"data.root: {tmp_path}" in error)
    ((few),) = rehearsed
    assert set(few) == (set(SPLITS) if told is None else set())


def test_betons_are_opened(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "train.beton").touch()
    words = tiny("data.dataset=imagefolder", "data.name=own", f"data.root={tmp_path}", "--check")
    for there, told in ((False, "betons need ffcv"), (True, "train.beton.json: missing; `seqjepa write` makes it")):
        monkeypatch.setattr(rehearsal, "has_ffcv", lambda there=there: there)
        assert train(words) == BAD_INPUT
        (line,) = capsys.readouterr().err.splitlines()
        assert told in line


def test_an_error_of_the_system_is_a_line_too(tiny, capsys, monkeypatch):
    def look(*given):
        raise PermissionError(13, "Permission denied", "somewhere")

    monkeypatch.setattr(rehearsal, "_open", look)
    assert train([*tiny("run.price=0.5"), "--check"]) == BAD_INPUT
    printed = capsys.readouterr()
    assert printed.err == "error: images: [Errno 13] Permission denied: 'somewhere'\n"
    assert printed.out.startswith("cost: 0.5 an hour; run.max_hours would limit it")


NEAREST = ("objective.rate.weight=0.01", "objective.rate.scope.kind=nearest")


def test_a_batch_is_as_large_as_a_term_needs(tiny, tmp_path, capsys):
    """So are the images that are made: two batches, or one of each task."""
    assert train([*tiny(*NEAREST), "--check"]) == DONE
    assert "rehearsal: " in capsys.readouterr().out
    for stream, least in (("none", 32), ("classes", 16)):
        words = ["data.dataset=cifar10", "data.name=own", f"stream.kind={stream}"]
        words += ["optim.schedule=constant"] * (stream != "none")
        config, folder = compose(tiny(*NEAREST, *words)).config, tmp_path / stream
        assert "data.batch_size=16" in rehearsal._few(config, {}, folder)
        for split in SPLITS:
            counts = [len(list((folder / split / f"{label:04}").iterdir())) for label in range(10)]
            assert min(counts) * 10 // max(1, config.stream.count) >= least


def test_grids_of_which_a_run_begins_with_a_part_fill_a_batch():
    words = [str(ROOT / "configs/data/arc_programs.yaml"), "data.batch_size=512", "data.train_subset=null"]
    words += ["data.fixed_views=true", "data.curriculum.kind=competence", "data.curriculum.start=0.1"]
    words += ["gates.enforce=false"]
    few = dict(word.split("=") for word in rehearsal._few(compose(words).config, {}, Path()))
    assert int(few["data.train_subset"]) * 0.1 >= 512


def test_what_a_rehearsal_sets_itself_is_not_told(tiny, capsys, monkeypatch):
    monkeypatch.setattr(rehearsal, "SHORT", [*rehearsal.SHORT, "optim.lr=-1"])
    assert train([*tiny(), "--check"]) == BAD_INPUT
    assert capsys.readouterr().err.startswith("error: optim.lr = -1: ")


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

    monkeypatch.setattr(rehearsal, "_rehearse", lambda *given: "left out")
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


def test_the_folder_is_the_one_that_the_services_take(project, tmp_path, capfd, monkeypatch):
    """SkyPilot's workdir, by default none; dstack's first repo, which may say where it goes on the machine."""
    given = ["SEQJEPA_WORDS=--help", "MIRROR=x"]
    monkeypatch.setenv("HOME", str(tmp_path))
    run = f"ls > {tmp_path}/files; exec seqjepa train $SEQJEPA_WORDS"
    (tmp_path / "deep").mkdir()
    dstack = {"commands": [run], "env": ["SEQJEPA_WORDS", "MIRROR"]}
    for task, there in (
        ({"run": run, "envs": {"SEQJEPA_WORDS": None, "MIRROR": None}, "setup": None}, False),
        ({"run": run, "envs": {"SEQJEPA_WORDS": None, "MIRROR": None}, "workdir": "~/project"}, True),
        (dstack, False),
        (dstack | {"repos": ["../project:/seqjepa"]}, True),
        (dstack | {"repos": [{"local_path": "~/project", "path": "/seqjepa"}]}, True),
    ):
        (tmp_path / "deep/task.yaml").write_text(json.dumps(task))
        assert remote(["check", str(tmp_path / "deep/task.yaml"), *given]) == DONE, capfd.readouterr().err
        assert (tmp_path / "files").read_text() == ("new file\n" if there else "")


@pytest.mark.parametrize("name", ["seqjepa", "other"])
def test_the_code_is_that_of_the_copy(project, capfd, name):
    """In a clone of the project a module that git ignores is missing, here as on the machine."""
    for file, text in {
        ".gitignore": "ignored.py",
        "pyproject.toml": f"[project]\nname = '{name}'\n[tool.setuptools]\n"
        "package-dir = {'seqjepa.inner' = 'inner', seqjepa = 'outer'}\n",
        "outer/__init__.py": "",
        "outer/__main__.py": "import seqjepa.inner.kept as k, seqjepa\nprint(seqjepa.__file__, k.__file__)\n"
        "import seqjepa.inner.ignored",
        "inner/kept.py": "",
        "inner/ignored.py": "",
    }.items():
        (project / file).parent.mkdir(exist_ok=True)
        (project / file).write_text(text)
    code = remote(["check", task(project, "exec seqjepa train $SEQJEPA_WORDS"), "MIRROR=x"])
    said = capfd.readouterr()
    if name == "other":  # with the package that is installed
        assert code == DONE
        assert "usage: seqjepa train" in said.out
        return
    assert code == BAD_INPUT
    outer, inner = (Path(word) for word in said.out.split())
    assert (outer.name, inner.name) == ("__init__.py", "kept.py")
    assert outer.parent == inner.parent.parent
    assert not outer.is_relative_to(project)
    assert not outer.is_relative_to(ROOT)
    assert "No module named 'seqjepa.inner.ignored'" in said.err


def test_names_with_spaces(project, tmp_path, monkeypatch):
    place = tmp_path / "it's a place"
    place.mkdir()
    (place / "python").write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    (place / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(place / "python"))
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    assert remote(["check", task(project, "exec seqjepa train $SEQJEPA_WORDS"), "MIRROR=x"]) == DONE


def test_a_secret_comes_from_the_environment(project, tmp_path, capfd, monkeypatch):
    """As both services take it, and is not told where its name is mistyped."""
    file = task(project, f"echo $TOKEN > {tmp_path}/token; exec seqjepa train $SEQJEPA_WORDS")
    monkeypatch.setenv("TOKEN", "hidden")
    assert remote(["check", file, "MIRROR=x", "TOKEN"]) == DONE
    assert (tmp_path / "token").read_text() == "hidden\n"
    monkeypatch.delenv("TOKEN")
    capfd.readouterr()
    for word, told in (("TOKEN", "TOKEN: is not in the environment"), ("TOKN=hidden", "TOKN: must be NAME=VALUE")):
        assert remote(["check", file, "MIRROR=x", word]) == BAD_INPUT
        error = capfd.readouterr().err
        assert error.startswith(f"error: {told}")
        assert "hidden" not in error


def test_without_bash(project, tmp_path, capsys, monkeypatch):
    file = task(project, "exec seqjepa train")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert remote(["check", file, "MIRROR=x"]) == BAD_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "bash" in line


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


DOCKER = """
import json, os, pathlib, subprocess, sys
place, words = pathlib.Path(__file__).parent, sys.argv[1:]
(place / "words").write_text(json.dumps(words))
script = words[-1].replace("/seqjepa", str(place / "inside"))
for word, volume in zip(words, words[1:]):
    if word == "--volume":
        here, there, *_ = volume.split(":")
        script = script.replace(there, here)
sys.exit(subprocess.run(words[-3:-1] + [script]).returncode)
"""


@pytest.fixture
def docker(tmp_path, monkeypatch):
    """A docker that runs a container's commands here, with what is mounted in its place; `seqjepa` is there too."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "docker").write_text(f"#!{sys.executable}{DOCKER}")
    (programs / "seqjepa").write_text('#!/bin/sh\npwd; echo "$TOKEN" "$@"\n')
    for name in ("docker", "seqjepa"):
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return programs


IMAGE = ["--image", "python:3.12"]


def test_in_a_container(project, docker, capfd, monkeypatch):
    """Docker gets the machine's disk, what is mounted on the machine, the variables by name, so that none of them is in
    a list of processes, and all commands of the file."""
    mounts = {"/pictures": ".", "/bucket": "s3://bucket", "~/more": str(project)}
    run = "cat installed && exec seqjepa train $SEQJEPA_WORDS"
    file = task(project, run, setup="set -e\nexport LOST=1\necho set up > installed", file_mounts=mounts)
    given = ["MIRROR=folder", "TOKEN=secret", "SEQJEPA_WORDS=data.root=/pictures/birds"]
    assert remote(["check", file, *given, *IMAGE]) == DONE
    said = capfd.readouterr().out
    place, told = docker / "inside", "secret train data.root=/pictures/birds --check"
    assert f"set up\n{place}\n{told}\n" in said
    assert "MIRROR is a folder of the container's own" in said
    assert (place / "new file").exists()
    assert not (place / "ignored").exists()
    words = json.loads((docker / "words").read_text())
    assert "secret" not in " ".join(words)
    pairs = list(pairwise(words))
    assert ("--env", "TOKEN") in pairs
    volumes = [word for option, word in pairs if option == "--volume"]
    assert volumes[2:] == [f"{project}:/pictures:ro", f"{project}:{CONTAINER_HOME}/more:ro"]
    monkeypatch.setenv("PATH", str(docker.parent))
    assert remote(["check", file, "MIRROR=x", *IMAGE]) == BAD_INPUT
    assert "docker cannot be started" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("run", "code"),
    [
        ("true", 0),
        ("no-such-command", 127),
        ("cd nowhere || exit 7\nseqjepa train", 7),
        ("(seqjepa train)", None),
        ("code=0; seqjepa train || code=$?; exit $code", None),
        ("exec seqjepa train", None),
    ],
)
@pytest.mark.parametrize("image", [[], IMAGE], ids=["here", "in a container"])
def test_whether_training_began(project, docker, capfd, run, code, image):
    file = task(project, run if code is not None else f"SEQJEPA_WORDS=--help\n{run.replace('train', 'train --help')}")
    assert remote(["check", file, "MIRROR=s3://x", *image]) == (DONE if code is None else BAD_INPUT)
    told = f"its commands end with exit code {code} before `seqjepa train` begins\n"
    assert (told in capfd.readouterr().err) == (code is not None)


@pytest.mark.parametrize("kind", ["sky", "dstack"])
def test_a_set_up_that_fails_ends_the_container(project, docker, capfd, kind):
    """With its exit code, and before anything is trained; what may fail on the machine may fail here."""
    file = task(project, "false; exec seqjepa train", setup="false\nexit 9")
    if kind == "dstack":
        commands = ["cd .", "exit 9", "exec seqjepa train"]
        given = {"commands": commands, "env": ["SEQJEPA_WORDS=a"], "repos": ["."]}
        Path(file).write_text(json.dumps(given))
    assert remote(["check", file, *["MIRROR=s3://x"] * (kind == "sky"), *IMAGE]) == BAD_INPUT
    said = capfd.readouterr()
    assert "exit code 9 before" in said.err
    assert "--check" not in said.out


def test_a_docker_that_runs_nothing(project, docker, capfd):
    (docker / "docker").write_text("#!/bin/sh\n")
    assert remote(["check", task(project, "exec seqjepa train"), "MIRROR=s3://x", *IMAGE]) == BAD_INPUT
    assert "exit code 0 before `seqjepa train` begins" in capfd.readouterr().err


def test_what_is_mounted_has_to_be_there(project, docker, capfd):
    """Docker itself would make a folder of root's."""
    file = task(project, "exec seqjepa train", file_mounts={"/pictures": "mistyped"})
    assert remote(["check", file, "MIRROR=s3://x", *IMAGE]) == BAD_INPUT
    assert f"{project}/mistyped, which the machine gets as /pictures, is not there" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        (None, [], "cannot be read (No such file or directory)"),
        ("{", [], "is not YAML"),
        ("[]", [], "is no task; SkyPilot's"),
        ("name: something", [], "is no task; SkyPilot's"),
        ("{run: train, envs: {A: 1}}", [], "has no variable SEQJEPA_WORDS"),
        ("{run: 'true', envs: {SEQJEPA_WORDS: a, MIRROR: null}}", [], "leaves MIRROR to you; MIRROR=VALUE sets it"),
        ("{run: 'true', envs: {SEQJEPA_WORDS: a}}", ["B=1"], "B: must be NAME=VALUE or NAME, with one of"),
        ("{run: 'true', envs: {SEQJEPA_WORDS: a}}", [], "end with exit code 0 before `seqjepa train`"),
        ("{run: [], envs: {SEQJEPA_WORDS: a}}", [], "is no task; SkyPilot's"),
        ("{run: a, workdir: mistyped, envs: {SEQJEPA_WORDS: a}}", [], "mistyped, which the machine gets, is no folder"),
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
