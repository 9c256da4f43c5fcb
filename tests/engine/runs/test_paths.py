"""Paths stay where the user pointed: nothing is written, and nothing removed, anywhere else."""

from pathlib import Path

import pytest

from seqjepa.engine.train import main

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def here(tmp_path, tiny, monkeypatch):
    """Words that train in the present folder, an empty one; they point nowhere yet."""
    folder = tmp_path / "ein Ordner, ä日"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = [str(ROOT / word) if word.startswith("configs/") else word for word in tiny("run.epochs=1")]
    return [word for word in words if not word.startswith(("run.dir=", "control.cache="))]


def names(folder: Path | str = ".") -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_what_a_run_writes_lies_where_the_config_points(here):
    words = [*here, "run.dir=aus gang/läufe", "control.cache=ohne/training", "tracking.tensorboard=true"]
    assert main(words) == 0
    assert names() == {"aus gang", "ohne"}
    assert names("aus gang") == {"läufe"}
    assert names("ohne") == {"training"}
    assert "  dir: aus gang/läufe\n" in Path("aus gang/läufe/config.yaml").read_text()


def test_without_a_path_it_lies_in_runs_by_its_name(here):
    assert main([*here, "run.name=one"]) == 0
    assert names() == {"runs"}
    assert names("runs") == {"one", ".untrained"}


@pytest.mark.parametrize("name", ["..", "../elsewhere", "a/b", "/a", ".", "''", "~/a", '"a\\nb"'])
def test_a_name_does_not_climb(here, refused, name):
    refused([*here, f"run.name={name}"], "run.name")
    assert not names()


def test_replacing_a_run_removes_its_own_files_alone(here, tmp_path):
    """Checkpoints on another disk, reached by a link, are replaced as well; what else lies there stays."""
    disk, paper, run = tmp_path / "disk", tmp_path / "paper", Path("run")
    for folder in (disk / "other", paper, run):
        folder.mkdir(parents=True)
    (run / "checkpoints").symlink_to(disk)
    (run / "figures").symlink_to(paper)
    words = [*here, "run.dir=run", "run.overwrite=true"]
    assert main([*words, "run.epochs=2"]) == 0
    assert {"epoch-0002", "best"} < names(disk)
    mine = [run / "notes.txt", disk / "epoch-of-mine.txt", disk / "other" / "a.pt", paper / "mine.png"]
    for path in mine:
        path.write_text("mine")
    assert main(words) == 0
    assert names(disk) == {"epoch-0001", "best", "epoch-of-mine.txt", "other"}
    assert names(paper) == {"curves.png", "mine.png"}
    assert {path.read_text() for path in mine} == {"mine"}
