"""How much of the rules of ARC's tasks a representation of grids holds."""

from collections.abc import Callable
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ...loaders.draws import COUNTERFACTUAL_STREAM, words
from ...loaders.grids.arc import ArcTask, on_canvas
from ...loaders.grids.moves import MOVE, NUM_COLOURS, OUTSIDE, Move, counts, sizes
from ...loaders.grids.programs import counterfactuals

Embed = Callable[[Tensor], Tensor]  # grids, int64 [N, S, S], to features [N, E]
ALTERNATIVES = 15  # grids that one move makes, beside the true one
PART = 512  # grids that are embedded at a time
ROUNDING = 1e-5  # differences below this share of the features' length are roundings


@torch.no_grad()
def arc_scores(embed: Embed, tasks: list[ArcTask], side: int) -> dict[str, float]:
    """Scores, in percent, of features z of grids; nothing is trained.

    The rule of a pair is z(output) - z(input), and that of a task the mean over its demonstrations.

    - rule_nn: the demonstration whose rule has the largest cosine with that of another is of the same task
    - choose16: z(test input) + rule is nearest to the true output among it and 15 grids that one move makes of it
      (chance is 6.25); choose16_<k> with the first k demonstrations, choose16_input by z(test input) alone
    - among_all: it is nearest to the true output among the outputs of all tests

    Of equally near ones each counts in part; what differs by roundings is equally near.

    Args:
        embed: gives the features.
        tasks: at least two.
        side: of the canvas, on which the grids of all tasks fit.
    """
    shown = [pair for task in tasks for pair in task.demonstrations]
    tests = [pair for task in tasks for pair in task.tests]
    owner = torch.tensor([number for number, task in enumerate(tasks) for _ in task.demonstrations])
    tested = torch.tensor([number for number, task in enumerate(tasks) for _ in task.tests])

    def features(grids: Tensor) -> Tensor:
        return torch.cat([embed(part).double().cpu() for part in grids.split(PART)])

    before, after, query, truth = (
        features(on_canvas([getattr(pair, name) for pair in pairs], side))
        for pairs in (shown, tests)
        for name in ("input", "output")
    )
    rules = after - before
    alike = F.normalize(rules, dim=1) @ F.normalize(rules, dim=1).T
    nothing = ROUNDING * max(after.norm(dim=1).amax().item(), truth.norm(dim=1).amax().item())
    alike[rules.norm(dim=1) <= nothing] = 0  # of no rule, none is most alike
    alike.fill_diagonal_(-2)
    best = alike >= alike.amax(1, keepdim=True) - ROUNDING
    same = owner[:, None] == owner
    found = {"rule_nn": 100 * ((best & same).sum(1) / best.sum(1)).mean().item()}

    outputs = on_canvas([pair.output for pair in tests], side)
    key = words(0, COUNTERFACTUAL_STREAM, 1, torch.arange(len(tests)), 1, 3)[:, 0]
    steps = torch.zeros(len(tests), 10, dtype=torch.int64)
    steps[:, MOVE] = key[:, 2] * len(Move) >> 32
    others = counterfactuals(outputs, steps, outputs, key[:, :2], ALTERNATIVES)
    candidates = torch.cat([truth[:, None], features(others.flatten(0, 1)).unflatten(0, others.shape[:2])], 1)
    starts = [0, *accumulate(len(task.demonstrations) for task in tasks)]
    most = max(len(task.demonstrations) for task in tasks)
    for name, count in {"choose16": most, "choose16_1": 1, "choose16_2": 2, "choose16_input": 0}.items():
        means = [rules[first : min(first + count, last)].mean(0) for first, last in pairwise(starts)]
        guess = query + torch.stack(means)[tested] if count else query
        found[name] = 100 * share_of_first(-torch.cdist(guess[:, None], candidates)[:, 0], nothing).mean().item()
        if name == "choose16":
            distances = torch.cdist(guess, truth)
            nearest = distances <= distances.amin(1, keepdim=True) + nothing
            right = nearest & (outputs.flatten(1)[:, None] == outputs.flatten(1)).all(-1)
            found["among_all"] = 100 * (right.sum(1) / nearest.sum(1)).mean().item()
    return found


def share_of_first(similarity: Tensor, nothing: float) -> Tensor:
    """Share of the first of the candidates [N, K] in the nearest ones: 1 if it alone is nearest, 0 if it is not.

    Differences up to `nothing` are roundings.
    """
    best = similarity >= similarity.amax(1, keepdim=True) - nothing
    return best[:, 0] / best.sum(1)


def pixels(grids: Tensor) -> Tensor:
    """The cells themselves as features, one of eleven each: what any representation should beat."""
    return F.one_hot(grids, OUTSIDE + 1).flatten(1).float()


def size_and_colours(grids: Tensor) -> Tensor:
    """Height and width over 10, and the shares of the ten colours."""
    height, width = sizes(grids)
    shares = counts(grids)[:, :NUM_COLOURS] / (height * width)[:, None]
    return torch.cat([torch.stack([height, width], 1) / 10, shares], 1)
