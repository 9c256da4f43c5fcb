"""What a learner remembers of a stream of tasks, from the matrix of its scores. It does not import torch."""

import math
from statistics import fmean

Matrix = list[list[float]]  # row i: scores on each of T tasks after task i


def stream_scores(matrix: Matrix, untrained: list[float]) -> dict[str, float]:
    """Summaries of the rows so far, by name; those that need a second task are left out before it.

    With n rows R of T columns, and the scores b of the untrained network:

    - average: mean over j <= n of R[n, j]; of T rows it is the average accuracy (ACC) of Lopez-Paz and Ranzato (2017),
      "Gradient episodic memory"
    - anytime: mean over i <= n of the average after i tasks
    - backward: mean over j < n of R[n, j] - R[j, j] (backward transfer); negative if something is forgotten
    - forward: mean over 2 <= j <= n of R[j - 1, j] - b[j] (forward transfer)
    - forgetting: mean over j < n of max over j <= i < n of R[i, j], minus R[n, j] (Chaudhry et al. 2018, "Riemannian
      walk"); a score on a task that has not come yet is forward transfer, and is not forgotten
    """
    last, seen = matrix[-1], len(matrix)
    averages = [fmean(row[: number + 1]) for number, row in enumerate(matrix)]
    found = {"average": averages[-1], "anytime": fmean(averages)}
    if seen > 1:
        earlier = range(seen - 1)
        found["backward"] = fmean(last[j] - matrix[j][j] for j in earlier)
        found["forward"] = fmean(matrix[j - 1][j] - untrained[j] for j in range(1, seen))
        found["forgetting"] = fmean(max(row[j] for row in matrix[j:-1]) - last[j] for j in earlier)
    return {name: value for name, value in found.items() if not math.isnan(value)}


def stability(trace: list[tuple[int, float]], back: float = 0.95) -> tuple[float, float]:
    """How far a score falls after the boundary of a task, and how long it takes to come back.

    Args:
        trace: steps since the boundary, rising from 0, and the score of the earlier tasks then.
        back: share of its loss-free value, the first, at which a score counts as recovered.

    Returns:
        The largest fall below the first score, and the first step after the lowest at which the score is back, which it
        need not stay; 0 if it was never below, NaN if it did not come back. The fall is the stability gap of De Lange
        et al. 2023 (arXiv 2205.13452) if the score comes back, and forgetting if it does not.
    """
    scores = [score for _, score in trace]
    low = min(scores)
    enough = scores[0] - (1 - back) * abs(scores[0])
    if low >= enough:
        return scores[0] - low, 0.0
    back_at = (float(step) for step, score in trace[scores.index(low) :] if score >= enough)
    return scores[0] - low, next(back_at, math.nan)
