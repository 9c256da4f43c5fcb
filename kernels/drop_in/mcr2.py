"""The loss of MCR² (ryanchankh/mcr2, loss.py): expands the batch, compresses each class. Source: arXiv 2006.08558."""

from __future__ import annotations

from torch import Tensor, nn

from ..coding_rate import coding_rate
from ..internal.checks import check_finite, check_positive, plain
from .common import class_rate, exact, memberships


class MaximalCodingRateReduction(nn.Module):
    """-gam2 * ½ R(X; gam1 p / (m eps)) + ½ Σ_j (m_j / m) R(class j; p / (m_j eps)), rows not centred.

    Differs from the original: numbers for logs are 0-dim tensors, since `.item()` would wait for the device. All
    classes are computed as one batch of rates, without membership matrices [k, m, m].

    Args:
        gam1: factor inside the first rate, a number.
        gam2: factor of the first rate.
        eps: distortion.
    """

    def __init__(self, gam1: float = 1.0, gam2: float = 1.0, eps: float = 0.01):
        super().__init__()
        check_positive(gam1=gam1, eps=eps)
        check_finite(gam2=gam2)
        self.gam1, self.gam2, self.eps = gam1, gam2, eps

    def forward(
        self, X: Tensor, Y: Tensor, num_classes: int | None = None
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Loss of rows X [m, p] with labels Y [m].

        Args:
            X: features.
            Y: class of each row, on any device.
            num_classes: number of classes. Without it the largest label is read, which waits if it is on a GPU.

        Returns:
            The loss; ½ times the rates of the batch and of the classes; both once more, computed with gam1 = 1.
        """
        X = exact(X)
        classes = class_rate(X, memberships(Y, num_classes, X), self.eps)
        batch = coding_rate(X, eps=self.eps / plain(self.gam1), center=False) / 2
        # only plain numbers can be compared, since torch.compile traces NumPy's as tensors
        same = isinstance(self.gam1, (int, float)) and self.gam1 == 1
        alike = batch if same else coding_rate(X.detach(), eps=self.eps, center=False) / 2
        loss = classes - plain(self.gam2) * batch
        return loss, [batch.detach(), classes.detach()], [alike.detach(), classes.detach()]
