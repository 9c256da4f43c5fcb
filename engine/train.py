"""Train seq-JEPA: `accelerate launch engine/train.py configs/data/cifar10_rot.yaml configs/tier/quick.yaml`."""

from __future__ import annotations

import os
import sys

# `accelerate launch` puts this folder first, where `models` or `evaluate` would hide packages of these names
sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))]

from seqjepa.configs.console import open_console
from seqjepa.configs.errors import InputError
from seqjepa.configs.help import help_page
from seqjepa.configs.interruption import interruptible
from seqjepa.engine.compose import Composed, compose, dump
from seqjepa.engine.config import Config
from seqjepa.engine.reports.wandb_environment import overruled_of_wandb, wandb_layer

PARENT = os.getppid()  # before anything slow: a launcher that dies meanwhile must be missed
DONE, BAD_INPUT = 0, 2
DEFAULT_CONFIG = "configs/smoke.yaml"
USAGE = """\
usage: accelerate launch engine/train.py [CONFIG.yaml ...] [section.key=value ...] [--print-config] [--help]

Trains seq-JEPA. YAML files merge left to right, then overrides; without a file, configs/smoke.yaml.
  accelerate launch engine/train.py configs/data/cifar10_rot.yaml configs/tier/quick.yaml data.root=data/cifar10

--print-config   show the resolved config and stop
--help           show this page and stop

Exit codes: 0 done, 1 an enforced gate failed, 2 bad input, 3 diverged, 4 the machine failed the run,
128 + signal when interrupted (`accelerate launch` makes every failure 1)."""


@interruptible("nothing was trained")  # once it trains, the run listens to signals itself
def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: YAML files, overrides and options; those of the process by default.

    Returns:
        0 done, 1 an enforced gate failed, 2 bad input, 3 diverged, 4 the machine failed it, 128 + signal when
        interrupted.
    """
    open_console()
    argv = sys.argv[1:] if argv is None else argv
    composed = None
    try:
        if {"-h", "--help"} & set(argv):
            print(help_page(USAGE, Config))
            return DONE
        if unknown := [word for word in argv if word.startswith("-") and word != "--print-config"]:
            raise InputError(
                f"{unknown[0]}: unknown option; --help and --print-config are, values are section.key=value"
            )
        words = [word for word in argv if word != "--print-config"]
        if all("=" in word for word in words):
            if "--print-config" not in argv and os.environ.get("RANK", "0") in ("", "0"):
                print(f"no config given: training {DEFAULT_CONFIG} (--help lists what can be set)")
            words = [DEFAULT_CONFIG, *words]
        composed = compose(words, wandb_layer(os.environ))
        if "--print-config" in argv:
            print(dump(composed.config), end="")
            return DONE
        if os.environ.get("RANK", "0") in ("", "0"):
            for line in [*composed.notes, *overruled_of_wandb(composed.config.tracking, os.environ)]:
                print(line)
        # torch is imported from here on: the lines above answer at once
        from seqjepa.engine.training.trainer import train

        return train(composed.config, PARENT)
    except InputError as error:
        for line in str(error).splitlines():
            print(f"error: {_located(line, error.field, composed)}", file=sys.stderr)
        return BAD_INPUT


def _located(line: str, field: str | None, composed: Composed | None) -> str:
    """An error that came up while running, with the field and the place that set it."""
    if field is None or composed is None:
        return line
    origin = composed.origin(field)
    return f"{f'{origin}: ' if origin else ''}{field}: {line}"


if __name__ == "__main__":
    sys.exit(main())
