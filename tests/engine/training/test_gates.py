"""Gates: what passes, what fails, and that NaN never passes."""

import math

import pytest

from seqjepa.configs.errors import InputError
from seqjepa.engine.config import Config, compose
from seqjepa.engine.training.config import GateRule
from seqjepa.engine.training.gates import check_rules, judge, judge_history
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


HISTORY = [
    {"epoch": 1, "a": 4.0},
    {"epoch": 2, "a": 2.0},
    {"epoch": 3},  # not validated
    {"epoch": 4, "a": 3.0},
    {"epoch": 5, "a": 2.5},
]


@pytest.mark.parametrize(
    ("rule", "value"),
    [
        ({"over": "least"}, 2.0),
        ({"over": "most"}, 4.0),
        ({"over": "most", "last": 0.5}, 3.0),
        ({"over": "range"}, 2.0),
        ({"over": "range", "last": 0.5}, 0.5),
        ({"over": "rise"}, 1.5),  # 3 over 2
        ({"over": "rise", "last": 0.25}, 1.0),
        ({"over": "epochs"}, 4),
    ],
)
def test_rules_about_all_epochs(rule, value):
    assert not judge_history([GateRule(metric="a", min=value, max=value, **rule)], HISTORY)
    (said,) = judge_history([GateRule(metric="a", min=value + 0.01, **rule)], HISTORY)
    assert said == f"a ({rule['over']}) = {value:.4g}, at least {value + 0.01:g} is required"
    assert not judge([GateRule(metric="a", min=1e9, **rule)], METRICS, None)  # it is about no single epoch


def test_a_history_with_nan_or_nothing_fails():
    for over in ("least", "most", "range", "rise"):
        for broken in (None, math.nan):  # as files hold it, and as it was measured
            rows = [*HISTORY, {"epoch": 6, "a": broken}]
            assert judge_history([GateRule(metric="a", max=1e9, over=over)], rows) == [f"a ({over}) is NaN"]
        assert judge_history([GateRule(metric="b", max=1e9, over=over)], HISTORY) == [f"b ({over}) is NaN"]
    assert judge_history([GateRule(metric="b", min=1, over="epochs")], HISTORY)


def test_what_a_term_tells_of_itself_has_no_control():
    words = ("objective.prediction.kind=infonce", "objective.prediction.queue=8")
    config = compose(
        ["tests/small.yaml", *words, "gates.rules.digits_affine=[{metric: infonce_queue, margin: 0.1}]"]
    ).config
    with pytest.raises(InputError, match="infonce_queue has no untrained control"):
        check_rules(config, metric_names(config, 10, {"rotation": slice(0, 2)}))


def test_a_rule_about_all_epochs_has_no_margin():
    with pytest.raises(ValueError, match="judged by min and max alone"):
        GateRule(metric="a", margin=0.1, over="most")
