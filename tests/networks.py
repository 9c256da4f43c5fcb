"""Parameters of several shapes, and their gradients, for tests of the optimiser."""

import torch
from torch import nn

SHAPES = [(1,), (63,), (7, 5), (3, 2, 4, 4), (5000,)]


def parameters(device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype)) for shape in SHAPES]


def give_gradients(params, step, scale=1.0):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = (scale * torch.randn(p.shape, generator=generator)).to(p.device, p.dtype)
