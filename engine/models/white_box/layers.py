"""Layers that are derived from steps that lower a coding rate or an l1 objective: those of CRATE, CRATE-α and ToST.

Letters: B batch, N tokens, d width of a token, h heads, p = d / h.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....kernels.precision import widest
from ....kernels.token_statistics import token_statistics_attention
from ..aggregators.config import TostConfig
from .config import CrateLayers

RATE_EPS = 0.01  # of the published curves of the rate by layer
POWER_ITERATIONS = 100
LONG_STEP = 1.8  # near the limit of 2, beyond which a step of the sparse coding need not descend


class Step(NamedTuple):
    """What a layer did to its tokens, for the figures of a network's layers."""

    before: Tensor  # [B, h, N, p] tokens in the subspaces of the heads, before the layer's attention
    after: Tensor  # the same after it
    codes: Tensor | None  # [B, N, k] of its sparse coding; k is d, or more if it is overcomplete. None without one


def subspace_rate(projected: Tensor) -> Tensor:
    """Coding rate R^c of tokens in the subspaces of the heads, [B, h, N, p] -> 0-dim: a sum over heads, a mean over B.

    ½ log det(I + p / (N ε) W Wᵀ) of projections W that have unit length, with ε = 0.01, which is not squared: what the
    code of arXiv 2306.01129 draws by layer.
    """
    rows = F.normalize(projected.to(widest(projected.device)), dim=-1)
    tokens, width = rows.shape[-2:]
    gram = torch.eye(tokens, dtype=rows.dtype, device=rows.device) + rows @ rows.mT * (width / (tokens * RATE_EPS))
    return torch.linalg.slogdet(gram).logabsdet.sum(1).mean() / 2


class SubspaceAttention(nn.Module):
    """MSSA of CRATE: multi-head attention in which one projection is query, key and value, [B, N, d] -> [B, N, d].

    Source: arXiv 2306.01129, its MSSA. A convex mix of tokens and attention lowers R^c; the sum that the layers use
    is its form without a scale, and need not.
    """

    def __init__(self, width: int, heads: int, dropout: float, *, bias: bool = True):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.subspaces = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=bias)

    def project(self, x: Tensor) -> Tensor:
        """Tokens [B, N, d] in the subspaces of the heads, [B, h, N, p]."""
        return self.subspaces(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.project(x)
        rate = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(w, w, w, dropout_p=rate)
        return self.out(mixed.transpose(1, 2).flatten(2))


class ISTA(nn.Module):
    """A proximal gradient step of non-negative sparse coding by a square dictionary D, [B, N, d] -> [B, N, d], >= 0.

    relu(u + η (u D - (u Dᵀ) D) - η λ): the step of min over z >= 0 of ½ |u - z Dᵀ|² + λ |z|₁ that starts at z = u.
    Source: arXiv 2306.01129, its ISTA block.
    """

    residual = False  # whether the layer adds its input
    no_decay = ("dictionary",)  # decay would change the step of the algorithm

    def __init__(self, width: int, step: float, threshold: float):
        super().__init__()
        self.step, self.threshold = step, threshold
        self.dictionary = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.dictionary)

    def codes(self, u: Tensor) -> Tensor:
        """Sparse codes [B, N, k]."""
        gradient = (u - u @ self.dictionary.mT) @ self.dictionary
        return F.relu(u + self.step * (gradient - self.threshold))

    def forward(self, u: Tensor) -> Tensor:
        return self.codes(u)


class OvercompleteISTA(nn.Module):
    """Two proximal steps by an overcomplete dictionary D [d, 4 d], and a synthesis by another, as in CRATE-α.

    z₁ = relu(η u D - η λ); z₂ = relu(z₁ - η (z₁ Dᵀ - u) D - η λ); the output is z₂ D₁ᵀ. Source: arXiv 2405.20299.
    Both dictionaries start with variance 1 / (2 d), which is torch's reading of `kaiming_uniform_`.
    """

    residual = True
    no_decay = ("dictionary", "synthesis")

    def __init__(self, width: int, step: float, threshold: float):
        super().__init__()
        self.step, self.threshold = step, threshold
        self.dictionary, self.synthesis = (nn.Parameter(torch.empty(width, 4 * width)) for _ in range(2))
        nn.init.kaiming_uniform_(self.dictionary)
        nn.init.kaiming_uniform_(self.synthesis)

    def codes(self, u: Tensor) -> Tensor:
        """Sparse codes [B, N, 4 d]."""
        z = F.relu(self.step * (u @ self.dictionary - self.threshold))
        gradient = (u - z @ self.dictionary.mT) @ self.dictionary
        return F.relu(z + self.step * (gradient - self.threshold))

    def forward(self, u: Tensor) -> Tensor:
        return self.codes(u) @ self.synthesis.mT


class CrateLayer(nn.Module):
    """Compression by attention in subspaces, then sparse coding: [B, N, d] -> [B, N, d]."""

    def __init__(self, config: CrateLayers, width: int):
        super().__init__()
        alpha = config.coding == "overcomplete"
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width, eps=1e-6 if alpha else 1e-5)
        self.attention = SubspaceAttention(width, config.num_heads, config.dropout, bias=not alpha)
        self.coding = (OvercompleteISTA if alpha else ISTA)(width, config.step, config.threshold)
        self.dropout = nn.Dropout(config.dropout)
        self.longest = config.longest_step

    def compress(self, x: Tensor) -> Tensor:
        """Tokens after the attention."""
        return x + self.dropout(self.attention(self.norm1(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.compress(x)
        found = self.coding(self.norm2(x))
        return x + found if self.coding.residual else found

    def observe(self, x: Tensor) -> tuple[Tensor, Step]:
        """The output for tokens x, and what the layer did to them."""
        between = self.compress(x)
        before, after = (self.attention.project(self.norm1(tokens)) for tokens in (x, between))
        return self(x), Step(before, after, self.coding.codes(self.norm2(between)))

    @torch.no_grad()
    def step_length(self) -> Tensor:
        """η |D|₂², 0-dim, by power iteration, which is a little low: below 2 a step never raises the objective."""
        dictionary = self.coding.dictionary.float()
        direction = dictionary.new_ones(dictionary.shape[1])
        for _ in range(POWER_ITERATIONS):
            direction = F.normalize((dictionary @ direction) @ dictionary, dim=0)
        return self.coding.step * (dictionary @ direction).square().sum()

    @property
    def is_limited(self) -> bool:
        """Whether the dictionary is trained, and its step has a limit."""
        return self.longest is not None and self.coding.dictionary.requires_grad

    @torch.no_grad()
    def clip(self) -> None:
        """Shrink a dictionary whose step is longer than allowed."""
        if self.longest is not None:
            self.coding.dictionary.mul_((self.longest / self.step_length()).sqrt().clamp(max=1))


class TokenStatistics(nn.Module):
    """TSSA of ToST: attention whose weights are statistics of all tokens, in time linear in their number.

    With `causal`, each token sees statistics of itself and the tokens before it, without the learnt bias for each
    position that the authors' language model adds. [B, N, d] -> [B, N, d].
    Source: arXiv 2412.17810, its TSSA.
    """

    no_decay = ("temperature",)

    def __init__(self, width: int, heads: int, *, causal: bool):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.subspaces = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.temperature = nn.Parameter(torch.ones(heads, 1))

    def project(self, x: Tensor) -> Tensor:
        """Tokens [B, N, d] in the subspaces of the heads, [B, h, N, p]."""
        return self.subspaces(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.project(x).transpose(1, 2)
        mixed = token_statistics_attention(w, self.temperature[:, 0], causal=self.causal)
        return self.out(mixed.flatten(2))


class TostLayer(nn.Module):
    """Token-statistics attention and an MLP, each scaled by a learnt gain and added: [B, N, d] -> [B, N, d]."""

    def __init__(self, config: TostConfig, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attention = TokenStatistics(width, config.num_heads, causal=config.causal)
        self.mlp = mlp(width)
        self.gain1, self.gain2 = (nn.Parameter(torch.full((width,), config.gain)) for _ in range(2))
        self.apply(_truncated)

    def compress(self, x: Tensor) -> Tensor:
        """Tokens after the attention."""
        return x + self.gain1 * self.attention(self.norm1(x))

    def forward(self, x: Tensor) -> Tensor:
        x = self.compress(x)
        return x + self.gain2 * self.mlp(self.norm2(x))

    def observe(self, x: Tensor) -> tuple[Tensor, Step]:
        """The output for tokens x, and what the layer did to them."""
        between = self.compress(x)
        before, after = (self.attention.project(self.norm1(tokens)) for tokens in (x, between))
        return self(x), Step(before, after, None)


class ClassAttention(nn.Module):
    """A layer in which one token alone attends, to itself and all others: ToST's read-out (CaiT's, arXiv 2103.17239).

    The read-out [B, 1, d] and tokens [B, N, d] -> the read-out [B, 1, d].
    """

    def __init__(self, width: int, heads: int, gain: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.mlp = mlp(width)
        self.gain1, self.gain2 = (nn.Parameter(torch.full((width,), gain)) for _ in range(2))
        self.apply(_truncated)

    def forward(self, readout: Tensor, tokens: Tensor) -> Tensor:
        x = self.norm1(torch.cat([readout, tokens], dim=1))
        given = (self.query(x[:, :1]), self.key(x), self.value(x))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in given)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        readout = readout + self.gain1 * self.out(mixed)
        return readout + self.gain2 * self.mlp(self.norm2(readout))


class WhiteBox(nn.Sequential):
    """A stack of white-box layers, [B, N, d] -> [B, N, d]."""

    def observe(self, x: Tensor) -> Iterator[Step]:
        """What each layer in turn does to tokens x."""
        layers: Any = self
        for layer in layers:
            x, step = layer.observe(x)
            yield step


def mlp(width: int) -> nn.Sequential:
    """Two layers with GELU, four times as wide between them."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _truncated(module: nn.Module) -> None:
    """ToST's initial weights."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
