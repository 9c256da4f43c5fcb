"""Layers of the Hub: Hugging Face's `kernelize` puts their `forward` in the place of a plain PyTorch layer's.

A layer here is never constructed. Its annotations are the attributes that the plain layer must have; if one is missing,
the first call raises AttributeError.
"""

# no `from __future__ import annotations`: on Python 3.14 classes would have a member more, which `kernelize` refuses
import torch
from torch import Tensor, nn

from .coding_rate import coding_rate
from .sigreg import sigreg
from .token_statistics import token_statistics_attention

__all__ = ["AttentionTSSA", "CodingRate", "SIGReg"]


class CodingRate(nn.Module):
    """Coding rates [...] of features [..., B, d], for layers with `eps` (a number or a tensor) and `center`."""

    can_torch_compile = True
    eps: float | Tensor
    center: bool

    def forward(self, z: Tensor) -> Tensor:
        return coding_rate(z, eps=self.eps, center=self.center)


class SIGReg(nn.Module):
    """SIGReg [...] of samples [..., N, D], with LeJEPA's factor N, for layers with `num_slices`, `t_max`, `num_points`.

    Every call draws new directions, by a seed from torch's generator of the device of `z`.
    """

    can_torch_compile = True
    num_slices: int
    t_max: float
    num_points: int

    def forward(self, z: Tensor) -> Tensor:
        seed = torch.randint(2**62, (), device=z.device)
        return sigreg(z, num_slices=self.num_slices, t_max=self.t_max, num_points=self.num_points, seed=seed)


class AttentionTSSA(nn.Module):
    """Token-statistics attention [B, N, D] to [B, N, D], for the layer of this name in the code of ToST.

    Raises:
        ValueError: the layer is in training mode and would drop attention weights, which is not possible here.
    """

    can_torch_compile = True
    heads: int
    temp: Tensor
    qkv: nn.Module
    attn_drop: nn.Dropout
    to_out: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.attn_drop.p:
            raise ValueError(f"attn_drop must be 0 in training, got {self.attn_drop.p}")
        w = self.qkv(x).unflatten(-1, (self.heads, -1))
        return self.to_out(token_statistics_attention(w, self.temp.flatten()).flatten(-2))
