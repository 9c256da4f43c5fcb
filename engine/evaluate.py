"""Frozen-probe evaluation: `accelerate launch engine/evaluate.py RUN_OR_CHECKPOINT ... eval.lengths=[1,3,5]`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# `accelerate launch` puts this folder first, where `models` or `evaluate` would hide packages of these names
sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))]

from seqjepa.configs.cli import DONE, MACHINE_FAILED, check_options, command
from seqjepa.configs.errors import InputError
from seqjepa.configs.help import field_lines

HELP = """\
usage: accelerate launch engine/evaluate.py RUN_OR_CHECKPOINT [...] [section.key=value ...]

Asks a frozen network for the class and the action, and its untrained control for the same.
  accelerate launch engine/evaluate.py runs/cifar100-quick eval.lengths=[1,2,3,4,5,6,7,8]
  accelerate launch engine/evaluate.py runs/cifar100-quick/checkpoints/best eval.protocol=paper

A run stands for its newest checkpoint, whose config is used; section.key=value overrides it (data.root, eval.*).
Writes eval.json, lengths.png and factors.png to eval/<checkpoint>-<protocol> in the run, or to eval.out. With
eval.subspace=true: factor sweeps, subspaces, equivariance and collapse, to eval/<checkpoint>-subspace. Several runs
are also compared: a grid of training length by evaluation length, and with eval.protocol=both how far the two agree.

Settings (defaults):
{settings}

Exit codes: 0 done, 2 bad input, 4 the machine failed it, 128 + signal when
interrupted (`accelerate launch` makes every failure 1)."""


@command("what was finished is written")
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(HELP.format(settings=_settings()))
        return DONE
    check_options(argv, "--help")
    paths = [Path(word).expanduser() for word in argv if "=" not in word or Path(word).exists()]
    if not paths:
        raise InputError("no run or checkpoint was given")
    try:
        # torch is imported from here on: the lines above answer at once
        from seqjepa.engine.evaluation.measure import evaluate
        from seqjepa.engine.reports.console import Reporter

        with Reporter(True) as reporter:
            evaluate(paths, [word for word in argv if Path(word).expanduser() not in paths], reporter)
    except (OSError, MemoryError, RuntimeError) as error:
        if (cause := _cause(error)) is None:
            raise
        print(f"{cause}; what was finished is written", file=sys.stderr)
        return MACHINE_FAILED
    return DONE


def _cause(error: Exception) -> str | None:
    """What failed, in a line; None if it is not the machine's fault."""
    from seqjepa.engine.runtime.failures import explain, out_of_memory

    if out_of_memory(error):
        return "out of memory; a smaller eval.batch_size, or a smaller data.train_subset, needs less"
    return explain(error, 0, 1, 1)  # the numbers are those of a step, for want of memory


def _settings() -> str:
    from seqjepa.engine.evaluation.config import EvalConfig

    during_training = {"every", "best_metric", "best_mode"}
    fields = {name: field for name, field in EvalConfig.model_fields.items() if name not in during_training}
    return "\n".join(field_lines("eval", fields))


if __name__ == "__main__":
    sys.exit(main())
