"""The objects of a grid as tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....loaders.batch import each
from ....loaders.grids.objects import FEATURES, Objects, find_objects
from ..quantisers.base import Quantiser
from ..quantisers.config import CodesConfig
from .base import ImageEncoder, Tokens
from .config import GridObjectsConfig

ROUNDS = 16  # of the search for objects where the host cannot wait: as many as any grid of ARC-AGI-1 needs


class GridObjects(ImageEncoder):
    """Finds the objects of each grid, lets those attend to each other whose boxes meet, and averages them.

    A grid without objects has the features of an average of none, which is zero before the last norm.
    """

    def __init__(self, config: GridObjectsConfig):
        super().__init__()
        self.config = config
        width = config.dim
        self.embedding = nn.Sequential(nn.Linear(FEATURES[config.features], width), nn.GELU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(ObjectLayer(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        codes = config.quantiser
        self.quantiser = Quantiser(codes, width) if isinstance(codes, CodesConfig) else None

    @torch.no_grad()
    def objects(self, grids: Tensor) -> Objects:
        """The objects of grids [n, 1, S, S], whose cells are 0 to 9, and 10 outside."""
        config = self.config
        waits = not (torch.compiler.is_compiling() or (grids.is_cuda and torch.cuda.is_current_stream_capturing()))
        rounds = None if waits else ROUNDS
        return find_objects(grids[:, 0].round().long(), config.slots, config.features, config.connectivity, rounds)

    def tokens(self, objects: Objects) -> Tensor:
        """A token for each object, [n, O, D]; those of empty slots are zero."""
        there = objects.present[..., None]
        seen = objects.adjacent if self.config.attention == "adjacent" else objects.present[:, None]
        itself = torch.eye(there.shape[1], dtype=torch.bool, device=there.device)
        tokens = self.embedding(objects.features)
        for layer in self.layers:
            tokens = layer(tokens, (seen | itself)[:, None])
        return torch.where(there, tokens, 0.0)

    def features(self, images: Tensor) -> Tensor:
        return self._encoded(images)[0]

    def with_tokens(self, views: Tensor) -> tuple[Tensor, Tokens]:
        """Features [B, N, D] of views [B, N, 1, S, S], and the tokens of their objects."""
        return each(self._encoded(views.flatten(0, 1)), lambda x: x.unflatten(0, views.shape[:2]))

    def _encoded(self, grids: Tensor) -> tuple[Tensor, Tokens]:
        objects = self.objects(grids)
        tokens = self.tokens(objects)
        found = Tokens(tokens, objects.present, objects.adjacent)
        if self.quantiser is not None:
            quantised = self.quantiser(tokens, objects.present)
            tokens = quantised.tokens
            found = Tokens(tokens, objects.present, objects.adjacent, *quantised[1:])
        there = objects.present[..., None]
        mean = torch.where(there, tokens, 0.0).sum(1) / there.sum(1).clamp(min=1)
        return self.norm(mean.to(self.norm.weight.dtype)), found


class ObjectLayer(nn.Module):
    """Pre-norm attention between objects, and two linear layers."""

    def __init__(self, config: GridObjectsConfig):
        super().__init__()
        width = config.dim
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.first_norm, self.second_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.read, self.write = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor, seen: Tensor) -> Tensor:
        """Tokens [n, O, D] of the same shape; seen, bool [n, 1, O, O], says which ones each attends to."""
        dropped = self.dropout if self.training else 0.0
        parts = self.read(self.first_norm(tokens)).unflatten(-1, (3, self.num_heads, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, dropout_p=dropped)
        tokens = tokens + F.dropout(self.write(found.transpose(1, 2).flatten(2)), dropped)
        return tokens + F.dropout(self.hidden(self.second_norm(tokens)), dropped)
