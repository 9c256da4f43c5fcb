"""Gates: what passes, what fails, and that NaN never passes."""

import math

import pytest

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import Config
from seqjepa.engine.training.config import GateRule
from seqjepa.engine.training.gates import check_rules, judge
from seqjepa.engine.training.validation import metric_names

METRICS = {"a": 0.5, "b": 0.2, "broken": math.nan}
UNTRAINED = {"a": 0.45, "b": 0.4, "broken": 0.0}


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ({"metric": "a", "min": 0.5}, True),
        ({"metric": "a", "min": 0.51}, False),
        ({"metric": "a", "max": 0.5}, True),
        ({"metric": "a", "max": 0.49}, False),
        ({"metric": "a", "minus": "b", "min": 0.3}, True),
        ({"metric": "a", "minus": "b", "min": 0.31}, False),
        ({"metric": "a", "margin": 0.04}, True),
        ({"metric": "a", "margin": 0.06}, False),
        ({"metric": "b", "margin": 0.0}, False),
        ({"metric": "a", "minus": "b", "margin": 0.2}, True),  # 0.3 against 0.05
        ({"metric": "a", "minus": "b", "margin": 0.3}, False),
        ({"metric": "broken", "min": -1e9}, False),
        ({"metric": "broken", "max": 1e9}, False),
        ({"metric": "missing", "min": -1e9}, False),
        ({"metric": "a", "minus": "broken", "min": -1e9}, False),
    ],
)
def test_rules(rule, holds):
    reasons = judge([GateRule(**rule)], METRICS, UNTRAINED)
    assert (not reasons) is holds
    assert len(reasons) <= 1


def test_a_margin_without_a_control_fails():
    assert judge([GateRule(metric="a", margin=-1e9)], METRICS, None)
    assert judge([GateRule(metric="a", margin=-1e9)], METRICS, {"a": math.nan})


def test_reasons_say_what_was_asked():
    (reason,) = judge([GateRule(metric="a", minus="b", min=0.4)], METRICS, UNTRAINED)
    assert reason == "a - b = 0.3, at least 0.4 is required"


def test_unknown_metrics_are_refused():
    names = metric_names(Config(), 10, {"rotation": slice(0, 2)})
    config = Config.model_validate({"gates": {"rules": {"digits_affine": [{"metric": "gap_action", "min": 0.0}]}}})
    with pytest.raises(InputError, match="gap_action is not computed; there are"):
        check_rules(config, names)
    with pytest.raises(InputError, match="linacc is not computed"):
        check_rules(Config.model_validate({"eval": {"best_metric": "linacc"}}), names)
    check_rules(Config(), names)
