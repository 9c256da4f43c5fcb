"""Frozen-probe evaluation: `seqjepa eval RUN_OR_CHECKPOINT ... eval.lengths=[1,3,5]`, or by `accelerate launch`."""

import argparse
import os
import sys
from pathlib import Path

# `accelerate launch` puts this folder first, where `models` or `evaluate` would hide packages of these names
sys.path[:] = [place for place in sys.path if os.path.realpath(place) != os.path.dirname(os.path.realpath(__file__))]

from seqjepa.configs.cli import DONE, MACHINE_FAILED, check_options, command
from seqjepa.configs.errors import InputError, out_of_memory
from seqjepa.configs.help import field_lines

HELP = """\
usage: seqjepa eval RUN_OR_CHECKPOINT [...] [section.key=value ...]

Fits probes on a frozen network, and on its untrained control: how well do their features predict class and action?
  seqjepa eval runs/cifar100-quick eval.lengths=[1,2,3,4,5,6,7,8]
  seqjepa eval runs/cifar100-quick/checkpoints/best eval.protocol=paper

A run folder stands for its newest checkpoint. The checkpoint's config applies; section.key=value words override it
(data.root, eval.*). Results (eval.json, lengths.png, factors.png) go to eval/<checkpoint>-<protocol> in the run, or to
eval.out. With eval.subspace=true, factor sweeps, subspaces, equivariance and collapse are measured instead, in
eval/<checkpoint>-subspace. Several runs are also compared, in a grid of training length by evaluation length, and with
eval.protocol=both by how well the two protocols agree.

Settings (defaults):
{settings}

Exit codes: 0 done, 2 bad input, 4 machine failure, 128 + signal when interrupted
(`accelerate launch engine/evaluate.py` does the same, and turns every failure into 1)."""


@command("what was finished is written")
def main(argv: list[str]) -> int:
    """Run the command line and return its exit code."""
    if {"-h", "--help"} & set(argv):
        from seqjepa.engine.evaluation.config import EvalConfig

        of_training = {"every", "best_metric", "best_mode"}
        fields = {name: field for name, field in EvalConfig.model_fields.items() if name not in of_training}
        print(HELP.format(settings="\n".join(field_lines("eval", fields))))
        return DONE
    check_options(argv, "--help")
    paths = [Path(word).expanduser() for word in argv if "=" not in word or Path(word).exists()]
    if not paths:
        raise InputError("no run or checkpoint was given; `seqjepa eval RUN_OR_CHECKPOINT` takes one or several")
    try:
        # these import torch; help and bad input above are answered without it
        from seqjepa.engine.evaluation.measure import evaluate
        from seqjepa.engine.reports.console import Reporter

        with Reporter(True) as reporter:
            evaluate(paths, [word for word in argv if Path(word).expanduser() not in paths], reporter)
    except (OSError, MemoryError, RuntimeError) as error:
        from seqjepa.engine.runtime.failures import explain

        less = "out of memory; a smaller eval.batch_size, or a smaller data.train_subset, needs less"
        cause = less if out_of_memory(error) else explain(error)
        if cause is None:
            raise
        print(f"{cause}; what was finished is written", file=sys.stderr)
        return MACHINE_FAILED
    return DONE


def add_words(parser: argparse.ArgumentParser) -> None:
    """Give a parser what the command takes, for the completion of a shell's tab key."""
    from seqjepa.configs.completion import complete_words
    from seqjepa.engine.config import Config

    parser.add_argument("--help", action="store_true")
    complete_words(parser, "words", Config)


if __name__ == "__main__":
    sys.exit(main())
