"""The rate loss of the seq-JEPA fork (kaikun213/seq-jepa, experiments/losses/coding_rate.py).

Its `eps` is added to the diagonal, which is a constant and a smaller alpha:

    log det(I + alpha C + eps I) = d log(1 + eps) + R(Zc; alpha / (1 + eps)),    C = Zcᵀ Zc / B, rows centred
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from ..coding_rate import coding_rate


def coding_rate_loss(Z: Tensor, alpha: float = 1.0, eps: float = 1e-4) -> Tensor:
    """-log det(I + alpha C + eps I) of rows Z [B, d]; of Z [..., B, d], one a batch."""
    return -(Z.shape[-1] * math.log1p(eps) + coding_rate(Z, alpha=alpha / (1 + eps)))


class CodingRateLoss(nn.Module):
    """`coding_rate_loss` of the aggregate, of the encoder's features, or of both, with a weight.

    Differs from the original: there is no `use_stable`, which clamps eigenvalues and so is another function; this one
    does not fail where that was of use.

    Args:
        alpha: scale of the covariance.
        eps: what is added to the diagonal, a number.
        target: `agg_out`, `z_t` or `both`.
        lambda_rate: weight.
        use_stable: False.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        eps: float = 1e-4,
        target: str = "agg_out",
        lambda_rate: float = 0.01,
        use_stable: bool = False,
    ):
        super().__init__()
        if use_stable:
            raise ValueError("use_stable=True clamps eigenvalues, which is a different function: leave it False")
        if target not in ("agg_out", "z_t", "both"):
            raise ValueError(f"target must be 'agg_out', 'z_t' or 'both', got {target!r}")
        self.alpha, self.eps, self.target, self.lambda_rate = alpha, eps, target, lambda_rate

    def forward(self, agg_out: Tensor | None = None, z_t: Tensor | None = None) -> Tensor | float:
        """Weighted loss of agg_out [B, d] and z_t [B, d']; 0.0 where the target is not given."""
        given = {"agg_out": agg_out, "z_t": z_t}
        names = ("agg_out", "z_t") if self.target == "both" else (self.target,)
        losses = [coding_rate_loss(given[name], self.alpha, self.eps) for name in names if given[name] is not None]
        return self.lambda_rate * sum(losses, 0.0)
