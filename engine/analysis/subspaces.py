"""The subspaces in which factors of variation move features, and how these subspaces relate to each other.

In a sweep, one factor moves over a grid, the others stay, and the encoder says what changes. Which factors there are,
and their grids, is the sequence's own (`Sequence.sweeps`). A displacement is a feature minus the mean of its anchor
(the image that is varied) over the sweep, which removes the differences between anchors. All computations are in double
precision, on the CPU.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from ...loaders.loader import SequenceLoader
from ...loaders.sequences import Factor
from ..models.seq_jepa import SeqJEPA
from .spectra import participation

ANCHORS_AT_A_TIME = 16
MOST_TURNS = 4


@dataclass(frozen=True)
class Sweep:
    """Features along a factor, and the directions in which it moves them."""

    factor: Factor
    z: Tensor  # [N, S, D] of N anchors, on the CPU

    @cached_property
    def moved(self) -> Tensor:
        """Displacements, float64 [N, S, D]: features less their anchor's mean over the sweep."""
        z = self.z.double()
        return z - z.mean(1, keepdim=True)

    @cached_property
    def principal(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues [D], falling, and eigenvectors [D, D], as columns, of the displacements' covariance."""
        rows = self.moved.flatten(0, 1)
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
        return values.flip(0).clamp(min=0), vectors.flip(1)

    @property
    def energy(self) -> float:
        """Mean squared displacement: 0 where the factor moves nothing."""
        return self.moved.square().sum(-1).mean().item()


@torch.no_grad()
def sweep(model: SeqJEPA, loader: SequenceLoader, anchors: int, accelerator: Accelerator) -> dict[str, Sweep]:
    """Features of the first images of `loader`, at most `anchors`, along each factor of its sequence.

    The model is in eval mode; the accelerator sets the precision.
    """
    pixels = loader.pixels(anchors)
    found = {}
    for sequence, factors in loader.sequence.sweeps():
        for factor in factors:
            params = factor.params.to(pixels.device)
            parts = []
            for part in pixels.split(ANCHORS_AT_A_TIME):
                views = sequence.render(part, params[None].expand(len(part), -1, -1))  # [n, S, C, H, W]
                with accelerator.autocast():
                    parts.append(model.encoder((views - loader.mean) / loader.std).float())
            # few rows in double precision: a task for the CPU
            found[factor.name] = Sweep(factor, torch.cat(parts).cpu())
    return found


class Subspace(NamedTuple):
    """Principal directions of a factor's displacements."""

    basis: Tensor  # [D, k], orthonormal
    spectrum: Tensor  # [D] eigenvalues of the displacements' covariance, falling

    @property
    def explained(self) -> float:
        """Share of the variance in the k directions."""
        return _ratio(self.spectrum[: self.basis.shape[1]].sum().item(), self.spectrum.sum().item())

    @property
    def effective_rank(self) -> float:
        """Participation ratio of the spectrum, (Σλ)² / Σλ²."""
        return participation(self.spectrum)

    @property
    def coordinates(self) -> float:
        """Participation ratio of the coordinates in the basis: k if it is axis-aligned, D if it is spread evenly."""
        return participation(self.basis.square().sum(1))


class Circle(NamedTuple):
    """A circle fitted to points of a plane."""

    center: Tensor  # [2]
    radius: float
    error: float  # root mean square distance of the points from it, over the radius


def fit_subspace(sweep: Sweep, dims: int) -> Subspace:
    """The `dims` principal directions of a sweep's displacements."""
    values, vectors = sweep.principal
    return Subspace(vectors[:, :dims], values)


def overlap(one: Tensor, other: Tensor) -> float:
    """Mean squared cosine of the principal angles of two bases [D, k]: 1 if one contains the other, 0 if orthogonal.

    Random subspaces overlap by about the larger k over D. The reference code divides by the product of the
    dimensions instead, so that a plane's overlap with itself is one half.
    """
    return (one.T @ other).square().sum().item() / min(one.shape[1], other.shape[1])


def principal_angles(one: Tensor, other: Tensor) -> Tensor:
    """Principal angles of two bases [D, k] in degrees, rising; as many as the smaller k (Björck & Golub, 1973)."""
    cosines = torch.linalg.svdvals(one.T @ other).clamp(max=1)
    return torch.rad2deg(cosines.acos())


def plane_curves(sweep: Sweep) -> Tensor:
    """Displacements [N, S, 2] in their first two principal directions, each anchor's curve scaled to RMS radius 1."""
    curves = sweep.moved @ sweep.principal[1][:, :2]
    return curves / curves.square().sum(-1).mean(1).sqrt()[:, None, None].clamp(min=torch.finfo(curves.dtype).tiny)


def fit_circle(points: Tensor) -> Circle:
    """The circle with the least algebraic distance to points [N, 2] (Kåsa, 1976)."""
    design = torch.cat([2 * points, torch.ones_like(points[:, :1])], dim=1)
    solution = torch.linalg.lstsq(design, points.square().sum(1, keepdim=True)).solution[:, 0]
    center = solution[:2]
    radius = (solution[2] + center.square().sum()).clamp(min=0).sqrt().item()
    distance = (points - center).norm(dim=1) - radius
    return Circle(center, radius, distance.square().mean().sqrt().item() / radius if radius else math.inf)


def _phase(curves: Tensor, degrees: Tensor) -> tuple[float, int]:
    """How well the polar angle of curves [N, S, 2] follows a multiple of the factor's angle [S], and which multiple.

    1 if it does so exactly. Any smooth closed curve goes round in some way and scores 0.5 or 0.6, so compare with the
    control. The curve of an image that looks the same after half a turn goes round twice.
    """
    polar = torch.atan2(curves[..., 1], curves[..., 0])
    turn = torch.deg2rad(degrees.to(polar))
    best = (0.0, 0)
    for turns in range(1, MOST_TURNS + 1):
        for sense in (1, -1):
            locked = torch.polar(torch.ones_like(polar), polar - sense * turns * turn).mean(1).abs().mean().item()
            best = max(best, (locked, turns))
    return best


def _turn_r2(sweep: Sweep) -> float:
    """R² of the sine and cosine of the turn between two steps, read from the plane of the displacements.

    Points are seen from the mean of all anchors, and the angle between two of them is taken for the turn, in the better
    sense of the two. A whole turn in equal steps has variance 1, so that noise scores -1 (over four steps up to -0.7),
    and smooth closed curves about 0. With m the mean over the S steps of exp(i (polar angle -
    turn)), all pairs of steps have the R² 2 |m|² - 1; those of a step with itself are left out.
    """
    points = (sweep.z.double() @ sweep.principal[1][:, :2]).permute(2, 0, 1)  # [2, N, S]
    points = points - points.mean((1, 2), keepdim=True)
    polar, turn = torch.atan2(points[1], points[0]), torch.deg2rad(sweep.factor.values.double())
    steps = len(turn)
    shares = [torch.polar(torch.ones_like(polar), polar - sense * turn).mean(1).abs().square() for sense in (1, -1)]
    pairs = [(steps * share.mean().item() - 1) / (steps - 1) for share in shares]
    return 2 * max(pairs) - 1


def subspace_metrics(
    sweeps: dict[str, Sweep], before: dict[str, Tensor] | None = None
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Metrics of each factor's subspace, and its basis.

    - subspace_ev_<f>_<k>: variance explained by its k principal directions
    - subspace_effrank_<f>: participation ratio of its spectrum
    - subspace_coordpr_<f>: participation ratio of the coordinates in its basis
    - subspace_shared_<f>: share of the variance that is the mean curve of all anchors
    - subspace_energy_<f>: its variance, relative to the variance between anchors
    - subspace_overlap_<f>_<g>, subspace_angle_<f>_<g>: overlap of two factors; smallest principal angle in degrees
    - subspace_stability_<f>: overlap with its basis in `before`
    - circle_error_<f>: distance of an angle's curves in their plane from the fitted circle, over its radius
    - circle_phase_<f>, circle_turns_<f>: how well they follow the angle, and how often they go round in a whole turn
    - circle_r2_<f>: R² of the angle between two steps, read from the plane about the mean of all anchors

    All but the energy are NaN for a factor that moves nothing. Sweeps, and bases of an earlier epoch in `before`, are
    given by the name of their factor.
    """
    metrics, bases = {}, {}
    for name, sweep in sweeps.items():
        factor, energy = sweep.factor, sweep.energy
        found = fit_subspace(sweep, factor.dims)
        if not energy:
            found = Subspace(torch.full_like(found.basis, math.nan), torch.full_like(found.spectrum, math.nan))
        bases[name] = found.basis
        anchors = sweep.z[:, factor.identity].double()
        metrics |= {
            f"subspace_ev_{name}_{factor.dims}": found.explained,
            f"subspace_effrank_{name}": found.effective_rank,
            f"subspace_coordpr_{name}": found.coordinates,
            f"subspace_shared_{name}": _ratio(sweep.moved.mean(0).square().sum(-1).mean().item(), energy),
            f"subspace_energy_{name}": _ratio(energy, (anchors - anchors.mean(0)).square().sum(-1).mean().item()),
        }
        if factor.closed:
            curves = plane_curves(sweep)
            error, (phase, turns) = fit_circle(curves.flatten(0, 1)).error, _phase(curves, factor.values)
            circle = {f"circle_error_{name}": error, f"circle_phase_{name}": phase, f"circle_turns_{name}": turns}
            circle[f"circle_r2_{name}"] = _turn_r2(sweep)
            metrics |= circle if energy else dict.fromkeys(circle, math.nan)
        if before and name in before:
            metrics[f"subspace_stability_{name}"] = overlap(found.basis, before[name].to(found.basis))
    for one, other in combinations(bases, 2):
        metrics[f"subspace_overlap_{one}_{other}"] = overlap(bases[one], bases[other])
        both = sweeps[one].energy and sweeps[other].energy
        angle = principal_angles(bases[one], bases[other])[0].item() if both else math.nan
        metrics[f"subspace_angle_{one}_{other}"] = angle
    return metrics, bases


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
