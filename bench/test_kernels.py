"""Our kernels beside what they replace, forward and backward at one shape each; kernel_table.py has all shapes."""

from __future__ import annotations

from functools import partial

import torch
from kernel_table import (
    DECAY,
    EPS,
    by_logdet,
    eager_sigreg,
    features,
    fused_adamw,
    knots_of,
    network,
    our_adamw,
)
from turns import compiled

from seqjepa.kernels import coding_rate, ema_update_, sigreg
from seqjepa.kernels.directions import directions


def gradient(function, z):
    return lambda: torch.autograd.grad(function(z), z)


def test_coding_rate(beside, device):
    """The aggregate of a batch of 512, as in the paper's configuration."""
    z = features(512, 640, device=device).requires_grad_()
    others = {"torch.logdet": gradient(partial(by_logdet, center=True), z)}
    beside(gradient(partial(coding_rate, eps=EPS), z), others, 1, "calls")


def test_sigreg(beside, device):
    z = torch.randn(512, 64, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    seed = torch.zeros((), dtype=torch.long, device=device)
    eager = partial(eager_sigreg, unit=directions(seed, 64, 1024), table=knots_of(device))
    others = {"eager": gradient(eager, z), "torch.compile": gradient(compiled(eager), z)}
    beside(gradient(partial(sigreg, num_slices=1024, seed=seed), z), others, 1, "calls")


def test_ema(beside, device):
    _, parameters, teacher = network(device)
    own = [t.clone() for t in teacher]
    others = {"_foreach_lerp_": lambda: torch._foreach_lerp_(teacher, parameters, 1 - DECAY)}
    beside(lambda: ema_update_(own, parameters, DECAY), others, 1, "calls")


def test_adamw_ema(beside, device):
    works = []
    for build in (our_adamw, fused_adamw):
        _, parameters, teacher = network(device)
        for p in parameters:
            p.grad = torch.cos(1e3 * p)
        works.append(build(parameters, teacher, device.type == "cuda"))
    beside(works[0], {"AdamW(fused), _foreach_lerp_": works[1]}, 1, "calls")
