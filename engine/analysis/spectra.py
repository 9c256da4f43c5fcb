"""Collapse: metrics of the spectra of features, and warnings when they cross a threshold."""

import math

import torch
from torch import Tensor, nn

from ...kernels.precision import widest
from .accumulators import MetricBank, with_float64
from .config import DiagnosticsConfig

COLLAPSE_METRICS = ("effective_rank", "participation", "rankme", "variance", "variance_min", "isotropy", "pair_cosine")
# the reference code's names for the rank (participation ratio of the singular values) of z and of agg
REFERENCE_NAMES = {"z": "rank_eq_eff", "agg": "rank_inv_eff"}
RANKME_EPS = 1e-7
TINY = torch.finfo(torch.float64).tiny


class Moments(nn.Module):
    """First and second moments of features [N, D] and of their directions, on the device."""

    total: Tensor
    products: Tensor
    directions: Tensor
    count: Tensor

    def __init__(self, width: int):
        super().__init__()
        shapes = {"total": (width,), "products": (width, width), "directions": (width,), "count": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape))

    def update(self, features: Tensor) -> None:
        """Add features [N, D]."""
        features = features.detach().to(self.total.dtype)
        self.total += features.sum(0)
        self.products += features.T @ features
        self.directions += nn.functional.normalize(features, dim=-1).sum(0)
        self.count += len(features)

    def spectrum(self) -> Tensor:
        """Singular values of the centred features over √N, in falling order [D]."""
        return torch.linalg.eigvalsh(self._covariance()).clamp(min=0).sqrt().flip(0)

    def _covariance(self) -> Tensor:
        mean = self.total / self.count
        return self.products / self.count - torch.outer(mean, mean)

    def compute(self) -> dict[str, float]:
        """`COLLAPSE_METRICS` and `reference_rank`; all NaN for fewer than two features, or if one is not finite.

        With λ the eigenvalues of the covariance in D dimensions and σ the singular values of the features:

        - effective_rank: exp of the entropy of the centred σ / Σσ (Roy & Vetterli, 2007)
        - participation: (Σλ)² / Σλ²
        - rankme: exp of the entropy of the uncentred σ / Σσ (Garrido et al., arXiv 2210.02885)
        - variance, variance_min: mean and smallest variance of a dimension
        - isotropy: participation over the directions that N features can have, min(N - 1, D); 1 for a sphere
        - pair_cosine: mean cosine of two different features
        - reference_rank: (Σσ)² / Σσ² of the centred σ
        """
        count = self.count.item()
        if count < 2 or not self.products.isfinite().all():
            return dict.fromkeys((*COLLAPSE_METRICS, "reference_rank"), math.nan)
        covariance = self._covariance()
        variances, eigenvalues = covariance.diagonal(), torch.linalg.eigvalsh(covariance).clamp(min=0)
        singular, uncentred = eigenvalues.sqrt(), torch.linalg.eigvalsh(self.products).clamp(min=0).sqrt()
        share, uncentred_share = (values / values.sum().clamp(min=TINY) for values in (singular, uncentred))
        uncentred_share += RANKME_EPS
        return {
            "effective_rank": (-torch.xlogy(share, share).sum()).exp().item(),
            "participation": participation(eigenvalues),
            "reference_rank": participation(singular),
            "isotropy": participation(eigenvalues) / max(1, min(int(count) - 1, len(eigenvalues))),
            "rankme": (-(uncentred_share * uncentred_share.log()).sum()).exp().item(),
            "variance": variances.mean().item(),
            "variance_min": variances.min().clamp(min=0).item(),
            "pair_cosine": ((self.directions.square().sum() - count) / (count * (count - 1))).item(),
        }


@torch.no_grad()
def embedding_figures(rows: Tensor) -> dict[str, Tensor]:
    """What a cloud of embeddings, [N, E] with N of at least 2, looks like; 0-dim each, on their device.

    - rank: exponential of the entropy of the covariance's eigenvalues, from 1 to E
    - isotropy: the smallest eigenvalue of the covariance (plus 1e-6) over the largest; 1 for a sphere
    - variance: mean over dimensions, of which unit vectors cannot have more than 1 / E
    - gauss: 1 / (1 + |skewness| + |kurtosis - 3|), each the mean over dimensions; 1 for a Gaussian
    """
    wide = with_float64(rows).double()
    centred = wide - wide.mean(0)
    variance = centred.square().mean(0)
    eigenvalues = torch.linalg.eigvalsh(centred.T @ centred / (len(rows) - 1)).clamp(min=0)
    share = eigenvalues / eigenvalues.sum().clamp(min=TINY)
    scaled = centred / variance.sqrt().clamp(min=TINY)
    skewness, kurtosis = (scaled**power for power in (3, 4))
    found = {
        "rank": torch.special.entr(share).sum().exp(),
        "isotropy": (eigenvalues[0] + 1e-6) / (eigenvalues[-1] + 1e-6),
        "variance": variance.mean(),
        "gauss": 1 / (1 + skewness.mean(0).abs().mean() + (kurtosis.mean(0) - 3).abs().mean()),
    }
    return {name: value.to(rows.device, widest(rows.device)) for name, value in found.items()}


def spectrum_metrics(moments: MetricBank) -> dict[str, float]:
    """Metrics of the spectra of z and agg, from their collected `Moments`."""
    metrics = {}
    for feature, reference_name in REFERENCE_NAMES.items():
        figures = moments[feature].compute()
        metrics[reference_name] = figures.pop("reference_rank")
        metrics |= {f"{name}_{feature}": value for name, value in figures.items()}
    return metrics


def participation(values: Tensor) -> float:
    """Effective number (Σv)² / Σv² of non-negative values; 0 if all are 0."""
    squares = values.square().sum().item()
    return values.sum().item() ** 2 / squares if squares else 0.0


def collapse_warnings(metrics: dict[str, float], config: DiagnosticsConfig) -> list[str]:
    """One warning for each sign of collapse in the metrics of a validation."""
    found = []
    for feature in REFERENCE_NAMES:
        rank, cosine = metrics[f"participation_{feature}"], metrics[f"pair_cosine_{feature}"]
        if rank < config.min_rank:
            limit = f"participation_{feature}; diagnostics.min_rank = {config.min_rank:g}"
            found.append(f"{feature} varies along {rank:.3g} direction(s) ({limit})")
        if cosine > config.max_cosine:
            limit = f"pair_cosine_{feature}; diagnostics.max_cosine = {config.max_cosine:g}"
            found.append(f"{feature} points the same way for all images: mean cosine {cosine:.4f} ({limit})")
    return found
