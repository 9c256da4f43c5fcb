"""Small subsets of rows that keep as much of their spread as they can."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .accumulators import with_float64


@torch.no_grad()
def largest_rate(features: Tensor, count: int, eps: float) -> Tensor:
    """Numbers, in the order in which they are chosen, of at most `count` rows whose coding rate is large.

    Each step adds the row that raises log det(I + d / (count eps) ZᵀZ) most, where Z are the rows chosen so far, of
    unit length and not centred. With A the matrix in brackets, the gain of z is log(1 + d / (count eps) zᵀA⁻¹z), and
    A⁻¹ changes by rank one (Sherman and Morrison). The rate is submodular, so that this comes within 1 - 1/e of the
    best subset (Nemhauser et al. 1978).

    Args:
        features: [N, d].
        count: number of rows.
        eps: squared distortion of the rate, as in `seqjepa.kernels.coding_rate` with `center=False`.
    """
    rows = F.normalize(with_float64(features).double(), dim=1)
    inverse_weight = count * eps / rows.shape[1]
    solved = rows.clone()  # A⁻¹z of each row
    gains = rows.square().sum(1)
    chosen = []
    for _ in range(min(count, len(rows))):
        best = gains.argmax()
        direction = solved[best].clone()
        shares = rows @ direction
        scale = inverse_weight + shares[best]
        solved -= shares[:, None] * direction / scale
        gains -= shares.square() / scale
        gains[best] = -torch.inf
        chosen.append(best)
    return torch.stack(chosen)
