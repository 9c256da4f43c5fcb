"""Every metric of a validated epoch: its name, whether more or less of it is better, and where it is shown.

A new metric is computed in one place and has one entry in `METRICS`, from which the table of an epoch, the last lines
of a run, its curves, the comparison of runs and the check of gates follow. It does not import torch, so
that `seqjepa compare --help` is quick.
"""

import re
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

FIELD = re.compile(r"{(\w+)}")
# titles of the panels of the curves, in the order in which they are drawn
PANELS = {
    "loss": "Loss",
    "cosine": "Cosine of centred prediction and target",
    "action": "R² of the action",
    "class": "Linear accuracy, %",
}


class Metric(NamedTuple):
    """A metric, or a family with {term}, {factor}, {group}, {crate}, {feature}, {sweep}, {layer}, {task} or {ended}
    in its name.

    Attributes:
        name: its key in metrics.jsonl.
        better: whether larger or smaller values are better; None if neither.
        train: key of the same quantity on the training sequences.
        title: title of its row in the table of an epoch; None leaves it out.
        target: what it says can be predicted, class or action; a task that has no such target does not have the metric.
        of_objective: whether it is about learning rather than about a network, so that the untrained control has none.
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

    @property
    def names(self) -> list[str]:
        """Its keys on the test and the training sequences."""
        return [self.name, self.train] if self.train else [self.name]


def _class_probe(name: str, **shown: Any) -> list[Metric]:
    """Loss and accuracy of an online probe."""
    return [
        Metric(f"{name}_linloss_test", "min", f"{name}_linloss_train", target="class"),
        Metric(f"{name}_linacc_test", "max", f"{name}_linacc_train", f"{name}_linacc", "class", **shown),
    ]


def _action_probe(name: str, **shown: Any) -> list[Metric]:
    """Loss and R² of an online probe, and R² of each factor."""
    return [  # the loss is first, because its name has the form of a factor's
        Metric(f"{name}_r2_loss_test", "min", f"{name}_r2_loss_train", target="action"),
        Metric(f"{name}_r2_test", "max", f"{name}_r2_train", f"{name}_r2", "action", **shown),
        Metric(f"{name}_r2_{{factor}}_test", "max", f"{name}_r2_{{factor}}_train", target="action"),
    ]


def _stream(measure: str, target: Literal["class", "action"] | None = None) -> list[Metric]:
    """A score on each task, and `stream_scores` of it."""
    shown: dict[str, Any] = {"closing": measure != "own_class", "compared": measure == "cosine"}
    return [
        Metric(f"task_{measure}_{{task}}", "max", target=target),
        *(Metric(f"stream_{measure}_{name}", "max", target=target, **shown) for name in ("average", "backward")),
        *(Metric(f"stream_{measure}_{name}", "max", target=target) for name in ("anytime", "forward")),
        Metric(f"stream_{measure}_forgetting", "min", target=target),
    ]


SIDES, FIGURES = ("prediction", "target"), ("rank", "isotropy", "variance", "gauss")
CHURN = ("codes_churn", "codes_churn_target")
EMBEDDINGS = tuple(f"{side}_{figure}" for side in SIDES for figure in FIGURES)
METRICS = (
    Metric("val_loss", "min", "ep_loss", "loss", of_objective=True, panel="loss"),
    Metric("val_loss_{term}", "min", "loss_{term}", of_objective=True),
    Metric("share_{term}", of_objective=True),
    Metric("grad_norm", of_objective=True),
    Metric("grad_norm_max", of_objective=True),
    Metric("clipped", "min", of_objective=True),
    Metric("z_grad_norm_{term}", of_objective=True),
    # of a training batch every `run.log_every` steps, the mean over the epoch; `embedding_figures` describes them. The
    # control's are of the last batch of each of its epochs
    *(Metric(name, "max") for name in EMBEDDINGS),
    Metric("pred_cosine_test", "max"),
    Metric("pred_cosine_centred_test", "max", None, "pred_cosine_centred", closing=True, panel="cosine", label="test"),
    *_class_probe("online", closing=True, compared=True, panel="class", label="agg"),
    *_class_probe("leakage", closing=True, panel="class", label="first view"),
    *_class_probe("matched_z"),
    *_action_probe("online", closing=True, compared=True, panel="action", label="z pair, MLP"),
    *_action_probe("matched_agg"),
    *_action_probe("leakage", closing=True, panel="action", label="agg, linear"),
    *_action_probe("matched_z"),
    # only with model.subspaces.kind=group: moves that are read from the subspaces, with nothing fitted
    Metric("group_r2_{group}_test", "max", target="action", compared=True),
    Metric("rate_{feature}", "max"),
    Metric("rate_fraction_{feature}", "max"),
    Metric("effective_rank_{feature}", "max"),
    Metric("participation_{feature}", "max"),
    Metric("rankme_{feature}", "max"),
    Metric("isotropy_{feature}", "max"),
    Metric("variance_{feature}", "max"),
    Metric("variance_min_{feature}", "max"),
    Metric("pair_cosine_{feature}", "min"),
    Metric("rank_eq_eff", "max"),
    Metric("rank_inv_eff", "max"),
    # only with a stream of tasks: scores on the test sequences of each, and summaries over the tasks so far
    *_stream("cosine"),
    *_stream("class", "class"),
    *_stream("own_class", "class"),
    *_stream("r2", "action"),
    # and what learning the next does to them: the untrained network learns nothing, and has none of these
    Metric("stream_cosine_drop", "min", of_objective=True),
    Metric("stream_cosine_recovery", "min", of_objective=True),
    Metric("task_cka_{ended}", "max", of_objective=True),
    Metric("stream_cka", "max", of_objective=True),
    Metric("task_overlap_{ended}", "max", of_objective=True),
    Metric("stream_overlap", "max", of_objective=True),
    # only of programs on grids: what `grid_scores` describes
    Metric("next_cf16", "max", title="next_cf16", closing=True, compared=True),
    Metric("next_top1", "max", title="next_top1", closing=True, compared=True),
    Metric("next_copy16"),
    Metric("val_nce", "min", title="val_nce"),
    Metric("codes_perplexity", "max", title="codes_perplexity"),
    Metric("codes_active", "max", title="codes_active"),
    Metric("codes_colour", "max", title="codes_colour"),
    Metric("codes_colour_chance", title="codes_colour_chance"),
    Metric("codes_shape", "max", title="codes_shape"),
    Metric("codes_shape_chance", title="codes_shape_chance"),
    *(Metric(f"codes_{name}_target", "max") for name in ("perplexity", "active")),
    # every `run.log_every` steps, the mean over the epoch; what `Churn.look` describes
    *(Metric(name, "min", of_objective=True) for name in CHURN),
    Metric("move_acc", "max", title="move_acc"),
    Metric("length_acc", "max", title="length_acc"),
    *(Metric(f"{name}_r2", "max", title=f"{name}_r2") for name in ("size", "objects", "colours")),
    # only with parts of kind=crate: the longest step of their sparse coding
    Metric("dictionary_step_{crate}"),
    # only in epochs with factor sweeps; `subspace_metrics` describes them, and more that are neither good nor bad
    Metric("layers_rate_{layer}", "min"),
    Metric("layers_zeros_{layer}", "max"),
    Metric("layers_active_{layer}", "min"),
    Metric("circle_error_{sweep}", "min"),
    Metric("circle_phase_{sweep}", "max"),
    Metric("circle_r2_{sweep}", "max"),
    Metric("subspace_ev_{sweep}", "max"),
    Metric("subspace_stability_{sweep}", "max"),
)

OF_GRIDS = {"next_cf16", "next_top1", "next_copy16", "val_nce", "move_acc", "length_acc"}
OF_GRIDS |= {"size_r2", "objects_r2", "colours_r2"}
OF_CODES = {metric.name for metric in METRICS if metric.name.startswith("codes_")}

# beginnings of the names of metrics that the untrained control does not have
OF_THE_OBJECTIVE = tuple(FIELD.sub("", name) for metric in METRICS if metric.of_objective for name in metric.names)


def better(name: str) -> Literal["max", "min"]:
    """Whether the larger or the smaller values of a metric are better; "max" if that is not known."""
    for metric in METRICS:
        if any(re.fullmatch(FIELD.sub(".+", known), name) for known in metric.names):
            return metric.better or "max"
    return "max"


def expand(targets: Collection[str], **fields: Collection[str]) -> set[str]:
    """Names of all metrics of an epoch, in a task that has these of the targets "class" and "action".

    `fields` are the values of each field in the names; a metric whose field is missing is left out, and so are the
    summaries of a stream that has no `task`, and the scores on grids or of codes where `grids` or `codes` is empty.
    """
    found = set()
    for name in (name for metric in METRICS if metric.target in (None, *targets) for name in metric.names):
        absent = (("task", name.startswith("stream_")), ("grids", name in OF_GRIDS), ("codes", name in OF_CODES))
        if any(named and not fields.get(field) for field, named in absent):
            continue
        field = FIELD.search(name)
        found |= {FIELD.sub(value, name) for value in fields.get(field[1], ())} if field else {name}
    return found
