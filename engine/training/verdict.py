"""The end of a run: whether its gate passes, and the last lines on the console."""

from __future__ import annotations

import math
from typing import Any

from .config import GateRule
from .gates import judge

__all__ = ["closing_block", "judge_epochs"]

CLOSING_METRICS = (
    "online_linacc_test",
    "leakage_linacc_test",
    "online_r2_test",
    "leakage_r2_test",
    "pred_cosine_centred_test",
)


def judge_epochs(
    task: str,
    rules: list[GateRule],
    epochs: dict[str, dict[str, float | None]],
    untrained: dict[str, float] | None,
) -> tuple[bool | None, list[str]]:
    """Whether all epochs meet the rules, and why not.

    Args:
        task: whose rules they are.
        rules: its gate.
        epochs: metrics by the name of the epoch; null stands for NaN.
        untrained: metrics of the control.

    Returns:
        True, False, or None where there is no rule; and a sentence for each that does not hold.
    """
    if not rules:
        return None, [f"no rules for {task}: nothing was judged"]
    reasons = []
    for title, metrics in epochs.items():
        numbers = {name: _number(value) for name, value in metrics.items()}
        reasons += [f"{title}: {reason}" for reason in judge(rules, numbers, untrained)]
    return not reasons, reasons


def closing_block(run: str, summary: dict[str, Any]) -> str:
    """The last lines of a run: `---`, then a `key: value` line each."""
    values: dict[str, Any] = {"run": run, "epochs": summary["epochs"], "best_epoch": summary["best_epoch"]}
    for name in CLOSING_METRICS:
        values[name] = _number(summary["final"].get(name))
        if summary["untrained"]:
            values[f"untrained_{name}"] = _number(summary["untrained"].get(name))
    values["gate_pass"] = summary["gate_pass"]
    values["seconds"] = summary["timing"]["seconds"]
    values["sequences_per_second"] = summary["timing"]["sequences_per_second"]
    return "\n".join(["---", *(f"{key}: {_plain(value)}" for key, value in values.items())])


def _number(value: float | None) -> float:
    """A metric; files hold null where it is NaN."""
    return math.nan if value is None else value


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
