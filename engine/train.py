"""Train seq-JEPA: `accelerate launch engine/train.py configs/data/cifar10_rot.yaml configs/tier/quick.yaml`."""

import os
import sys

# `accelerate launch` puts this folder first, where `models` or `evaluate` would hide packages of these names
sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))]

from seqjepa.configs.cli import DONE, check_options, command, located
from seqjepa.configs.compose import dump
from seqjepa.configs.help import help_page
from seqjepa.engine.config import Config, compose
from seqjepa.engine.reports.config import overruled_of_wandb, wandb_layer

PARENT = os.getppid()  # before any slow import: a launcher that dies during one must be noticed
DEFAULT_CONFIG = "configs/smoke.yaml"
USAGE = """\
usage: accelerate launch engine/train.py [CONFIG.yaml ...] [section.key=value ...] [--print-config] [--help]

Trains seq-JEPA. YAML files are merged from left to right, then the overrides; the default file is configs/smoke.yaml.
  accelerate launch engine/train.py configs/data/cifar10_rot.yaml configs/tier/quick.yaml data.root=data/cifar10

--print-config   show the resolved config and stop
--help           show this page and stop

Exit codes: 0 done, 1 an enforced gate failed, 2 bad input, 3 diverged, 4 machine failure (disk, memory),
128 + signal when interrupted (`accelerate launch` turns every failure into 1)."""


@command("nothing was trained")  # once it trains, the run handles signals itself
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code, as listed on the help page."""
    if {"-h", "--help"} & set(argv):
        print(help_page(USAGE, Config))
        return DONE
    check_options(argv, "--help", "--print-config")
    words = [word for word in argv if word != "--print-config"]
    speaks = os.environ.get("RANK", "0") in ("", "0")
    if all("=" in word for word in words):
        if words == argv and speaks:
            print(f"no config given: training {DEFAULT_CONFIG} (--help lists what can be set)")
        words = [DEFAULT_CONFIG, *words]
    composed = compose(words, wandb_layer(os.environ))
    if "--print-config" in argv:
        print(dump(composed.config), end="")
        numbers = composed.config.method_numbers
        told = ", ".join(f"{name} = {value:g}" for name, value in numbers.items())
        print(f"# {len(numbers)} numbers of the method: {told}")
        for name, here, alike in composed.config.beside_lejepa:
            print(f"# {'as in' if alike else 'unlike'} LeJEPA, {name}: {here}")
        return DONE
    if speaks:
        for line in [*composed.notes, *overruled_of_wandb(composed.config.tracking, os.environ)]:
            print(line)
    # torch is imported only here, so that help and errors above appear at once
    from seqjepa.engine.training.trainer import train

    with located(composed):
        return train(composed.config, PARENT)


if __name__ == "__main__":
    sys.exit(main())
