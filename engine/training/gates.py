"""What metrics decide: which epoch is the best, when to stop early, and whether the gates pass."""

import math
from itertools import accumulate

from ...configs.errors import InputError
from ..analysis.metrics import OF_THE_OBJECTIVE
from ..config import Config
from ..runs.state import Waiting
from .config import EarlyStopConfig, GateRule


def check_rules(config: Config, computed: set[str]) -> None:
    """Refuse metrics in the gates, eval.best_metric or early_stop.metric that are not computed, or have no control.

    Raises:
        InputError: names the field, the metric and what is allowed.
    """
    wanted: list[tuple[str, str | None, float | None]] = [
        ("eval.best_metric", config.eval.best_metric, None),
        ("early_stop.metric", config.early_stop.metric, None),
    ]
    for rule in config.active_rules:
        wanted += [(f"gates.rules.{config.data.name}", name, rule.margin) for name in (rule.metric, rule.minus)]
    for field, name, margin in wanted:
        if name is None:
            continue
        if name not in computed:
            raise InputError(f"{name} is not computed; there are {', '.join(sorted(computed))}", field)
        of_terms = {figure for term in config.objective.terms.values() for figure in term.figure_names}
        if margin is not None and (name in of_terms or name.startswith((*OF_THE_OBJECTIVE, "stream_", "factor_"))):
            raise InputError(f"{name} has no untrained control to judge by; min and max are allowed", field)


def improves(value: float, best: float | None, mode: str, min_delta: float = 0.0) -> bool:
    """Whether a value is better than the best so far by more than `min_delta`; the first one is, and NaN never is."""
    if best is None or math.isnan(value):
        return not math.isnan(value)
    return (value - best if mode == "max" else best - value) > min_delta


def waited(before: Waiting, config: EarlyStopConfig, metrics: dict[str, float]) -> Waiting:
    """What early stopping remembers after another validation."""
    if config.metric is None:
        return before
    value = metrics[config.metric]
    if improves(value, before.best, config.mode, config.min_delta):
        return Waiting.model_construct(best=value, waited=0)  # unvalidated: it may be infinite
    return before.model_copy(update={"waited": before.waited + 1})


def judge(rules: list[GateRule], metrics: dict[str, float], untrained: dict[str, float] | None) -> list[str]:
    """A sentence for each rule that does not hold in an epoch; NaN and missing values fail."""
    reasons = []
    for rule in (rule for rule in rules if rule.over == "epoch"):
        name = rule.metric if rule.minus is None else f"{rule.metric} - {rule.minus}"
        value = _value(rule, metrics)
        reasons += _outside(name, value, rule)
        if rule.margin is not None and not math.isnan(value):
            control = _value(rule, untrained or {})
            if not value - control >= rule.margin:  # a NaN control fails too
                wanted = f"a margin of {rule.margin:g} is required"
                reasons.append(f"{name} = {value:.4g}, untrained {control:.4g}: {wanted}")
    return reasons


def judge_history(rules: list[GateRule], rows: list[dict[str, float]]) -> list[str]:
    """A sentence for each rule about all epochs that does not hold, given their metrics in order.

    Epochs that were not validated are left out.
    """
    reasons = []
    for rule in (rule for rule in rules if rule.over != "epoch"):
        found = [row[rule.metric] for row in rows if rule.metric in row]
        known = [math.nan if value is None else value for value in found]  # as files hold it
        known = known[len(known) - max(1, round(rule.last * len(known))) :] if known else []
        reasons += _outside(f"{rule.metric} ({rule.over})", _of_history(rule, known), rule)
    return reasons


def _of_history(rule: GateRule, values: list[float]) -> float:
    """What a rule judges of a metric's values; NaN if there are none, or one is NaN."""
    if rule.over == "epochs":
        return len(values)
    if not values or any(math.isnan(value) for value in values):
        return math.nan
    least, most = min(values), max(values)
    if rule.over == "rise":
        pairs = zip(values, accumulate(values, min), strict=True)
        return max(now / before if before > 0 else math.inf for now, before in pairs)
    return {"least": least, "most": most, "range": most - least}[rule.over]


def _outside(name: str, value: float, rule: GateRule) -> list[str]:
    """A sentence if a value is not within the bounds of a rule; NaN never is."""
    if math.isnan(value):
        return [f"{name} is NaN"]
    found = []
    if rule.min is not None and value < rule.min:
        found.append(f"{name} = {value:.4g}, at least {rule.min:g} is required")
    if rule.max is not None and value > rule.max:
        found.append(f"{name} = {value:.4g}, at most {rule.max:g} is required")
    return found


def _value(rule: GateRule, metrics: dict[str, float]) -> float:
    value = metrics.get(rule.metric, math.nan)
    return value if rule.minus is None else value - metrics.get(rule.minus, math.nan)


def judge_epochs(
    config: Config,
    epochs: dict[str, dict[str, float]],
    untrained: dict[str, float] | None,
    rows: list[dict[str, float]],
) -> tuple[bool | None, list[str]]:
    """Whether all epochs, by their titles, meet the rules, and `rows`, metrics of all epochs, those about all; why not.

    Returns:
        True or False, or None if there are no rules; and a sentence for each rule that does not hold.
    """
    rules = config.active_rules
    if not rules:
        return None, [f"no rules for {config.data.name}: nothing was judged"]
    reasons = [f"{title}: {reason}" for title, epoch in epochs.items() for reason in judge(rules, epoch, untrained)]
    reasons += [f"all epochs: {reason}" for reason in judge_history(rules, rows)]
    return not reasons, reasons
