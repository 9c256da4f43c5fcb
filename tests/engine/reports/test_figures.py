"""Curves that can be read, be there many epochs or one, and whatever a run is called."""

import numpy as np
import pytest
from PIL import Image

from seqjepa.engine.analysis.metrics import METRICS
from seqjepa.engine.reports.figures.curves import draw_curves, epoch_axis, new_figure
from seqjepa.engine.reports.figures.terms import draw_terms

NAMES = ["ep_loss", *(metric.name for metric in METRICS if metric.panel)]
BLUE = (31, 119, 180)  # matplotlib's C0


def pixels(path, colour):
    """Where a colour is, as a share of height and width."""
    image = np.asarray(Image.open(path).convert("RGB"))
    return np.argwhere((image == colour).all(-1)) / image.shape[:2]


@pytest.mark.parametrize("epochs", [[1], [6], [1, 2], range(1, 7), range(5, 2001), []])
def test_an_axis_of_epochs_has_whole_numbers_and_all_of_them_on_it(epochs):
    figure = new_figure(5, 3)
    axes = figure.subplots()
    epoch_axis(axes, epochs)
    figure.canvas.draw()
    low, high = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)
    assert all(low < epoch < high for epoch in epochs)


def test_one_validation_is_a_point_at_its_epoch(tmp_path):
    """It stands where the loss of that epoch does: at the right end."""
    rows = [{"epoch": epoch, "ep_loss": 1 / epoch} for epoch in range(1, 7)]
    rows[-1] |= {name: 0.1 * number for number, name in enumerate(NAMES) if name != "ep_loss"}
    draw_curves(rows, None, tmp_path / "curves.png")
    blue = pixels(tmp_path / "curves.png", BLUE)
    last = max(x for y, x in blue if 0.25 < y < 0.5 and x < 0.5)  # the right edge of the last loss, below its legend
    points = [x for y, x in blue if y > 0.5 and abs(x - 0.5 - last) < 0.02]
    assert len(points) > 10


def test_the_share_of_the_largest_class_is_a_line(tmp_path):
    rows = [{"epoch": 1, "online_linacc_test": 50.0}]
    images = []
    for share in (None, 40.0):
        draw_curves(rows, None, tmp_path / "curves.png", share)
        images.append(np.asarray(Image.open(tmp_path / "curves.png").convert("L")).astype(int))
    columns = (abs(images[1] - images[0]) > 40).any(0)
    assert columns.sum() > 0.1 * len(columns)


@pytest.mark.parametrize("value", [None, "missing"])
def test_no_finite_value_is_said(tmp_path, value):
    rows = [] if value == "missing" else [{"epoch": 1} | dict.fromkeys(NAMES)]
    draw_curves(rows, None, tmp_path / "curves.png")
    image = np.asarray(Image.open(tmp_path / "curves.png").convert("L"))
    height, width = image.shape
    for top in (0, height // 2):
        for left in (0, width // 2):
            centre = image[top + height // 5 : top + height // 3, left + width // 6 : left + width // 2 - width // 8]
            assert (centre < 150).sum() > 50


def test_a_panel_of_terms_is_there_if_it_has_a_metric(tmp_path):
    """Two, side by side: the blue term falls, and its share rises; below them nothing is drawn."""
    rows = [{"epoch": n, "loss_a": 10.0 / n, "share_a": 0.1 * n, "share_b": None} for n in range(1, 9)]
    draw_terms(rows, None, tmp_path / "terms.png")
    blue = pixels(tmp_path / "terms.png", BLUE)
    assert (blue[:, 0] < 0.55).all()
    for left, falls in ((True, True), (False, False)):
        points = np.array([point for point in blue if (point[1] < 0.5) == left and point[0] > 0.15])
        first, last = points[points[:, 1].argmin()], points[points[:, 1].argmax()]
        assert (last[0] > first[0]) == falls  # lower in the picture
    image = np.asarray(Image.open(tmp_path / "terms.png").convert("L"))
    assert (image[image.shape[0] * 6 // 10 :] > 250).all()
    for nothing in (None, float("nan")):
        draw_terms([{"epoch": 1, "loss_a": nothing}], None, tmp_path / "nothing.png")
        assert not len(pixels(tmp_path / "nothing.png", BLUE))  # not in the legend either
