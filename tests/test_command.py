"""The command `seqjepa`: its words, its exit codes, several processes, and the tab key."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import seqjepa
from seqjepa.__main__ import COMMANDS, main
from seqjepa.configs.cli import ERRORS_IN
from seqjepa.configs.completion import suggestions
from seqjepa.engine.config import Config

SEQJEPA = str(Path(sys.executable).parent / "seqjepa")


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_help_page_of_that_name(name, capsys):
    try:
        code = main([name, "--help"])
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 0
    assert capsys.readouterr().out.startswith(f"usage: seqjepa {name}")


REFUSED = {
    "": COMMANDS,
    "trian": COMMANDS,
    "--verbose": COMMANDS,
    "train --foo": ["--foo", "--print-config"],
    "eval": ["RUN_OR_CHECKPOINT"],
    "eval --foo": ["--foo", "--help"],
    "compare": ["RUN", "--list"],
    "compare --foo run": ["--foo", "--against"],
    "show --rows many a.yaml": ["--rows", "many", "CONFIG"],
    "write images": ["out", "--jpeg"],
    "remote": ["required: action, file;", "check"],
    "export run": ["--out", "--push"],
    "export run --out new --format foo": ["foo", "timm", "onnx", "pt2"],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_line(words, capsys):
    """It says what was given or is missing, and what there is."""
    try:
        code = main(words.split())
    except SystemExit as end:  # argparse's way
        code = end.code
    assert code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert all(part in said for part in REFUSED[words]), said


def test_a_word_of_two_lines_is_refused_in_one(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "run", "--two\nlines"])
    assert capsys.readouterr().err.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"seqjepa {seqjepa.__version__}\n"


def test_help_needs_no_torch(run_process, python):
    code = "import sys\nfrom seqjepa.__main__ import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert main(['train', '--help']) == 0\nassert not {'torch', 'argcomplete'} & set(sys.modules)"
    assert run_process(python, "-c", code).returncode == 0


def test_it_trains_evaluates_and_exports(tiny, folder_of, tmp_path, capsys):
    words = tiny("run.epochs=1")
    assert main(["train", *words]) == 0
    assert main(["eval", str(folder_of(words)), "eval.lengths=[1]", "eval.renderings=1"]) == 0
    assert main(["compare", str(folder_of(words))]) == 0
    assert main(["export", str(folder_of(words)), "--out", str(tmp_path / "out")]) == 0
    assert main(["train", *words, "data.dataset=mnist", "data.root=/nowhere"]) == 2
    capsys.readouterr()


@pytest.mark.parametrize("number", ["two", "0", "65", "-1"])
def test_a_number_of_processes_that_cannot_be(number, refused, tiny):
    refused(["--processes", number, *tiny()], f"--processes {number}: must be from 1 to 64")


def test_a_number_of_processes_is_given_once(refused, tiny):
    refused(["--processes", "2", "--processes", "2", *tiny()], "--processes is given twice")


def test_a_launchers_process_starts_no_more(refused, tiny, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    refused(["--processes", "2", *tiny()], "a launcher has started this process")


@pytest.mark.slow
def test_two_processes_end_with_the_exit_code_of_a_gate(tiny, folder_of):
    """In a line, where `accelerate launch` prints a traceback of its own."""
    words = tiny("gates.enforce=true", "run.epochs=1")
    ended = subprocess.run([SEQJEPA, "train", "--processes", "2", *words], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert seqjepa.Result(folder_of(words)).gate_pass is False


@pytest.mark.slow
def test_two_processes_end_with_the_exit_code_of_bad_input(tiny):
    """Found by the processes, not before they start."""
    words = tiny("data.dataset=mnist", "data.root=/nowhere")
    ended = subprocess.run([SEQJEPA, "train", "--processes", "2", *words], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 2, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1


@pytest.mark.slow
def test_two_processes_save_when_they_are_stopped(tiny, folder_of):
    words = tiny("run.epochs=1000", "eval.every=1000", "checkpoint.every=1000", "control.max_epochs=1")
    run = folder_of(words)
    training = subprocess.Popen([SEQJEPA, "train", "--processes", "2", *words], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists() and time.monotonic() < end and training.poll() is None:
        time.sleep(0.1)
    os.kill(training.pid, signal.SIGTERM)
    _, said = training.communicate(timeout=120)
    assert training.returncode == 128 + signal.SIGTERM, said
    assert any("-step-" in path.name or path.name.startswith("epoch-") for path in (run / "checkpoints").iterdir())


def test_a_killed_process_is_the_machines_failure(monkeypatch, capfd, tmp_path):
    from seqjepa.engine.runtime.launcher import launch

    (tmp_path / "dies.py").write_text("import os, signal, sys\nos.kill(os.getpid(), getattr(signal, sys.argv[1]))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch(1, "dies", ["SIGKILL"]) == 4
    assert "process 0 was ended by SIGKILL" in capfd.readouterr().err


BAD = """
import os, sys, time
from pathlib import Path
from seqjepa.configs.cli import command
from seqjepa.configs.errors import InputError

@command("")
def main(words):
    rank, folder = os.environ["RANK"], Path(words[0])
    (folder / rank).touch()
    while len(list(folder.iterdir())) < 2:  # both are there before one fails
        time.sleep(0.01)
    raise InputError("is bad", "data.root")

sys.exit(main())
"""


def test_an_error_of_several_processes_is_one_line(monkeypatch, capfd, tmp_path):
    from seqjepa.engine.runtime.launcher import launch

    (tmp_path / "fails.py").write_text(BAD)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launch(2, "fails", [str(tmp_path / "here")]) == 2
    assert capfd.readouterr().err == "error: data.root: is bad\n"
    assert ERRORS_IN not in os.environ


def test_an_error_of_one_process_is_printed_too(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(ERRORS_IN, str(tmp_path))
    for word, times in (("--one", 1), ("--one", 0), ("--other", 1)):
        assert main(["train", word]) == 2
        assert capsys.readouterr().err.count(f"error: {word}") == times
    monkeypatch.setenv(ERRORS_IN, str(tmp_path / "gone"))
    assert main(["train", "--one"]) == 2
    assert "error: --one" in capsys.readouterr().err


def test_an_error_is_one_write(monkeypatch):
    """So that those of several processes cannot run into each other."""
    written = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=written.append))
    assert main(["train", "--one"]) == 2
    (line,) = filter(None, written)
    assert line.endswith("\n")


def test_the_tab_key_knows_files_settings_and_values():
    assert suggestions("configs/tier/min", Config) == ["configs/tier/minutes.yaml"]
    assert suggestions("configs/launch/sk", Config) == []  # no part of a run's config
    assert suggestions("run.epo", Config) == ["run.epochs="]
    assert suggestions("run.device=c", Config) == ["run.device=cpu", "run.device=cuda"]
    assert "model.encoder.kind=resnet18" in suggestions("model.encoder.kind=", Config)
    assert suggestions("model.encoder.quantiser.ki", Config) == ["model.encoder.quantiser.kind="]
    assert suggestions("run.deterministic=t", Config) == ["run.deterministic=true"]
    assert suggestions("run.epochs=", Config) == []


def test_every_setting_can_be_completed():
    """Whatever a config prints is suggested: the names come from another place than those of --print-config."""
    from seqjepa.configs.section import leaves
    from seqjepa.engine.config import compose

    config = compose(["configs/smoke.yaml"]).config.model_dump()
    known = {word.removesuffix("=") for word in suggestions("", Config) if word.endswith("=")}
    free = ("gates.rules.", "objective.terms")  # named by the user
    missing = {name for name in leaves(config) if name not in known and not name.startswith(free)}
    assert not {name for name in missing if not any(part in known for part in _above(name))}


def _above(name):
    """The settings that hold this one, if they are free-form mappings."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def test_the_shells_completion_works(tmp_path):
    """As bash calls it: argcomplete writes what fits to file descriptor 8."""
    line = "seqjepa train configs/tier/arc_s"
    environment = os.environ | {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "out"),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n=",
    }
    subprocess.run([SEQJEPA], env=environment, timeout=60, check=True)
    assert (tmp_path / "out").read_text().strip() == "configs/tier/arc_smoke.yaml"


def test_each_command_lists_its_words_for_completion():
    import argparse

    for module, _ in COMMANDS.values():
        parser = argparse.ArgumentParser(add_help=False)
        importlib.import_module(f"seqjepa.{module}").add_words(parser)
        assert parser._actions
