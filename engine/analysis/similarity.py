"""How alike two networks' features of the same images are. In double precision, for features [N, D] and [N, E]."""

import math

import torch
from torch import Tensor

from .spectra import participation


def linear_cka(one: Tensor, other: Tensor) -> float:
    """Centred kernel alignment with linear kernels: |YᵀX|² / (|XᵀX| |YᵀY|) of centred X and Y, in Frobenius norms.

    It is 1 for features that are equal up to a rotation, a scale and a shift, and 0 for features that are uncorrelated.
    Independent features of rank r have about r / N, so N should be many times the number of dimensions they fill. It
    is NaN if either is constant.

    Source: Kornblith et al. 2019, arXiv 1905.00414, equation 3.
    """
    x, y = _centred(one), _centred(other)
    norms = (x.T @ x).norm() * (y.T @ y).norm()
    return ((y.T @ x).square().sum() / norms).item()


def shared_directions(one: Tensor, other: Tensor) -> float:
    """Overlap of the principal directions of two networks' features, which have the same width.

    Of each, as many are compared as `one` fills (its participation ratio, rounded up, k). It is the mean squared cosine
    of their principal angles: 1 if the same directions carry the variance, about k / D by chance, and no more than the
    share of k that `other` fills. Unlike CKA it sees a rotation, which a head that reads the features would not
    survive. It is NaN if either is constant.
    """
    if not (one.isfinite().all() and other.isfinite().all()):
        return math.nan
    (values, vectors), (spectrum, directions) = _principal(_centred(one)), _principal(_centred(other))
    filled = participation(values)
    if not filled or not spectrum[0]:
        return math.nan
    count = math.ceil(filled - 1e-9)
    real = spectrum[:count] > 1e-9 * spectrum[0]  # the others are arbitrary
    return (vectors[:, :count].T @ directions[:, :count][:, real]).square().sum().item() / count


def _centred(features: Tensor) -> Tensor:
    features = features.double()
    return features - features.mean(0)


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the covariance of centred rows, falling, and eigenvectors as columns."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return values.flip(0).clamp(min=0), vectors.flip(1)
