"""Summaries of what is remembered: closed forms, and a matrix summed by hand."""

import math

import pytest

from seqjepa.engine.analysis.continual import stability, stream_scores

TASKS = 5
UNTRAINED = [0.1, 0.2, 0.3, 0.4, 0.5]
MEAN = sum(UNTRAINED[1:]) / 4
SIZES = range(TASKS)


def harmonic(n):
    return sum(1 / i for i in range(1, n + 1))


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        # nothing ever changes
        ([[0.7] * TASKS for _ in SIZES], (0.7, 0.7, 0.0, 0.7 - MEAN, 0.0)),
        # all that has come is known, nothing else
        ([[float(j <= i) for j in SIZES] for i in SIZES], (1.0, 1.0, 0.0, -MEAN, 0.0)),
        # only the last task is known
        ([[float(i == j) for j in SIZES] for i in SIZES], (1 / TASKS, harmonic(TASKS) / TASKS, -1.0, -MEAN, 1.0)),
        # every task that has not come is known: that is not forgotten
        ([[float(j > i) for j in SIZES] for i in SIZES], (0.0, 0.0, 0.0, 1 - MEAN, 0.0)),
    ],
)
def test_closed_forms(matrix, expected):
    found = stream_scores(matrix, UNTRAINED)
    assert tuple(found) == ("average", "anytime", "backward", "forward", "forgetting")
    assert tuple(found.values()) == pytest.approx(expected)


def test_a_matrix_by_hand():
    """The best score of task 1 is not its first; task 2 improves after it was learnt."""
    matrix = [[0.5, 0.1, 0.0], [0.8, 0.6, 0.2], [0.4, 0.9, 0.7]]
    found = stream_scores(matrix, [0.0, 0.05, 0.1])
    assert found["average"] == pytest.approx((0.4 + 0.9 + 0.7) / 3)
    assert found["anytime"] == pytest.approx((0.5 + (0.8 + 0.6) / 2 + 2 / 3) / 3)
    assert found["backward"] == pytest.approx(((0.4 - 0.5) + (0.9 - 0.6)) / 2)
    assert found["forward"] == pytest.approx(((0.1 - 0.05) + (0.2 - 0.1)) / 2)
    assert found["forgetting"] == pytest.approx(((0.8 - 0.4) + (0.6 - 0.9)) / 2)


def test_the_rows_so_far():
    """After one task there is nothing to remember; after two, the third does not count."""
    assert stream_scores([[0.5, 0.1, 9.0]], [0.0] * 3) == {"average": 0.5, "anytime": 0.5}
    found = stream_scores([[0.5, 0.1, 9.0], [0.3, 0.6, 9.0]], [0.0] * 3)
    assert found["average"] == pytest.approx(0.45)
    assert found["backward"] == pytest.approx(-0.2)
    assert found["forgetting"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.8, 0.8, 0.9], (0.0, 0)),
        ([0.8, 0.77, 0.8], (0.03, 0)),  # within five percent of what it was
        ([0.8, 0.5, 0.2, 0.7, 0.77, 0.6], (0.6, 40)),
        ([0.8, 0.79, 0.3, 0.5], (0.5, math.nan)),  # not back at the end
        ([0.8, 0.1, 0.8, 0.0], (0.8, math.nan)),  # back, and lost again further down
        ([-0.1, -0.3, -0.1], (0.2, 20)),
    ],
)
def test_falls_and_recoveries(scores, expected):
    drop, steps = stability([(10 * number, score) for number, score in enumerate(scores)])
    assert (drop, steps) == pytest.approx(expected, nan_ok=True)
