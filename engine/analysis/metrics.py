"""Every metric of a validated epoch: its name, whether more or less of it is better, and where it is shown.

A new metric is computed in one place and has one entry in `METRICS`, from which the table of an epoch, the last lines
of a run, its curves, the comparison of runs and the check of gates follow. Torch is not imported, so that
`python -m seqjepa.engine.compare --help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

__all__ = ["METRICS", "OF_THE_OBJECTIVE", "PANELS", "Metric", "better", "expand"]

FIELD = re.compile(r"{(\w+)}")
# titles of the panels of the curves, in the order in which they are drawn
PANELS = {
    "loss": "Loss",
    "cosine": "Cosine of centred prediction and target",
    "action": "R² of the action",
    "class": "Linear accuracy, %",
}


class Metric(NamedTuple):
    """A metric, or a family of metrics with {term}, {factor}, {feature} or {sweep} in its name.

    Attributes:
        name: its key in metrics.jsonl.
        better: whether larger or smaller values are better; None if neither.
        train: key of the same quantity on the training sequences.
        title: title of its row in the table of an epoch; None leaves it out.
        target: what it says can be predicted, class or action; a task that has no such target does not have the metric.
        of_objective: whether it compares objectives rather than networks, so that the untrained control has none.
        closing: whether it is among the last lines of a run.
        compared: whether a comparison of runs shows it by default.
        panel: key in `PANELS` of the curves that show it; None leaves it out.
        label: its label in the panel's legend; without one, the curves of `train` and `name` are drawn, train and test.
    """

    name: str
    better: Literal["max", "min"] | None = None
    train: str | None = None
    title: str | None = None
    target: Literal["class", "action"] | None = None
    of_objective: bool = False
    closing: bool = False
    compared: bool = False
    panel: str | None = None
    label: str | None = None


def _probe(name: str, target: Literal["class", "action"], **shown: Any) -> list[Metric]:
    """Score and loss of an online probe; for actions also the score of each factor."""
    loss = name.replace("linacc", "linloss") if target == "class" else f"{name}_loss"
    metrics = [
        Metric(f"{name}_test", "max", f"{name}_train", title=name, target=target, **shown),
        Metric(f"{loss}_test", "min", f"{loss}_train", target=target),
    ]
    if target == "action":
        metrics.append(Metric(f"{name}_{{factor}}_test", "max", f"{name}_{{factor}}_train", target=target))
    return metrics


METRICS = (
    Metric("val_loss", "min", "ep_loss", title="loss", of_objective=True, panel="loss"),
    Metric("val_loss_{term}", "min", "loss_{term}", of_objective=True),
    Metric("grad_norm", of_objective=True),
    Metric("z_grad_norm_{term}", of_objective=True),
    Metric(
        *("pred_cosine_centred_test", "max"),
        title="pred_cosine_centred",
        closing=True,
        panel="cosine",
        label="test",
    ),
    Metric("pred_cosine_test", "max"),
    *_probe("online_linacc", "class", closing=True, compared=True, panel="class", label="agg"),
    *_probe("leakage_linacc", "class", closing=True, panel="class", label="first view"),
    *_probe("matched_z_linacc", "class"),
    *_probe("online_r2", "action", closing=True, compared=True, panel="action", label="z pair, MLP"),
    *_probe("matched_agg_r2", "action"),
    *_probe("leakage_r2", "action", closing=True, panel="action", label="agg, linear"),
    *_probe("matched_z_r2", "action"),
    Metric("rate_{feature}", "max"),
    Metric("rate_fraction_{feature}", "max"),
    Metric("effective_rank_{feature}", "max"),
    Metric("participation_{feature}", "max"),
    Metric("rankme_{feature}", "max"),
    Metric("variance_{feature}", "max"),
    Metric("variance_min_{feature}", "max"),
    Metric("isotropy_{feature}", "max"),
    Metric("pair_cosine_{feature}", "min"),
    Metric("rank_eq_eff", "max"),
    Metric("rank_inv_eff", "max"),
    # only in epochs with factor sweeps; `subspace_metrics` describes them, and more that are neither good nor bad
    Metric("circle_error_{sweep}", "min"),
    Metric("circle_phase_{sweep}", "max"),
    Metric("subspace_ev_{sweep}", "max"),
    Metric("subspace_stability_{sweep}", "max"),
)

OF_THE_OBJECTIVE = tuple(
    FIELD.sub("", name) for metric in METRICS if metric.of_objective for name in (metric.name, metric.train) if name
)  # beginnings of the names of these metrics


def better(name: str) -> Literal["max", "min"]:
    """Whether the larger or the smaller values of a metric are better; "max" if that is not known."""
    for metric in METRICS:
        for pattern in filter(None, (metric.name, metric.train)):
            if re.fullmatch(FIELD.sub(".+", pattern), name):
                return metric.better or "max"
    return "max"


def expand(targets: Collection[str], **fields: Collection[str]) -> set[str]:
    """Names of all metrics of an epoch.

    Args:
        targets: those of "class" and "action" that the task has.
        fields: the values of each field in the names; a metric whose field is missing is left out.
    """
    found = set()
    for metric in METRICS:
        if metric.target is None or metric.target in targets:
            for name in filter(None, (metric.name, metric.train)):
                field = FIELD.search(name)
                values = fields.get(field[1], ()) if field else ("",)
                found |= {FIELD.sub(value, name) for value in values}
    return found
