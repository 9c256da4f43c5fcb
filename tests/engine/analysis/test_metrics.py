"""The registry of metrics: which values are better, and which metrics a task has."""

import pytest

from seqjepa.engine.analysis.metrics import METRICS, OF_THE_OBJECTIVE, PANELS, better, expand


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("ep_loss", "min"),
        ("val_loss_rate", "min"),
        ("online_linacc_test", "max"),
        ("matched_z_linloss_train", "min"),
        ("online_r2_test", "max"),
        ("online_r2_translation_x_train", "max"),
        ("online_r2_loss_test", "min"),  # not the R² of a factor
        ("pair_cosine_agg", "min"),
        ("circle_error_rotation", "min"),
        ("grad_norm", "max"),  # neither is better
        ("of_another_version", "max"),
    ],
)
def test_which_values_are_better(name, direction):
    assert better(name) == direction


def test_a_metric_is_there_once_and_where_it_says():
    names = [name for metric in METRICS for name in metric.names]
    assert len(names) == len(set(names))
    assert {metric.panel for metric in METRICS if metric.panel} == set(PANELS)
    assert all(metric.label or metric.train for metric in METRICS if metric.panel)  # a curve has a label


def test_a_task_has_the_metrics_of_its_targets():
    fields = {"term": ["rate"], "factor": ["turn"], "feature": ["z"]}
    both, neither = expand(["class", "action"], **fields), expand([], **fields)
    assert {"loss_rate", "val_loss_rate", "rankme_z", "online_r2_turn_train", "leakage_linacc_test"} <= both
    assert neither < both
    assert {name for name in both if "_lin" in name or "_r2" in name} == both - neither
    assert expand(["class"], **fields) | expand(["action"], **fields) == both
    assert not any("{" in name or name.startswith("circle") for name in both)  # sweeps are not made in each epoch
    assert {name for name in both if name.startswith(OF_THE_OBJECTIVE)} == {
        *("ep_loss", "val_loss", "loss_rate", "val_loss_rate", "share_rate"),
        *("grad_norm", "grad_norm_max", "clipped", "z_grad_norm_rate"),
    }
