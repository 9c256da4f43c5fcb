"""Factor sweeps during training: how much factors of variation move the features, and what white-box layers do."""

import re
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...configs.errors import first_line
from ...loaders.loader import SequenceLoader
from ..analysis.accumulators import MetricBank
from ..analysis.layers import layer_curves, layer_metrics
from ..analysis.subspaces import subspace_metrics, sweep
from ..reports.figures.subspaces import NetworkSweeps, draw_all
from ..runs.folder import RunFolder
from ..runs.tensors import save_tensors
from .step import TrainingStep

NAME = re.compile(r"epoch-(\d{4,})\.safetensors")


def diagnose(
    training: TrainingStep,
    loader: SequenceLoader,
    moments: MetricBank,
    folder: RunFolder,
    epoch: int,
    say: Callable[[str], None],
) -> tuple[dict[str, float], list[Path]]:
    """Sweep the factors, measure their subspaces and draw them; only the main process calls it.

    The network, put in eval mode, sees the first images of the validation's `loader`; `moments` are the collected ones
    of z and agg over that validation, after `epoch` complete epochs. The folder gets a file of the subspaces for each
    sweep; stability is measured against the one before.

    Returns:
        Metrics by name, and the paths of the figures; none of either after a failure, which `say` tells of.
    """
    try:
        sweeps = sweep(training.model.eval(), loader, training.config.diagnostics.anchors, training.accelerator)
        num_observed = training.config.sequence.num_observed
        curves = layer_curves(training.model, next(iter(loader.epoch(0))), num_observed, training.accelerator)
        metrics, found = subspace_metrics(sweeps, _before(folder.bases, epoch))
        metrics |= layer_metrics(curves)
        folder.bases.mkdir(parents=True, exist_ok=True)
        save_tensors(found, folder.bases / f"epoch-{epoch:04d}.safetensors")
        spectra = {feature: moments[feature].spectrum() for feature in moments}
        return metrics, draw_all({f"epoch {epoch}": NetworkSweeps(sweeps, spectra, curves)}, folder.figures)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:  # no memory, a full disk
        say(f"no sweeps for epoch {epoch}: {first_line(error)}")
        return {}, []


def _before(folder: Path, epoch: int) -> dict[str, Tensor] | None:
    """Bases of the last sweep before an epoch; a file that cannot be read counts as none."""
    found = {int(match[1]): path for path in folder.glob("*") if (match := NAME.fullmatch(path.name))}
    last = max((number for number in found if number < epoch), default=None)
    try:
        return None if last is None else load_file(found[last])
    except (OSError, SafetensorError):
        return None
