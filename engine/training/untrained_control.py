"""The untrained control: the run's probes on the frozen network that it starts from, for as many epochs as the run
or `control.max_epochs`.

No metric can be judged without it: on CIFAR-10 rotations an untrained ResNet-18 passes the reference code's gates.
"""

import hashlib
import json
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from pydantic import TypeAdapter

from ...configs.errors import InputError
from ...configs.files import to_json, write_atomically
from ...configs.section import leaves
from ...loaders.loader import Loaders
from ..analysis.metrics import OF_THE_OBJECTIVE
from ..config import Config
from ..reports.console import Reporter
from ..runs.state import Metrics
from ..runtime.interrupts import Interrupts
from ..runtime.provenance import code_digest, versions
from .step import Diverged, TrainingStep
from .validation import validate


def control_epochs(config: Config, loaders: Loaders) -> int:
    """Epochs for which the control's probes are trained; of a stream, as many as its steps would make."""
    length = config.run.epochs if loaders.stream is None else -(-int(loaders.stream.starts[-1]) // len(loaders.train))
    return min(length, config.control.max_epochs)


def control_key(config: Config, loaders: Loaders, accelerator: Accelerator) -> str:
    """Digest of everything that the control depends on.

    That is every setting that matters to a network which is not trained (`Section.untrained`), the images, the
    precision, the kind of device, the libraries and all code of the project.
    """
    fields = leaves(config.untrained().model_dump())
    parts = {
        "config": {name: value for name, value in fields.items() if not Config.is_free(name)},
        "accumulate": config.optim.accumulate,  # free, but batch norm sees it
        "epochs": control_epochs(config, loaders),
        "images": loaders.fingerprint,
        "precision": accelerator.mixed_precision,
        "device": accelerator.device.type,
        "processes": accelerator.num_processes,
        "versions": versions(),
        "code": code_digest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def untrained_control(
    config: Config, loaders: Loaders, accelerator: Accelerator, reporter: Reporter, interrupts: Interrupts
) -> dict[str, float]:
    """Metrics of the control, from the cache or run now.

    Raises:
        InputError: the cache cannot be made.
        Interrupted: the run was asked to stop.
        Diverged: a loss of the probes is no longer finite.
    """
    name = f"{config.data.name}-{control_key(config, loaders, accelerator)}.json"
    path = Path(config.control.cache).expanduser() / name
    cached = [_read(path) if accelerator.is_main_process else None]
    broadcast_object_list(cached)
    if cached[0] is not None:
        reporter.say(f"untrained control: cached in {path}")
        return cached[0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: cannot be made ({error.strerror})", "control.cache") from None
    epochs = control_epochs(config, loaders)
    reporter.say(f"untrained control: {epochs} epoch(s) of probes on the frozen initial network (once; then cached)")
    set_seed(config.run.seed)
    training = TrainingStep(config.untrained(), loaders, accelerator, train_model=False)
    reporter.advance("untrained control", 0, total=epochs * training.steps_per_epoch)
    check = partial(interrupts.check_together, accelerator)
    batches = (batch for epoch in range(epochs) for batch in loaders.train.epoch(epoch))
    for step, batch in enumerate(batches):
        training.step(batch, step)
        if (step + 1) % training.steps_per_epoch == 0:
            training.embeddings()
        reporter.advance()
        check()
    metrics = training.epoch_metrics() | validate(training, loaders.validation, check).metrics
    metrics = {name: value for name, value in metrics.items() if not name.startswith(OF_THE_OBJECTIVE)}
    if found := training.diverged():
        raise Diverged(f"diverged: the untrained control's {found[1]} was not finite at step {found[0]}")
    if accelerator.is_main_process:
        try:
            write_atomically(path, to_json(metrics))
        except OSError as error:  # no reason to lose the run
            reporter.say(f"untrained control: not cached in {path} ({error.strerror}); the next run makes it again")
    return metrics


def _read(path: Path) -> dict[str, float] | None:
    """A cached control; None if there is none or it was cut short."""
    try:
        return TypeAdapter(Metrics).validate_json(path.read_bytes(), strict=True) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
