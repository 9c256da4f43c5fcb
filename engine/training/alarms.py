"""Words about what goes wrong in training while losses still fall."""

import math

import torch
from torch import Tensor

from ...kernels import sigreg
from ..config import Config

SHARE = 0.05  # of the objective, below which a term is too small to be in the way
PINNED = 0.03  # relative distance from the value of projections that are all zero
Row = dict[str, float]  # metrics of an epoch


def alarms(rows: list[Row], config: Config, pinned: float | None = None) -> list[str]:
    """A sentence for each thing that is wrong in the last of the epochs so far.

    - a term that is a noticeable part of the objective is at more than twice its least value
    - half of the codes that were in use no longer are, by perplexity
    - SIGReg is where it is for projections that are all zero, or of unit length in many dimensions
    - the gradient is clipped in most steps, so that its length says nothing

    Args:
        rows: metrics of each epoch, as in metrics.jsonl.
        config: of the run.
        pinned: loss of SIGReg for projections that are all zero; None without the term.
    """
    now, found = rows[-1], []
    for term in config.objective.terms:
        name = f"loss_{term}"
        past = [(row[name], row["epoch"]) for row in rows if row.get(name) is not None and math.isfinite(row[name])]
        least, epoch = min(past, default=(math.nan, 0))
        if now.get(f"share_{term}", 0) >= SHARE and now[name] > 2 * least > 0:
            found.append(f"{name} is {now[name]:.3g}, more than twice its least value, {least:.3g} in epoch {epoch:g}")
    used = [row["codes_perplexity"] for row in rows if row.get("codes_perplexity") is not None]
    if now.get("codes_perplexity") is not None and now["codes_perplexity"] < max(used) / 2:
        found.append(
            f"codes_perplexity is {now['codes_perplexity']:.3g}, less than half of what it was, {max(used):.3g}"
        )
    loss = now.get("loss_sigreg")
    if pinned and loss is not None and abs(loss / pinned - 1) < PINNED:
        found.append(f"loss_sigreg is {loss:.4g}, as of projections that are all zero ({pinned:.4g})")
    if now.get("clipped", 0) > 50:
        limit = f"optim.clip_norm = {config.optim.clip_norm:g}"
        found.append(f"the gradient was clipped in {now['clipped']:.0f} % of the steps ({limit})")
    return found


@torch.no_grad()
def pinned_sigreg(config: Config, processes: int, device: torch.device) -> float | None:
    """Loss of SIGReg in a training batch of projections that are all zero; None without the term, or one for blocks."""
    if "sigreg" not in config.objective.terms or config.model.local.stops:
        return None
    rows = config.data.batch_size // config.optim.accumulate
    if config.run.batch_statistics != "global":
        rows //= processes
    zeros: Tensor = torch.zeros(rows, config.model.prediction_width, device=device)
    return sigreg(zeros, num_slices=config.objective.sigreg.num_slices, seed=0).item()
