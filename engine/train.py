"""Train seq-JEPA: `seqjepa train configs/data/cifar10_rot.yaml configs/tier/quick.yaml`, or by `accelerate launch`."""

import argparse
import atexit
import contextlib
import os
import sys
from typing import NoReturn

# `accelerate launch` puts this folder first, where `models` or `evaluate` would hide packages of these names
sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))]

from seqjepa.configs.cli import DONE, check_options, command, located
from seqjepa.configs.compose import Composed, dump
from seqjepa.configs.errors import InputError, shown
from seqjepa.configs.help import help_page
from seqjepa.engine.config import Config, compose
from seqjepa.engine.reports.config import overruled_of_wandb, wandb_layer

PARENT = os.getppid()  # before any slow import: a launcher that dies during one must be noticed
DEFAULT_CONFIG = "configs/smoke.yaml"
MOST_PROCESSES = 64  # of one machine
USAGE = """\
usage: seqjepa train [CONFIG.yaml ...] [section.key=value ...] [--processes N] [--print-config] [--check] [--help]

Trains seq-JEPA. YAML files are merged from left to right, then the overrides; the default file is configs/smoke.yaml.
  seqjepa train configs/data/cifar10_rot.yaml configs/tier/quick.yaml data.root=data/cifar10

--processes N    train in N processes on this machine, one for each GPU (default: 1)
--print-config   show the resolved config and stop
--check          look whether images can be read and run.mirror reached, train a few steps on the CPU, and stop
--help           show this page and stop

Exit codes: 0 done, 1 an enforced gate failed, 2 bad input, 3 diverged, 4 machine failure (disk, memory),
5 run.max_hours is over, 6 idle for run.max_idle, 128 + signal when interrupted. `accelerate launch engine/train.py`
does the same, and turns every failure into 1."""


def resolve(words: list[str]) -> Composed[Config]:
    """The config that files and overrides make, over what W&B's own environment asks for; without files the smoke run.

    Raises:
        InputError: a file, a key or a value cannot be used.
    """
    if all("=" in word for word in words):
        words = [DEFAULT_CONFIG, *words]
    composed = compose(words, wandb_layer(os.environ))
    return composed._replace(config=composed.config.named())


@command("nothing was trained")  # once it trains, the run handles signals itself
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code, as listed on the help page."""
    if {"-h", "--help"} & set(argv):
        print(help_page(USAGE, Config))
        return DONE
    processes, words = _processes(argv)
    check_options(words, "--help", "--processes", "--print-config", "--check")
    printing, checking = "--print-config" in words, "--check" in words
    words = [word for word in words if word not in ("--print-config", "--check")]
    speaks = os.environ.get("RANK", "0") in ("", "0")
    if all("=" in word for word in words):
        if speaks and not printing:
            print(f"no config given: training {DEFAULT_CONFIG} (--help lists what can be set)")
        words = [DEFAULT_CONFIG, *words]
    composed = resolve(words)
    if printing:
        _print_config(composed.config)
        return DONE
    if checking:
        from seqjepa.engine.rehearsal import check

        return check(composed)
    if processes > 1:
        from seqjepa.engine.runtime.launcher import launch

        sys.stdout.flush()
        return launch(processes, "seqjepa.engine.train", words)
    if speaks:
        for line in [*composed.notes, *overruled_of_wandb(composed.config.tracking, os.environ)]:
            print(line)
    # torch is imported only here, so that help and errors above appear at once
    from seqjepa.engine.training.trainer import train

    with located(composed):
        return train(composed.config, PARENT)


def _processes(argv: list[str]) -> tuple[int, list[str]]:
    """The number that follows --processes, and the other words."""
    if "--processes" not in argv:
        return 1, argv
    place = argv.index("--processes")
    number = argv[place + 1] if place + 1 < len(argv) else "nothing"
    if not number.isdecimal() or not 1 <= int(number) <= MOST_PROCESSES:
        raise InputError(f"--processes {shown(number)}: must be from 1 to {MOST_PROCESSES}")
    if int(number) > 1 and os.environ.get("RANK"):
        raise InputError(f"--processes {number}: a launcher has started this process, and says how many there are")
    rest = argv[:place] + argv[place + 2 :]
    if "--processes" in rest:
        raise InputError("--processes is given twice")
    return int(number), rest


def _print_config(config: Config) -> None:
    print(dump(config), end="")
    numbers = config.method_numbers
    told = ", ".join(f"{name} = {value:g}" for name, value in numbers.items())
    print(f"# {len(numbers)} numbers of the method: {told}")
    for name, here, alike in config.beside_lejepa:
        print(f"# {'as in' if alike else 'unlike'} LeJEPA, {name}: {here}")


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes, for the completion of a shell's tab key."""
    from seqjepa.configs.completion import complete_words

    parser.add_argument("--processes", type=int)
    parser.add_argument("--print-config", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--help", action="store_true")
    complete_words(parser, "words", Config)


def leave(code: int) -> NoReturn:
    """End this process with an exit code.

    One of several ends at once: where Python takes itself apart, a thread of gloo's that still runs would abort it
    ("terminate called without an active exception"), now and then, after all that it had to do is done.
    """
    if "RANK" in os.environ:  # launchers set it
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):  # its reader has gone, or it was closed
                stream.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
