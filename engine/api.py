"""Training from Python: `result = seqjepa.train("configs/data/cifar10_rot.yaml", "run.epochs=2")`."""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..configs.cli import DONE, GATE_FAILED, located
from ..configs.errors import InputError
from .config import Config
from .models.seq_jepa import SeqJEPA
from .runs.checkpoints import find_checkpoint
from .runs.folder import RunFolder
from .train import resolve


class RunFailed(RuntimeError):
    """Training ended without a result.

    Args:
        message: one line.
        code: exit code that the command `seqjepa train` would have had: 3 diverged, 4 the machine failed,
            5 run.max_hours is over. An idle run (run.max_idle) ends the process itself.
    """

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Result:
    """A finished run. Its files are read when they are asked for, so `Result(Path("runs/x"))` serves too.

    Args:
        folder: folder of the run.
    """

    folder: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))

    @functools.cached_property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json: gate, final, best and untrained metrics, timing."""
        try:
            summary = json.loads((self.folder / "summary.json").read_text(encoding="utf-8"))
            if missing := {"final", "untrained", "gate_pass"} - summary.keys():
                raise ValueError(f"summary.json lacks {', '.join(sorted(missing))}")
        except (OSError, ValueError, AttributeError) as error:
            raise InputError(f"{self.folder}: not the folder of a finished run ({error})") from None
        return summary

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metrics of the last epoch; None stands for NaN."""
        return self.summary["final"]

    @property
    def untrained(self) -> dict[str, float | None] | None:
        """The same metrics of the untrained control; None if the run had none."""
        return self.summary["untrained"]

    @property
    def gate_pass(self) -> bool | None:
        """Whether the gates passed; None if there are none for these data."""
        return self.summary["gate_pass"]

    @property
    def checkpoint(self) -> Path:
        """Folder of the newest checkpoint."""
        found = find_checkpoint(self.folder)
        if found is None:
            raise InputError(f"{self.folder}: has no checkpoint")
        return found

    @functools.cached_property
    def model(self) -> SeqJEPA:
        """The trained network, from the newest checkpoint, on the CPU and in evaluation mode."""
        from .evaluation.cases import read_network

        return read_network(self.checkpoint)[0].eval()


def train(*words: str | Path) -> Result:
    """Train, as `seqjepa train` does, in this process.

    It works in a notebook and in a thread, where signals save nothing. It seeds the global random generators of Python,
    NumPy and torch; torch's other settings, such as threads and determinism, are the caller's again when it ends.

    Args:
        words: YAML files, merged from left to right, and overrides such as "run.epochs=2"; without files the smoke run.

    Returns:
        The finished run, whether or not its gates passed.

    Raises:
        InputError: the config, the data or the checkpoint cannot be used.
        RunFailed: training diverged, or memory, disk or time ran out; what was printed says where it can be resumed.
        KeyboardInterrupt: a signal stopped the run, which has saved.
    """
    for word in words:
        if not isinstance(word, str | Path) or str(word).startswith("-"):
            raise InputError(f"{word!r}: must be the name of a YAML file, or section.key=value")
    composed: Any = resolve([str(word) for word in words])
    config: Config = composed.config
    from .runtime.accelerator import settings_restored
    from .training.trainer import train as run

    with settings_restored(), located(composed):
        code = run(config, os.getppid())
    if code > 128:
        raise KeyboardInterrupt(code - 128)
    folder = RunFolder(config, config.run, config.checkpoint.keep, main=False).path
    if code not in (DONE, GATE_FAILED):
        raise RunFailed(f"{folder}: training ended with code {code}; the lines above say why", code)
    return Result(folder)
