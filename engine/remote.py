"""Look at a file that rents a machine before it costs money: `seqjepa remote check configs/launch/sky.yaml`."""

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..configs.cli import BAD_INPUT, DONE, command
from ..configs.compose import UNREADABLE
from ..configs.errors import InputError, first_line, shown

WORDS = "SEQJEPA_WORDS"  # variable by which the file's commands take words for `seqjepa train`
# of this machine, besides what the file sets: keys and logins that only this one has must not help
KEPT = re.compile(r"LANG|LC_\w+|TMPDIR|LD_LIBRARY_PATH|PYTHONPATH|SSL_CERT_\w+|\w+_proxy|\w+_PROXY|OMP_NUM_THREADS")


class Job(NamedTuple):
    """What a file runs on the machine that it rents."""

    folder: Path  # copied to the machine
    setup: str
    run: str
    variables: dict[str, str | None]  # None is what the user has to give
    mounts: dict[str, str]  # place on the machine -> place here


@command("nothing was rented")
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code, as listed on the help page."""
    parser = argparse.ArgumentParser(
        prog="seqjepa remote",
        description="Look at a file of SkyPilot's or dstack's before it costs money: run its commands here, on a copy "
        "of the folder as the machine gets it and with the file's variables alone, and `seqjepa train` with --check.",
        epilog="Exit codes: 0 everything can be reached, 2 something cannot.",
    )
    add_words(parser)
    given = parser.parse_args(argv)
    job = read_job(Path(given.file))
    variables = job.variables | dict(_named(word, job, given.file) for word in given.variables)
    if missing := [name for name, value in variables.items() if value is None]:
        raise InputError(f"{given.file}: leaves {missing[0]} to you; {missing[0]}=VALUE sets it")
    if look(job, {name: value or "" for name, value in variables.items()}, given.image):
        return BAD_INPUT
    print(f"{given.file}: all that can be known from here is in order; the account and the GPU are not looked at")
    return DONE


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes."""
    parser.add_argument("action", choices=["check"], help="what to do with the file")
    parser.add_argument("file", help="a YAML file such as configs/launch/sky.yaml")
    parser.add_argument(
        "variables", nargs="*", metavar="NAME=VALUE", help="variables that the file leaves open, or others' new values"
    )
    parser.add_argument("--image", help="do it in a container of this image, by Docker, with the file's set-up too")


def read_job(path: Path) -> Job:
    """Read a task of SkyPilot's or dstack's.

    Raises:
        InputError: the file cannot be read, is neither, or does not take words by SEQJEPA_WORDS.
    """
    try:
        given: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: is not YAML ({first_line(error)})") from None
    try:
        job = _of_skypilot(given) if "run" in given else _of_dstack(given, path.parent)
    except (AttributeError, KeyError, TypeError, ValueError):
        kinds = "SkyPilot's tasks have `run:` and `envs:`, dstack's `commands:` and `env:`"
        raise InputError(f"{path}: is no task; {kinds}") from None
    if WORDS not in job.variables:
        raise InputError(f"{path}: has no variable {WORDS}, with the words of `seqjepa train`")
    return job


def _of_skypilot(given: dict[str, Any]) -> Job:
    variables = (given.get("envs") or {}) | (given.get("secrets") or {})
    mounts = {there: here for there, here in (given.get("file_mounts") or {}).items() if isinstance(here, str)}
    return Job(Path(given.get("workdir", ".")), given.get("setup", ""), given["run"], _texts(variables), mounts)


def _of_dstack(given: dict[str, Any], home: Path) -> Job:
    *setup, run = given["commands"]  # the last one trains
    variables = given["env"]
    if isinstance(variables, list):
        parts = (word.partition("=") for word in variables)
        variables = {name: value if equals else None for name, equals, value in parts}
    repo = given["repos"][0]
    return Job(
        home / (repo if isinstance(repo, str) else repo["local_path"]), "\n".join(setup), run, _texts(variables), {}
    )


def _texts(variables: dict[str, Any]) -> dict[str, str | None]:
    return {name: None if value is None else str(value) for name, value in variables.items()}


def _named(word: str, job: Job, path: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if not equals or name not in job.variables:
        raise InputError(
            f"{shown(word)}: must be NAME=VALUE, with one of {path}'s variables: {', '.join(job.variables)}"
        )
    return name, value


def look(job: Job, variables: dict[str, str], image: str | None) -> int:
    """Run a job's commands with --check, as they run on the machine; returns their exit code."""
    words = variables[WORDS]
    for there, here in job.mounts.items():
        words = words.replace(f"data.root={there}", f"data.root={Path(here).expanduser().resolve()}")
    variables = variables | {WORDS: f"{words} --check"}
    with tempfile.TemporaryDirectory() as folder:
        disk, home, programs = (Path(folder) / name for name in ("disk", "home", "bin"))
        for place in (disk, home, programs):
            place.mkdir()
        _copy(job.folder, disk)
        if image is not None:
            return _in_container(job, variables, image, disk)
        started = Path(folder) / "started"
        program = programs / "seqjepa"
        program.write_text(f'#!/bin/sh\n: > {started}\nexec {sys.executable} -P -m seqjepa "$@"\n')
        program.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
        path = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        alone = {"PATH": path, "HOME": str(home), "PYTHONUSERBASE": site.getuserbase()}
        code = subprocess.run(["bash", "-c", job.run], cwd=disk, env=kept | alone | variables, check=False).returncode
        if not started.exists():
            raise InputError("its commands end before `seqjepa train` begins")
    return code


def _in_container(job: Job, variables: dict[str, str], image: str, disk: Path) -> int:
    names = [word for name in variables for word in ("--env", name)]
    mount = ["--volume", f"{disk}:/given:ro"]
    script = f"cp -r /given /seqjepa && cd /seqjepa\n{job.setup}\n{job.run}"
    command = ["docker", "run", "--rm", *mount, *names, image, "bash", "-c", script]
    try:
        return subprocess.run(command, env=os.environ | variables, check=False).returncode
    except OSError as error:
        raise InputError(f"--image {image}: docker cannot be started ({error.strerror})") from None


def _copy(folder: Path, disk: Path) -> None:
    """What SkyPilot and dstack copy: in a git checkout all but what git ignores, elsewhere everything."""
    listed = ["git", "-C", str(folder), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        shutil.copytree(folder, disk, dirs_exist_ok=True, symlinks=True)
        return
    for name in filter(None, found):
        if (folder / name).is_file():  # else deleted, or another repository
            (disk / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(folder / name, disk / name)


if __name__ == "__main__":
    sys.exit(main())
