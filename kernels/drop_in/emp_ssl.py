"""The losses of EMP-SSL (tsb0601/EMP-SSL, loss.py). Source: arXiv 2304.03977; its eps² is `eps` here."""

from __future__ import annotations

from torch import Tensor, nn

from ..coding_rate import coding_rate
from ..internal.checks import check_finite, check_positive, plain
from .common import class_rate, exact, memberships


class TotalCodingRate(nn.Module):
    """-½ R(X; d / (B eps)), rows not centred.

    Differs from the original: it also takes a stack of patches, so that no loop over them is needed.

    Args:
        eps: distortion.
    """

    def __init__(self, eps: float = 0.01):
        super().__init__()
        check_positive(eps=eps)
        self.eps = eps

    def forward(self, X: Tensor) -> Tensor:
        """Loss of rows X [B, d]; of X [..., B, d] the mean over the leading dimensions."""
        return -coding_rate(X, eps=self.eps, center=False).mean() / 2


class MaximalCodingRateReduction(nn.Module):
    """-½ R(X; p / (m eps)) + gamma * ½ Σ_j (m_j / m) R(class j; p / (m_j eps)), rows not centred.

    Differs from the original: numbers for logs are 0-dim tensors, since `.item()` would wait for the device.

    Args:
        eps: distortion.
        gamma: factor of the rate of the classes.
    """

    def __init__(self, eps: float = 0.01, gamma: float = 1):
        super().__init__()
        check_positive(eps=eps)
        check_finite(gamma=gamma)
        self.eps, self.gamma = eps, gamma

    def forward(self, X: Tensor, Y: Tensor, num_classes: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss of rows X [m, p] with labels Y [m] or probabilities Y [m, k], differentiable in Y as well.

        Args:
            X: features.
            Y: class of each row, or its membership in each class.
            num_classes: number of classes. Without it the largest label is read, which waits if it is on a GPU.

        Returns:
            The loss; ½ times the rates of the batch and of the classes.
        """
        X = exact(X)
        members = memberships(Y, num_classes, X) if Y.ndim == 1 else Y.T.to(X.dtype)
        batch = coding_rate(X, eps=self.eps, center=False) / 2
        classes = class_rate(X, members, self.eps)
        return plain(self.gamma) * classes - batch, [batch.detach(), classes.detach()]
