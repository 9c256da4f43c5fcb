"""Greedy subsets by coding rate: each step against the project's kernel, and the whole against all subsets."""

import itertools
import math

import torch
import torch.nn.functional as F

from seqjepa.engine.analysis.coresets import largest_rate
from seqjepa.kernels import coding_rate


def rate(rows, count, eps):
    """Of a subset that is filled up to `count` rows with zeros, so that every step divides by the same number."""
    filled = torch.cat([rows, rows.new_zeros(count - len(rows), rows.shape[1])])
    return coding_rate(filled, eps=eps, center=False).item()


def test_every_step_takes_the_row_that_raises_the_rate_most():
    torch.manual_seed(0)
    z = F.normalize(torch.randn(30, 6).double() * torch.linspace(0.2, 2, 6), dim=1)
    chosen = largest_rate(5 * z, 8, 0.5).tolist()  # the length of a row does not matter
    assert len(set(chosen)) == 8
    for step in range(8):
        rates = {row: rate(z[[*chosen[:step], row]], 8, 0.5) for row in set(range(30)) - set(chosen[:step])}
        assert rates[chosen[step]] >= max(rates.values()) - 1e-9


def test_it_is_near_the_best_of_all_subsets():
    torch.manual_seed(1)
    z = F.normalize(torch.randn(10, 4).double(), dim=1)
    best = max(rate(z[list(subset)], 4, 0.5) for subset in itertools.combinations(range(10), 4))
    found = rate(z[largest_rate(z, 4, 0.5)], 4, 0.5)
    assert (1 - 1 / math.e) * best <= found <= best + 1e-9


def test_copies_are_left_out():
    """Of two clusters of copies it takes one each before a second of either."""
    z = torch.tensor([[1.0, 0, 0]] * 5 + [[0, 1.0, 0]] * 5)
    chosen = largest_rate(z, 2, 0.5).tolist()
    assert {row // 5 for row in chosen} == {0, 1}
    assert len(largest_rate(z, 50, 0.5)) == 10
