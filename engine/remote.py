"""Look at a file that rents a machine before it costs money: `seqjepa remote check configs/launch/sky.yaml`."""

import argparse
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..configs.cli import BAD_INPUT, DONE, command
from ..configs.compose import UNREADABLE
from ..configs.console import Parser
from ..configs.errors import InputError, first_line, shown

WORDS = "SEQJEPA_WORDS"  # variable by which the file's commands take words for `seqjepa train`
MIRROR = "MIRROR"  # variable of the place where checkpoints go
# says that training begins, whatever comes first on PATH
NOTICE = """set -T; trap 'case "$BASH_COMMAND" in (*"seqjepa train"*) : > /noted/started;; esac' DEBUG"""
# of this machine, besides what the file sets: keys and logins that only this one has must not help
KEPT = re.compile(r"LANG|LC_\w+|TMPDIR|LD_LIBRARY_PATH|PYTHONPATH|SSL_CERT_\w+|\w+_proxy|\w+_PROXY|OMP_NUM_THREADS")
CONTAINER_HOME = "/root"  # of the user that images have unless they name one


class Job(NamedTuple):
    """What a file runs on the machine that it rents."""

    folder: Path | None  # copied to the machine
    setup: str  # commands that end a shell with their exit code if they fail
    run: str
    variables: dict[str, str | None]  # None is what the user has to give
    mounts: dict[str, str]  # place on the machine -> place here


@command("nothing was rented")
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code, as listed on the help page."""
    parser = Parser(
        prog="seqjepa remote",
        description="Look at a file of SkyPilot's or dstack's before it costs money: run its commands here, on a copy "
        "of the folder as the machine gets it and with the file's variables alone, and `seqjepa train` with --check; "
        "in a clone of seqjepa the copy's own code.",
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
        "variables",
        nargs="*",
        default=[],
        metavar="NAME[=VALUE]",
        help="variables that the file leaves open, or others' new values; without =VALUE it is that of the environment",
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
        kinds = "SkyPilot's and dstack's tasks are looked at"
        raise InputError(f"{path}: is not YAML ({first_line(error)}); {kinds}") from None
    try:
        job = _of_skypilot(given) if "run" in given else _of_dstack(given, path.parent)
        if not isinstance(job.run, str):
            raise TypeError
    except (AttributeError, KeyError, TypeError, ValueError):
        kinds = "SkyPilot's tasks have `run:` and `envs:`, dstack's `commands:` and `env:`"
        raise InputError(f"{path}: is no task; {kinds}") from None
    if WORDS not in job.variables:
        raise InputError(f"{path}: has no variable {WORDS}, with the words of `seqjepa train`")
    if job.folder is not None and not job.folder.is_dir():
        raise InputError(f"{path}: {shown(job.folder)}, which the machine gets, is no folder")
    return job


def _of_skypilot(given: dict[str, Any]) -> Job:
    variables = (given.get("envs") or {}) | (given.get("secrets") or {})
    mounts = {there: here for there, here in (given.get("file_mounts") or {}).items() if isinstance(here, str)}
    mounts = {there: here for there, here in mounts.items() if "://" not in here}  # a bucket
    setup = f"bash -c {shlex.quote(given.get('setup') or '')} || exit"
    folder = given.get("workdir")
    return Job(_expanded(folder) if folder else None, setup, given["run"], _texts(variables), mounts)


def _of_dstack(given: dict[str, Any], home: Path) -> Job:
    *setup, run = given["commands"]  # the last one trains
    variables = given["env"]
    if isinstance(variables, list):
        parts = (word.partition("=") for word in variables)
        variables = {name: value if equals else None for name, equals, value in parts}
    repo, *_ = given.get("repos") or [None]
    local = repo["local_path"] if isinstance(repo, dict) else repo and repo.partition(":")[0]  # here:there
    installing = "\n".join(f"{{ {one}\n}} || exit" for one in setup)
    return Job(home / _expanded(local) if local else None, installing, run, _texts(variables), {})


def _expanded(folder: str) -> Path:
    return Path(os.path.expanduser(folder))


def _texts(variables: dict[str, Any]) -> dict[str, str | None]:
    return {name: None if value is None else str(value) for name, value in variables.items()}


def _named(word: str, job: Job, path: str) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    if name not in job.variables:  # the value may be a secret
        known = ", ".join(job.variables)
        raise InputError(f"{shown(name)}: must be NAME=VALUE or NAME, with one of {path}'s variables: {known}")
    if not equals and name not in os.environ:
        raise InputError(f"{name}: is not in the environment; {name}=VALUE sets it")
    return name, value if equals else os.environ[name]


def look(job: Job, variables: dict[str, str], image: str | None) -> int:
    """Run a job's commands with --check, as they run on the machine; returns their exit code."""
    variables = variables | {WORDS: f"{variables[WORDS]} --check"}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        disk, noted = folder / "disk", folder / "noted"
        disk.mkdir()
        noted.mkdir()
        noted.chmod(0o777)  # for any user of a container
        try:
            if job.folder is not None:
                _copy(job.folder, disk)
            code = _here(job, variables, folder) if image is None else _in_container(job, variables, folder, image)
        except OSError as error:
            raise InputError(f"the machine cannot be imitated ({first_line(error)})") from None
        if not (noted / "started").exists():
            raise InputError(f"its commands end with exit code {code} before `seqjepa train` begins")
    return code


def _here(job: Job, variables: dict[str, str], folder: Path) -> int:
    """Run what trains on this machine, with its programs; what the set-up would install is there."""
    home, programs = folder / "home", folder / "bin"
    for place in (home, programs):
        place.mkdir()
    for there, here in job.mounts.items():
        words = variables[WORDS].replace(f"data.root={there}", f"data.root={_expanded(here).resolve()}")
        variables = variables | {WORDS: words}
    program, code = programs / "seqjepa", shlex.quote(str(_code(folder)))
    lines = ["#!/bin/sh", f": > {shlex.quote(str(folder / 'noted/started'))}"]
    lines += [f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"']
    lines += [f'exec {shlex.quote(sys.executable)} -P -m seqjepa "$@"', ""]
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    path = f"{programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    alone = {"PATH": path, "HOME": str(home), "PYTHONUSERBASE": site.getuserbase()}
    command = ["bash", "-c", job.run]
    return subprocess.run(command, cwd=folder / "disk", env=kept | alone | variables, check=False).returncode


def _code(folder: Path) -> Path:
    """A folder with the package as it is in the copy; empty if that is not a clone of it."""
    code, disk = folder / "code", folder / "disk"
    code.mkdir()
    try:
        about = tomllib.loads((disk / "pyproject.toml").read_text(encoding="utf-8"))
        places = about["tool"]["setuptools"]["package-dir"] if about["project"]["name"] == "seqjepa" else {}
    except (OSError, ValueError, KeyError, TypeError):
        return code
    for name, place in sorted(places.items()):  # the package before what is in it
        shutil.copytree(disk / place, code / name.replace(".", "/"), dirs_exist_ok=True)
    return code


def _in_container(job: Job, variables: dict[str, str], folder: Path, image: str) -> int:
    """Run the set-up and what trains in a container, to which the folder is given."""
    words = [word for name in variables for word in ("--env", name)]
    words += ["--volume", f"{folder / 'disk'}:/given:ro", "--volume", f"{folder / 'noted'}:/noted"]
    for there, here in job.mounts.items():
        source = _expanded(here).resolve()
        if not source.exists():  # docker would make a folder
            raise InputError(f"{source}, which the machine gets as {there}, is not there")
        words += ["--volume", f"{source}:{re.sub('^~', CONTAINER_HOME, there)}:ro"]
    mirror = variables.get(MIRROR)
    if mirror and "://" not in mirror:
        print(f"{MIRROR} is a folder of the container's own; what is in one here is not looked at", flush=True)
    script = f"cp -r /given /seqjepa && cd /seqjepa || exit\n{job.setup}\n{NOTICE}\n{job.run}"
    command = ["docker", "run", "--rm", *words, image, "bash", "-c", script]
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
