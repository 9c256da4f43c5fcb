"""What commands say reaches any console, and a reader may leave."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from seqjepa.engine.reports.console import Reporter

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "engine/train.py",
    "engine/evaluate.py",
    "engine/compare.py",
    "engine/export.py",
    "engine/remote.py",
    "loaders/show.py",
    "loaders/write.py",
)
ASCII = os.environ | {"PYTHONIOENCODING": "ascii"}
SPEAK = """
import sys
from seqjepa.configs.console import open_console
open_console()
for number in range(int(sys.argv[1])):
    print(number, 'größe 大 \\udcff')
print('größe', file=sys.stderr)
"""


def speak(lines: int, stdout=subprocess.PIPE, unbuffered: str = "", **environment: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered} | environment
    command = [sys.executable, "-c", SPEAK, str(lines)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, timeout=60)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", rb"gr\xf6\xdfe \u5927 \udcff"),
        ("latin-1", b"gr\xf6\xdfe \\u5927 \\udcff"),
        ("utf-8", "größe 大 \\udcff".encode()),
    ],
)
def test_what_an_encoding_lacks_is_escaped(encoding, shown):
    result = speak(1, PYTHONIOENCODING=encoding)
    assert result.returncode == 0
    assert result.stdout == b"0 " + shown + b"\n"
    assert result.stderr == shown.split()[0] + b"\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_reader_that_leaves_is_no_error(lines, unbuffered, left):
    result = speak(lines, left, unbuffered, PYTHONIOENCODING="utf-8")
    assert (result.returncode, result.stderr) == (0, "größe\n".encode())


def test_nothing_takes_the_place_of_a_closed_stream(tmp_path):
    """What C code says there would be written into a checkpoint."""
    path = tmp_path / "file"
    script = f"""
import os
from seqjepa.configs.console import open_console
open_console()
with open({str(path)!r}, "w") as file:
    assert file.fileno() > 2
    print("said")
    os.write(1, b"noise")
    os.write(2, b"noise")
"""
    closing = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    assert subprocess.run([*closing, sys.executable, "-c", script], timeout=60).returncode == 0
    assert path.read_bytes() == b""


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_full_disk_is_said_once_and_no_error(lines, unbuffered):
    with open("/dev/full", "wb") as full:
        result = speak(lines, full, unbuffered, PYTHONIOENCODING="utf-8")
    assert result.returncode == 0
    assert sorted(result.stderr.decode().splitlines()) == ["größe", "output is lost: No space left on device"]


def test_a_terminal_that_is_gone_is_no_error():
    reader, terminal = os.openpty()
    os.close(reader)
    try:
        result = speak(1, terminal, PYTHONIOENCODING="utf-8")
    finally:
        os.close(terminal)
    assert result.returncode == 0
    assert sorted(result.stderr.decode().splitlines()) == ["größe", "output is lost: Input/output error"]


@pytest.mark.parametrize("words", [["train", "--help"], ["train", "--print-config"], ["train", "optim.lr=x"]])
def test_exit_codes_do_not_depend_on_the_disk(words):
    command = [sys.executable, "-m", f"seqjepa.engine.{words[0]}", *words[1:]]
    codes = []
    for path in (os.devnull, "/dev/full"):
        with open(path, "wb") as file:
            codes.append(subprocess.run(command, stdout=file, stderr=file, timeout=60).returncode)
    assert codes == [2 if "optim.lr=x" in words else 0] * 2


@pytest.fixture
def left():
    """The writing end of a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_for_any_console_and_any_reader(command, left):
    """So of every command: each is a script that opens the console before it prints anything."""
    scripts = {f"{path.parent.name}/{path.name}" for path in ROOT.glob("[el]*/*.py") if "__main__" in path.read_text()}
    assert scripts == set(COMMANDS)
    module = f"seqjepa.{command.removesuffix('.py').replace('/', '.')}"
    words = [sys.executable, "-m", module, "--help"]
    result = subprocess.run(words, stdout=left, stderr=subprocess.PIPE, env=ASCII, timeout=300)
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_imports_first_is_light(command):
    """Signals that arrive before its main function has begun are not handled, so that must be soon."""
    module = f"seqjepa.{command.removesuffix('.py').replace('/', '.')}"
    heavy = "{'torch', 'matplotlib', 'accelerate', 'torchvision', 'ffcv'}"
    code = f"import sys, {module}; assert not {heavy} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_a_run_may_have_any_name_on_any_console(tiny, tmp_path):
    """Its files are UTF-8 whatever the console speaks; brackets, colons and dollars are no markup."""
    name = "größe [bold] :smile: $a^$ 大"
    run = tmp_path / name
    words = tiny("run.epochs=1", f"run.name='{name}'", f"run.dir='{run}'")
    shown = name.encode("ascii", "backslashreplace").decode()

    def said(*command: str) -> str:
        result = subprocess.run([sys.executable, *command], cwd=ROOT, env=ASCII, capture_output=True, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout.decode("ascii")

    assert f"{shown}: digits_affine, 160 training" in said("engine/train.py", *words)
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["run"]["name"] == name
    out = tmp_path / "größe.md"
    assert f"| {shown} | 42 |" in said("-m", "seqjepa.engine.compare", str(run), "--out", str(out))
    assert f"| {name} | 42 |" in out.read_text(encoding="utf-8")
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_an_error_can_be_said_on_any_console():
    command = [sys.executable, "engine/train.py", "run.seed=größe"]
    result = subprocess.run(command, cwd=ROOT, env=ASCII, capture_output=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.decode("ascii").startswith(r"error: override run.seed=gr\xf6\xdfe: run.seed = ")


def test_tables_are_whole_on_a_narrow_console(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    metrics = {"online_linacc_train": 12.34, "online_linacc_test": 56.78, "pred_cosine_centred_test": 0.5}
    Reporter(True).epoch("epoch 1/1", metrics, {"pred_cosine_centred_test": 0.9876})
    printed = capsys.readouterr().out
    assert "…" not in printed
    for part in ("pred_cosine_centred", "12.34", "56.78", "0.9876"):
        assert part in printed
