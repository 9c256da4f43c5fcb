"""Figures of factor sweeps and spectra, with a panel for each network, such as trained and untrained."""

import textwrap
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ...analysis.layers import LayerCurves
from ...analysis.spectra import participation
from ...analysis.subspaces import Sweep, fit_circle, fit_subspace, overlap, plane_curves
from .curves import new_figure

TRAJECTORIES = 8  # number of anchors whose paths are drawn
SPECTRUM = 32
SINGULAR_VALUES = 50
COLUMNS = 4  # number of factors side by side


class NetworkSweeps(NamedTuple):
    """Sweeps and spectra of a network."""

    sweeps: dict[str, Sweep]
    spectra: dict[str, Tensor]  # singular values of centred z and agg, falling
    layers: dict[str, LayerCurves] = {}  # of white-box parts


def draw_all(networks: dict[str, NetworkSweeps], folder: Path) -> list[Path]:
    """Draw all figures of networks, by their titles, that have the same sweeps; returns the PNGs in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    sweeps = next(iter(networks.values())).sweeps
    factors = list(sweeps)
    figures = {f"sweep_traj_{name}": draw_trajectories(networks, name) for name in factors}
    figures |= {f"eigs_{name}": draw_spectrum(networks, name) for name in factors}
    figures |= {f"{name}_circle": draw_circle(networks, name) for name in factors if sweeps[name].factor.closed}
    if factors:
        figures["combined_trajectories"] = draw_combined(networks, factors)
    if len(factors) > 1:
        figures["overlap_heatmap"] = draw_overlap(networks, factors)
    figures["rank_monitor"] = draw_ranks(networks)
    figures |= {f"layers_{part}": draw_layers(networks, part) for part in next(iter(networks.values())).layers}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    return [folder / f"{name}.png" for name in figures]


def _panels(networks: dict[str, NetworkSweeps], width: float, height: float, rows: int = 1):
    """A figure with a column for each network, and its axes [rows, columns]; width and height are those of a panel."""
    figure = new_figure(width * len(networks), height * rows)
    return figure, figure.subplots(rows, len(networks), squeeze=False)


def _captioned(figure, *sentences: str):
    """The figure with sentences above its panels: what they show, and how an ideal encoder would look."""
    width = round(13 * figure.get_figwidth())  # characters
    figure.suptitle("\n".join(line for sentence in sentences for line in textwrap.wrap(sentence, width)), fontsize=10)
    return figure


def _curves(sweep: Sweep) -> tuple[Tensor, float]:
    """Displacements [N, S, 2] in their first two principal directions, and the share of variance in these."""
    plane = fit_subspace(sweep, 2)
    return sweep.moved @ plane.basis, plane.explained


def draw_trajectories(networks: dict[str, NetworkSweeps], name: str):
    """Paths of single images in the plane of the factor; an equivariant encoder gives all of them the same path."""
    figure, axes = _panels(networks, 4.4, 4.6)
    for column, (title, network) in zip(axes[0], networks.items(), strict=True):
        factor = network.sweeps[name].factor
        curves, explained = _curves(network.sweeps[name])
        for number, curve in enumerate(curves[:TRAJECTORIES].tolist()):
            x, y = zip(*([*curve, curve[0]] if factor.closed else curve), strict=True)
            column.plot(x, y, color=f"C{number}", linewidth=1, alpha=0.8)
            column.plot(x[0], y[0], "o", color=f"C{number}", markersize=5)
            column.plot(x[len(curve) - 1], y[len(curve) - 1], "s", color=f"C{number}", markersize=4)
        column.set(title=f"{title}: {explained:.0%} of the variance", xlabel="PC 1", ylabel="PC 2")
        column.set(aspect="equal", adjustable="datalim")
        column.grid(alpha=0.3)
    first, last = factor.values[0].item(), factor.values[-1].item()
    return _captioned(
        figure,
        f"{name}: paths of {min(TRAJECTORIES, len(curves))} images through z",
        f"circle at {first:g}, square at {last:g} {factor.unit}; equivariant: paths of one shape",
    )


def draw_circle(networks: dict[str, NetworkSweeps], name: str):
    """All points of an angle's curves in their plane, coloured by the angle, with the fitted circle.

    Each curve is turned so that its unchanged image is on the right: an encoder may give each image its own phase.
    """
    figure, axes = _panels(networks, 4.6, 4.8)
    for column, (title, network) in zip(axes[0], networks.items(), strict=True):
        sweep = network.sweeps[name]
        curves = torch.view_as_complex(plane_curves(sweep).contiguous())
        first = curves[:, sweep.factor.identity, None]
        points = torch.view_as_real(curves * torch.polar(torch.ones_like(first.real), -first.angle())).flatten(0, 1)
        angles = sweep.factor.values.repeat(len(curves))
        shown = column.scatter(*points.T.tolist(), c=angles.tolist(), cmap="hsv", s=4, alpha=0.6, vmin=-180, vmax=180)
        circle = fit_circle(points)
        turn = torch.linspace(0, 2 * torch.pi, 200, dtype=torch.float64)
        outline = circle.center + circle.radius * torch.stack([turn.cos(), turn.sin()], dim=1)
        column.plot(*outline.T.tolist(), "k--", linewidth=1)
        column.set(title=f"{title}: error {circle.error:.0%} of the radius", xlabel="towards the unchanged image")
        column.set(xlim=(-2.5, 2.5), ylim=(-2.5, 2.5), aspect="equal")
        column.grid(alpha=0.3)
    figure.colorbar(shown, ax=axes[0].tolist(), label="degrees", shrink=0.8)
    return _captioned(
        figure,
        f"{name}: z of {len(curves)} images in its plane, each curve at rms radius 1, its unchanged image on the right",
        "equivariant: colours in order around the dashed circle; otherwise a blob",
    )


def draw_combined(networks: dict[str, NetworkSweeps], factors: list[str]):
    """Every factor's points in its own plane, coloured by the factor's value; a row for each network."""
    lines = [factors[start : start + COLUMNS] for start in range(0, len(factors), COLUMNS)]
    cells = [(title, network, line) for line in lines for title, network in networks.items()]
    width = len(lines[0])
    figure = new_figure(3.2 * width, 3.2 * len(cells) + 0.4)
    for row, (title, network, line) in zip(figure.subplots(len(cells), width, squeeze=False), cells, strict=True):
        for column in row[len(line) :]:
            column.set_axis_off()
        for column, name in zip(row, line, strict=False):
            factor = network.sweeps[name].factor
            curves, explained = _curves(network.sweeps[name])
            values = factor.values.repeat(len(curves)).tolist()
            colours = "hsv" if factor.closed else "viridis"
            column.scatter(*curves.flatten(0, 1).T.tolist(), c=values, cmap=colours, s=3, alpha=0.5)
            mean = curves.mean(0)
            column.plot(*(torch.cat([mean, mean[:1]]) if factor.closed else mean).T.tolist(), "k-", linewidth=1.2)
            column.set_title(f"{name}, {title}: {explained:.0%}", fontsize=9)
            column.set(xticks=[], yticks=[])
    return _captioned(
        figure,
        "Displacements of z in each factor's first two directions, share of its variance; black: mean of all images",
        "equivariant: colours in order along the black path (a loop for rotation); otherwise in no order",
    )


def draw_layers(networks: dict[str, NetworkSweeps], part: str):
    """Coding rate in each layer's subspaces, before and after its attention, and sparsity of its codes."""
    sparse = bool(next(iter(networks.values())).layers[part].zeros)
    figure = new_figure(9 if sparse else 5, 3.8)
    panels = figure.subplots(1, 2 if sparse else 1, squeeze=False)[0]
    for number, (title, network) in enumerate(networks.items()):
        found, colour = network.layers[part], f"C{number}" if number == 0 else "0.5"
        layers = range(1, len(found.rate) + 1)
        panels[0].plot(layers, found.rate, "o-", color=colour, label=title)
        for layer, before, after in zip(layers, found.rate, found.rate_after, strict=True):
            panels[0].annotate(
                "", (layer + 0.35, after), (layer, before), arrowprops={"arrowstyle": "->", "color": colour}
            )
            panels[0].update_datalim([(layer + 0.35, after)])  # axes make no room for arrows by themselves
        if sparse:
            panels[1].plot(layers, found.zeros, "o-", color=colour, label=title)
    panels[0].autoscale_view()
    panels[0].set(title="coding rate; arrow: what attention does", xlabel="layer", ylabel="nats, sum over heads")
    if sparse:
        panels[1].set(title="share of zeros among the codes", xlabel="layer", ylim=(0, 1))
    for column in panels:
        column.set_xticks(layers)
        column.grid(alpha=0.3)
        column.legend(fontsize=8)
    return _captioned(
        figure,
        f"layers of the {part}, on a batch of test sequences",
        "compression: the rate falls from layer to layer, and more than in the untrained network",
    )


def draw_spectrum(networks: dict[str, NetworkSweeps], name: str):
    """Spectrum of a factor's displacements, on a linear scale above and a logarithmic one below."""
    figure, axes = _panels(networks, 4.4, 2.4, rows=2)
    for place, (title, network) in enumerate(networks.items()):
        sweep = network.sweeps[name]
        found = fit_subspace(sweep, sweep.factor.dims)
        shares = (found.spectrum / found.spectrum.sum())[:SPECTRUM].tolist()
        for row, scale in enumerate(("linear", "log")):
            column = axes[row, place]
            column.bar(range(1, len(shares) + 1), shares, color="C0" if place == 0 else "C7")
            column.axvline(sweep.factor.dims + 0.5, color="r", linestyle="--", linewidth=1)
            column.set_yscale(scale)
            column.set(ylim=(0, 1) if scale == "linear" else (1e-5, 1.2), ylabel="share of variance")
            column.grid(alpha=0.3)
        ranks = f"{found.explained:.0%} in {sweep.factor.dims}, effective rank {found.effective_rank:.1f}"
        axes[0, place].set_title(f"{title}: {ranks}", fontsize=9)
        axes[1, place].set_xlabel("direction")
    ideal = "equivariant: all variance left of the red line"
    return _captioned(figure, f"{name}: spectrum of z's displacements", ideal)


def draw_overlap(networks: dict[str, NetworkSweeps], factors: list[str]):
    """Overlap of the factors' subspaces, from 0 (orthogonal) to 1 (one contains the other)."""
    figure, axes = _panels(networks, 1.6 + 0.75 * len(factors), 2.2 + 0.7 * len(factors))
    for column, (title, network) in zip(axes[0], networks.items(), strict=True):
        bases = [fit_subspace(sweep, sweep.factor.dims).basis for sweep in network.sweeps.values()]
        values = [[overlap(one, other) for other in bases] for one in bases]
        shown = column.imshow(values, cmap="RdYlGn_r", vmin=0, vmax=1)
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                column.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
        column.set_xticks(range(len(factors)), factors, rotation=45, ha="right", fontsize=8)
        column.set_yticks(range(len(factors)), factors, fontsize=8)
        column.set_title(title)
    figure.colorbar(shown, ax=axes[0].tolist(), shrink=0.8)
    return _captioned(
        figure,
        f"Overlap of the factors' subspaces of z; about {2 / bases[0].shape[0]:.3f} by chance",
        "disentangled: 1 on the diagonal, 0 elsewhere",
    )


def draw_ranks(networks: dict[str, NetworkSweeps]):
    """Singular values of z and of agg over the test images, each normalised by their sum."""
    figure = new_figure(9.0, 3.6)
    features = list(next(iter(networks.values())).spectra)
    for axes, feature in zip(figure.subplots(1, len(features), squeeze=False)[0], features, strict=True):
        for number, (title, network) in enumerate(networks.items()):
            singular = network.spectra[feature]
            shares = (singular / singular.sum())[:SINGULAR_VALUES].tolist()
            label = f"{title}: rank {participation(singular):.1f} of {len(singular)}"
            axes.plot(range(1, len(shares) + 1), shares, ("-", "--")[number % 2], color=f"C{number}", label=label)
        axes.set(yscale="log", xlabel="direction", ylabel="share of singular values", title=feature)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return _captioned(
        figure,
        "Spectra over the test images; rank: participation ratio of the singular values",
        "collapse: the line falls at once",
    )
