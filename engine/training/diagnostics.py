"""Factor sweeps during training: how much factors of variation move the encoder's features, and in which directions."""

import re
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...loaders.loader import SequenceLoader
from ..analysis.accumulators import MetricBank
from ..analysis.subspaces import subspace_metrics, sweep
from ..config import Config
from ..models.seq_jepa import SeqJEPA
from ..reports.figures.subspaces import NetworkSweeps, draw_all
from ..runs.tensors import save_tensors

NAME = re.compile(r"epoch-(\d{4,})\.safetensors")


def diagnose(
    model: SeqJEPA,
    loader: SequenceLoader,
    config: Config,
    accelerator: Accelerator,
    moments: MetricBank,
    *,
    epoch: int,
    bases: Path,
    figures: Path,
) -> tuple[dict[str, float], list[Path]]:
    """Sweep the factors, measure their subspaces and draw them; only the main process calls it.

    Args:
        model: the network, which is put in eval mode.
        loader: loader of the validation, whose first images are swept.
        config: config of the run.
        accelerator: sets the precision.
        moments: collected moments of z and agg over the validation.
        epoch: number of complete epochs.
        bases: folder with a file of the subspaces for each sweep; stability is measured against the one before.
        figures: folder of the figures.

    Returns:
        Metrics by name, and the paths of the figures.
    """
    sweeps = sweep(model.eval(), loader, config.diagnostics.anchors, accelerator)
    metrics, found = subspace_metrics(sweeps, _before(bases, epoch))
    bases.mkdir(parents=True, exist_ok=True)
    save_tensors(found, bases / f"epoch-{epoch:04d}.safetensors")
    networks = {f"epoch {epoch}": NetworkSweeps(sweeps, {feature: moments[feature].spectrum() for feature in moments})}
    return metrics, draw_all(networks, figures)


def _before(folder: Path, epoch: int) -> dict[str, Tensor] | None:
    """Bases of the last sweep before an epoch; a file that cannot be read counts as none."""
    earlier = [(int(match[1]), path) for path in folder.glob("*") if (match := NAME.fullmatch(path.name))]
    earlier = sorted(pair for pair in earlier if pair[0] < epoch)
    if not earlier:
        return None
    try:
        return load_file(earlier[-1][1])
    except (OSError, SafetensorError):
        return None
