"""The rate loss of the seq-JEPA fork (kaikun213/seq-jepa, experiments/losses/coding_rate.py).

Its `eps` is added to the diagonal, which amounts to a constant and a smaller alpha:

    log det(I + alpha C + eps I) = d log(1 + eps) + R(Zc; alpha / (1 + eps)),    C = Zcᵀ Zc / B, rows centred
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..coding_rate import coding_rate
from ..internal.checks import check_finite, check_positive, plain
from .common import exact


def _check(alpha: float | Tensor, eps: float | Tensor) -> None:
    check_positive(alpha=alpha)
    check_finite(eps=eps)
    if not isinstance(eps, Tensor):  # tensors on a device are not read, so the sum would not be checked
        check_positive(**{"1 + eps": 1 + plain(eps)})


def coding_rate_loss(Z: Tensor, alpha: float = 1.0, eps: float = 1e-4) -> Tensor:
    """-log det(I + alpha C + eps I) of rows Z [B, d]; one value per batch for Z [..., B, d]."""
    _check(alpha, eps)
    eps = plain(eps)
    rate = coding_rate(Z, alpha=plain(alpha) / (1 + eps))
    shift = torch.log1p(torch.ones_like(rate) * eps).to(rate.dtype)
    return -(rate + Z.shape[-1] * shift)


def coding_rate_loss_stable(Z: Tensor, alpha: float = 1.0, eps: float = 1e-4) -> Tensor:
    """-Σ log(1 + alpha max(λ, eps)) over the eigenvalues λ of C, in plain torch; waits for a GPU.

    This is another function than `coding_rate_loss`: directions with λ < eps have no gradient and add a constant each.
    The original needs it where its log-determinant fails; `coding_rate_loss` does not fail there.
    """
    _check(alpha, eps)
    Z, alpha, eps = exact(Z), plain(alpha), plain(eps)
    with torch.autocast(Z.device.type, enabled=False):
        Z = Z - Z.mean(-2, keepdim=True)
        eigenvalues = torch.linalg.eigvalsh(Z.mT @ Z / Z.shape[-2])
    return -torch.log1p(alpha * eigenvalues.clamp(min=eps)).sum(-1)


class CodingRateLoss(nn.Module):
    """Weighted `coding_rate_loss` of the aggregate, of the encoder's features, or of both.

    Args:
        alpha: scale of the covariance.
        eps: number that is added to the diagonal.
        target: `agg_out` for the aggregate, `z_t` for the encoder's features, or `both`.
        lambda_rate: weight of the loss.
        use_stable: whether to use `coding_rate_loss_stable` instead.
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
        _check(alpha, eps)
        check_finite(lambda_rate=lambda_rate)
        if target not in ("agg_out", "z_t", "both"):
            raise ValueError(f"target must be 'agg_out', 'z_t' or 'both', got {target!r}")
        self.alpha, self.eps, self.target, self.lambda_rate = alpha, eps, target, lambda_rate
        self.use_stable = use_stable

    def extra_repr(self) -> str:
        names = ("alpha", "eps", "target", "lambda_rate", "use_stable")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)

    def forward(self, agg_out: Tensor | None = None, z_t: Tensor | None = None) -> Tensor | float:
        """Weighted loss of agg_out [B, d] and z_t [B, d']; 0.0 if the target is None."""
        given = {"agg_out": (agg_out,), "z_t": (z_t,), "both": (agg_out, z_t)}[self.target]
        loss = coding_rate_loss_stable if self.use_stable else coding_rate_loss
        losses = [loss(Z, self.alpha, self.eps) for Z in given if Z is not None]
        return plain(self.lambda_rate) * sum(losses, 0.0)
