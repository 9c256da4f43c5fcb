"""What metrics decide: which epoch is the best, when to stop early, and whether the gates pass."""

import math

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
        if margin is not None and name.startswith((*OF_THE_OBJECTIVE, "stream_")):
            raise InputError(f"{name} has no untrained control; min and max are allowed", field)


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
    for rule in rules:
        name = rule.metric if rule.minus is None else f"{rule.metric} - {rule.minus}"
        value = _value(rule, metrics)
        if math.isnan(value):
            reasons.append(f"{name} is NaN")
            continue
        if rule.min is not None and value < rule.min:
            reasons.append(f"{name} = {value:.4g}, at least {rule.min:g} is required")
        if rule.max is not None and value > rule.max:
            reasons.append(f"{name} = {value:.4g}, at most {rule.max:g} is required")
        if rule.margin is not None:
            control = _value(rule, untrained or {})
            if not value - control >= rule.margin:  # a NaN control fails too
                wanted = f"a margin of {rule.margin:g} is required"
                reasons.append(f"{name} = {value:.4g}, untrained {control:.4g}: {wanted}")
    return reasons


def _value(rule: GateRule, metrics: dict[str, float]) -> float:
    value = metrics.get(rule.metric, math.nan)
    return value if rule.minus is None else value - metrics.get(rule.minus, math.nan)


def judge_epochs(
    config: Config, epochs: dict[str, dict[str, float]], untrained: dict[str, float] | None
) -> tuple[bool | None, list[str]]:
    """Whether all epochs, by their titles, meet the rules, and why not.

    Returns:
        True or False, or None if there are no rules; and a sentence for each rule that does not hold.
    """
    rules = config.active_rules
    if not rules:
        return None, [f"no rules for {config.data.name}: nothing was judged"]
    reasons = [f"{title}: {reason}" for title, epoch in epochs.items() for reason in judge(rules, epoch, untrained)]
    return not reasons, reasons
