"""The objects of a grid as tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....loaders.grids.objects import FEATURES, Objects, find_objects
from ..config import GridObjectsConfig
from .base import ImageEncoder

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
        objects = self.objects(images)
        tokens = self.tokens(objects)
        return self.norm(tokens.sum(1) / objects.present.sum(1, keepdim=True).clamp(min=1))


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
