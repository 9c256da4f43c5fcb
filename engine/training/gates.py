"""Gates: conditions on the metrics of a run, judged beside the untrained control."""

import math

from ...configs.errors import InputError
from ..analysis.metrics import OF_THE_OBJECTIVE
from ..config import Config
from .config import GateRule


def check_rules(config: Config, computed: set[str]) -> None:
    """Refuse metrics in the gates, eval.best_metric or early_stop.metric that are not computed, or have no control.

    Args:
        config: config of the run.
        computed: names of all metrics of a validated epoch.

    Raises:
        InputError: names the field, the metric and what is allowed.
    """
    wanted = [("eval.best_metric", config.eval.best_metric)]
    if config.early_stop.metric is not None:
        wanted.append(("early_stop.metric", config.early_stop.metric))
    for rule in config.active_rules:
        wanted += [(f"gates.rules.{config.data.name}", name) for name in (rule.metric, rule.minus) if name]
    for field, name in wanted:
        if name not in computed:
            raise InputError(f"{name} is not computed; there are {', '.join(sorted(computed))}", field)
    for rule in config.active_rules:
        for name in (rule.metric, rule.minus):
            if rule.margin is not None and name and name.startswith(OF_THE_OBJECTIVE):
                field = f"gates.rules.{config.data.name}"
                raise InputError(f"{name} has no untrained control; min and max are allowed", field)


def judge(rules: list[GateRule], metrics: dict[str, float], untrained: dict[str, float] | None) -> list[str]:
    """A sentence for each rule that does not hold; NaN and missing values fail.

    Args:
        rules: gate of the task.
        metrics: metrics of one epoch.
        untrained: metrics of the untrained control; None if it was not run.
    """
    reasons = []
    for rule in rules:
        name = rule.metric if rule.minus is None else f"{rule.metric} - {rule.minus}"
        value = _value(rule, metrics)
        if math.isnan(value):
            reasons.append(f"{name} is NaN")
            continue
        if rule.min is not None and value < rule.min:
            reasons.append(f"{name} = {value:.4g}, at least {rule.min:g} is asked for")
        if rule.max is not None and value > rule.max:
            reasons.append(f"{name} = {value:.4g}, at most {rule.max:g} is asked for")
        if rule.margin is not None:
            control = _value(rule, untrained or {})
            if not value - control >= rule.margin:  # a NaN control fails too
                wanted = f"a margin of {rule.margin:g} is asked for"
                reasons.append(f"{name} = {value:.4g}, untrained {control:.4g}: {wanted}")
    return reasons


def _value(rule: GateRule, metrics: dict[str, float]) -> float:
    value = metrics.get(rule.metric, math.nan)
    return value if rule.minus is None else value - metrics.get(rule.minus, math.nan)


def judge_epochs(
    task: str,
    rules: list[GateRule],
    epochs: dict[str, dict[str, float | None]],
    untrained: dict[str, float] | None,
) -> tuple[bool | None, list[str]]:
    """Whether all epochs meet the rules, and why not.

    Args:
        task: name of the task.
        rules: gate of the task.
        epochs: metrics by the title of the epoch; None stands for NaN.
        untrained: metrics of the untrained control; None if it was not run.

    Returns:
        True or False, or None if there are no rules; and a sentence for each rule that does not hold.
    """
    if not rules:
        return None, [f"no rules for {task}: nothing was judged"]
    reasons = []
    for title, metrics in epochs.items():
        numbers = {name: math.nan if value is None else value for name, value in metrics.items()}
        reasons += [f"{title}: {reason}" for reason in judge(rules, numbers, untrained)]
    return not reasons, reasons
