"""Each figure of a subspace on synthetic sweeps whose answer is known."""

import math

import pytest
import torch

from seqjepa.engine.analysis.subspaces import (
    Sweep,
    fit_circle,
    fit_subspace,
    overlap,
    plane_curves,
    principal_angles,
    subspace_metrics,
)
from seqjepa.engine.evaluation.equivariance import within_share
from seqjepa.engine.reports.figures.subspaces import NetworkSweeps, draw_all
from seqjepa.loaders.sequences import Factor

D, ANCHORS = 32, 40
ANGLES = torch.arange(-180.0, 180.0, 15.0)
LINE = torch.linspace(-1, 1, 9)


def basis(seed=0):
    """An orthonormal basis of R^D in which no direction is a coordinate."""
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(seed)).double())[0]


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def circle(plane, sense=1, radii=None):
    """Every anchor goes round a circle of its own radius and phase in one plane, about a centre of its own."""
    phase = noise(ANCHORS, 1, seed=2)
    radii = torch.ones(ANCHORS, 1) if radii is None else radii
    turn = sense * torch.deg2rad(ANGLES).double() + phase
    curves = radii[..., None] * torch.stack([turn.cos(), turn.sin()], -1)
    return Sweep(rotation(), curves @ plane.T + 5 * noise(ANCHORS, 1, D))


def rotation():
    return Factor("rotation", "degrees", ANGLES, 12, torch.zeros(24, 1), 2, closed=True)


def line(name, direction):
    factor = Factor(name, "steps", LINE, 4, torch.zeros(9, 1), 1)
    return Sweep(factor, LINE.double()[None, :, None] * direction + 5 * noise(ANCHORS, 1, D))


@pytest.mark.parametrize("sense", [1, -1, 2, -3])
def test_a_perfect_circle(sense):
    axes = basis()
    radii = 1 + noise(ANCHORS, 1, seed=3).abs()
    metrics, bases = subspace_metrics({"rotation": circle(axes[:, :2], sense, radii)})
    assert metrics["subspace_ev_rotation_2"] == pytest.approx(1)
    assert metrics["subspace_effrank_rotation"] == pytest.approx(2)
    assert metrics["circle_error_rotation"] == pytest.approx(0, abs=1e-6)
    assert metrics["circle_phase_rotation"] == pytest.approx(1)
    assert metrics["circle_turns_rotation"] == abs(sense)
    assert overlap(bases["rotation"], axes[:, :2]) == pytest.approx(1)


def test_the_turn_is_read_from_a_circle_about_one_centre():
    axes, turn = basis(), torch.deg2rad(ANGLES).double() + noise(ANCHORS, 1, seed=2)
    content = noise(ANCHORS, 1, D - 2, seed=4) @ axes[:, 2:].T

    def read(sense):
        curves = torch.stack([(sense * turn).cos(), (sense * turn).sin()], -1) @ axes[:, :2].T
        return subspace_metrics({"rotation": Sweep(rotation(), curves + content)})[0]["circle_r2_rotation"]

    assert read(1) == read(-1) == pytest.approx(1, abs=1e-3)  # the mean of forty phases is not quite the centre
    # once round for every half turn: polar angle and turn are uncorrelated, and the diagonal is left out
    assert read(2) == pytest.approx(2 * -1 / 23 - 1, abs=0.02)
    assert subspace_metrics({"rotation": circle(axes[:, :2])})[0]["circle_r2_rotation"] < 0  # each has its own centre


def test_circles_in_one_phase_are_shared_and_in_random_ones_are_not():
    axes = basis()
    turn = torch.deg2rad(ANGLES).double()
    same = torch.stack([turn.cos(), turn.sin()], -1) @ axes[:, :2].T
    together = Sweep(rotation(), same + 5 * noise(ANCHORS, 1, D))
    assert subspace_metrics({"rotation": together})[0]["subspace_shared_rotation"] == pytest.approx(1)
    phases = torch.arange(ANCHORS) * 2 * math.pi / ANCHORS  # evenly spread: the mean curve is zero
    turns = turn + phases[:, None]
    apart = torch.stack([turns.cos(), turns.sin()], -1).double() @ axes[:, :2].T
    assert subspace_metrics({"rotation": Sweep(rotation(), apart)})[0]["subspace_shared_rotation"] < 1e-12


def test_noise_is_no_circle():
    shapeless = Sweep(rotation(), noise(ANCHORS, 24, D))
    metrics, _ = subspace_metrics({"rotation": shapeless})
    assert metrics["circle_error_rotation"] > 0.3
    assert metrics["circle_phase_rotation"] < 0.4  # 24**-0.5 = 0.2 by chance, the mean of 40 anchors, the best of eight
    assert metrics["subspace_ev_rotation_2"] < 0.2
    assert metrics["subspace_effrank_rotation"] > 0.8 * D


def test_smooth_curves_that_share_nothing_are_no_circle_though_they_go_round():
    """A low-pass random curve for each anchor: its phase says little, its error and spread say more."""
    turn = torch.deg2rad(ANGLES).double()
    waves = torch.cat([torch.stack([(k * turn).sin(), (k * turn).cos()]) / k for k in (1, 2, 3)])  # [6, S]
    curves = torch.einsum("ws,nwd->nsd", waves, noise(ANCHORS, 6, D, seed=11))
    metrics, _ = subspace_metrics({"rotation": Sweep(rotation(), curves)})
    assert 0.4 < metrics["circle_phase_rotation"] < 0.75
    assert metrics["circle_error_rotation"] > 0.3
    assert metrics["subspace_ev_rotation_2"] < 0.25
    assert metrics["subspace_shared_rotation"] < 0.1


def test_a_factor_that_moves_nothing_has_no_subspace():
    still = Sweep(rotation(), noise(ANCHORS, 1, D).expand(-1, 24, -1))
    metrics, _ = subspace_metrics({"rotation": still, "x": line("x", basis()[:, 0])}, {"rotation": basis()[:, :2]})
    assert metrics.pop("subspace_energy_rotation") == 0
    for name, value in metrics.items():
        assert math.isnan(value) == ("rotation" in name), name


def test_orthogonal_factors_and_a_shared_one():
    axes = basis()
    sweeps = {
        "rotation": circle(axes[:, :2]),
        "x": line("x", axes[:, 2]),
        "y": line("y", axes[:, 3]),
        "z": line("z", axes[:, 0]),  # in the rotation's plane
        "w": line("w", (axes[:, 2] + axes[:, 3]) / math.sqrt(2)),
    }
    metrics, _ = subspace_metrics(sweeps)
    assert metrics["subspace_overlap_x_y"] == pytest.approx(0, abs=1e-9)
    assert metrics["subspace_angle_x_y"] == pytest.approx(90)
    assert metrics["subspace_overlap_rotation_x"] == pytest.approx(0, abs=1e-9)
    assert metrics["subspace_overlap_rotation_z"] == pytest.approx(1)  # a line within the plane
    assert metrics["subspace_angle_rotation_z"] == pytest.approx(0, abs=1e-3)
    assert metrics["subspace_overlap_x_w"] == pytest.approx(0.5)
    assert metrics["subspace_angle_x_w"] == pytest.approx(45)
    assert metrics["subspace_ev_x_1"] == pytest.approx(1)
    # anchors are five times a standard normal apart, so D * 25 between them
    moved = LINE.double().square().mean().item()
    assert metrics["subspace_energy_x"] == pytest.approx(moved / (25 * D), rel=0.1)


def test_a_subspace_overlaps_wholly_with_itself_whatever_its_basis():
    axes = basis()[:, :3]
    turned = axes @ torch.linalg.qr(noise(3, 3))[0]
    assert overlap(axes, turned) == pytest.approx(1)
    assert principal_angles(axes, turned).max().item() < 1e-5
    random = overlap(basis(5)[:, :3], basis(6)[:, :2])
    assert 0 < random < 0.4  # about 3 / 32


def test_principal_angles_are_those_between_planes():
    axes = basis()
    tilt = math.radians(30)
    other = torch.stack([axes[:, 0], math.cos(tilt) * axes[:, 1] + math.sin(tilt) * axes[:, 2]], 1)
    assert principal_angles(axes[:, :2], other).tolist() == pytest.approx([0, 30], abs=1e-5)


def test_coordinates_tell_an_axis_from_a_mixture():
    eye = torch.eye(D).double()
    aligned, _ = subspace_metrics({"x": line("x", eye[:, 3])})
    assert aligned["subspace_coordpr_x"] == pytest.approx(1)
    even, _ = subspace_metrics({"x": line("x", torch.ones(D).double() / math.sqrt(D))})
    assert even["subspace_coordpr_x"] == pytest.approx(D)


def test_stability_is_the_overlap_with_the_basis_before():
    axes = basis()
    tilt = math.radians(60)
    before = {"x": axes[:, :1].float()}
    now = {"x": line("x", math.cos(tilt) * axes[:, 0] + math.sin(tilt) * axes[:, 1])}
    assert subspace_metrics(now, before)[0]["subspace_stability_x"] == pytest.approx(0.25, rel=1e-5)
    assert "subspace_stability_x" not in subspace_metrics(now)[0]


def test_a_circle_is_found_where_it_is():
    turn = torch.linspace(0, 5, 50).double()  # an arc is enough
    points = torch.stack([3 + 2 * turn.cos(), -1 + 2 * turn.sin()], 1)
    found = fit_circle(points)
    assert found.center.tolist() == pytest.approx([3, -1])
    assert (found.radius, found.error) == pytest.approx((2, 0), abs=1e-6)
    # alternately 0.2 inside and outside
    alternating = torch.where(torch.arange(50) % 2 == 0, 1.1, 0.9)[:, None]
    assert fit_circle((points - found.center) * alternating).error == pytest.approx(0.1, abs=0.01)


def test_displacements_know_nothing_of_the_anchors():
    sweep = circle(basis()[:, :2])
    assert sweep.moved.mean(1).abs().max() < 1e-12
    elsewhere = Sweep(rotation(), 3 * sweep.z + 100 * noise(ANCHORS, 1, D, seed=9))
    torch.testing.assert_close(3 * sweep.moved, elsewhere.moved, atol=1e-10, rtol=0)
    assert overlap(fit_subspace(sweep, 2).basis, fit_subspace(elsewhere, 2).basis) == pytest.approx(1)
    curves = plane_curves(elsewhere)
    torch.testing.assert_close(curves.square().sum(-1).mean(1), torch.ones(ANCHORS).double())


def test_what_lies_within_pairs():
    image, view = noise(4000, D, seed=4), noise(2, 4000, D, seed=5)
    assert within_share(image, image) == 0
    assert within_share(view[0], view[1]) == pytest.approx(1, abs=0.02)
    assert within_share(image + view[0], image + view[1]) == pytest.approx(0.5, abs=0.02)
    assert within_share(9 + 7 * (image + view[0]), 9 + 7 * (image + view[1])) == pytest.approx(0.5, abs=0.02)
    assert math.isnan(within_share(torch.ones(3, 2), torch.ones(3, 2)))


def test_every_figure_is_drawn(tmp_path):
    axes = basis()
    seen = NetworkSweeps(
        {"rotation": circle(axes[:, :2]), "x": line("x", axes[:, 2])}, {"z": LINE.abs() + 1, "agg": LINE.abs() + 1}
    )
    paths = draw_all({"trained": seen, "untrained": seen}, tmp_path)
    names = {path.stem for path in paths}
    assert names == {
        *("sweep_traj_rotation", "sweep_traj_x", "eigs_rotation", "eigs_x", "rotation_circle"),
        *("combined_trajectories", "overlap_heatmap", "rank_monitor"),
    }
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
