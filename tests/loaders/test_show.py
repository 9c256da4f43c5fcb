"""The contact sheet."""

import numpy as np
import pytest
import torch
from PIL import Image

from seqjepa.configs.compose import dump
from seqjepa.configs.section import by_kind
from seqjepa.engine.config import compose
from seqjepa.engine.train import main as train
from seqjepa.loaders.config import AffineConfig, AnySequence, DataConfig
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.show import draw_sheet, main


@pytest.mark.parametrize("kind", by_kind(AnySequence))
def test_draws_rows_of_views(kind, tmp_path):
    sheets = {}
    for rows, length in ((2, 3), (4, 3), (2, 5)):
        out = tmp_path / f"{rows}{length}.png"
        data = "arc_programs" if kind == "program" else "digits_affine"
        words = [f"configs/data/{data}.yaml", f"sequence.kind={kind}", f"sequence.num_observed={length}"]
        assert main([*words, "--out", str(out), "--rows", str(rows)]) == 0
        with Image.open(out) as sheet:
            sheets[rows, length] = sheet.size
    (width, height), (_, taller), (wider, _) = sheets.values()
    assert taller > 1.8 * height
    assert wider > 1.4 * width


def test_fewer_images_than_rows_are_all_drawn(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (16, 16), (number, 80, 160)).save(tmp_path / split / "a" / f"{number}.png")
    words = ["configs/smoke.yaml", "data.dataset=imagefolder", f"data.root={tmp_path}"]
    sizes = []
    for rows in (3, 6):
        assert main([*words, "--rows", str(rows), "--out", str(tmp_path / "sheet.png")]) == 0
        with Image.open(tmp_path / "sheet.png") as sheet:
            sizes.append(sheet.size)
    assert sizes[0] == sizes[1]


def test_the_first_view_stands_at_the_left(tmp_path):
    data = DataConfig(dataset="digits", batch_size=4)
    loaders = build_loaders(data, AffineConfig(), seed=42, device=torch.device("cpu"))
    draw_sheet(loaders, 1, tmp_path / "sheet.png")
    batch = next(loaders.train.epoch(0))
    view = (batch.views[0, 0] * loaders.train.std + loaders.train.mean)[0]
    with Image.open(tmp_path / "sheet.png") as sheet:
        # an inch at 160 dots, behind a margin, below the heading, in the middle of a cell 1.08 inches high
        left, top = round(0.06 * 160), round(0.24 * 160)
        cell = sheet.convert("L").crop((left, top, left + 160, top + 160)).resize((24, 24), Image.Resampling.BOX)
    shown = torch.from_numpy(np.array(cell, dtype=np.float32)) / 255
    correlation = torch.corrcoef(torch.stack([shown.flatten(), view.flatten()]))[0, 1]
    assert correlation > 0.9  # another view of the same digit has less, by far


def test_says_what_is_wrong_in_one_line(tmp_path, capsys):
    def refused(part, *words):
        assert main([*words, "--out", str(tmp_path / "sheet.png")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert part in line

    digits = "configs/data/digits_affine.yaml"
    refused("nowhere.yaml: no such config file", "nowhere.yaml")
    refused("cifar100 needs a folder", "configs/data/cifar100_aug.yaml")
    refused("sequence.scale = [2, 1]: must be [lowest, highest]", digits, "sequence.scale=[2,1]")
    refused("sequence.blur = [2, 0]: must be two probabilities", digits, "sequence.kind=augment", "sequence.blur=[2,0]")
    refused("sequence.flip", digits, "sequence.kind=augment", "sequence.flip=2")
    refused("sequence.colour", digits, "sequence.colour=1")
    refused("the sheet depends only on data, sequence, actions", digits, "sequnce.kind=rotation")
    refused("only applies with sequence.kind=augment (it is affine)", digits, "sequence.full_actions=true")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    refused("must be a mapping of sections", str(tmp_path / "list.yaml"))
    (tmp_path / "twisted.yaml").write_text("sequnce: {kind: rotation}")
    refused(
        "twisted.yaml: sequnce = {'kind': 'rotation'}: unknown key, did you mean sequence?", f"{tmp_path}/twisted.yaml"
    )
    for rows in (0, -1, 65, 900):
        refused(f"--rows {rows}: must be from 1 to 64", digits, "--rows", str(rows))
    for seed in (-1, 2**32, 99999999999999999999):
        refused(f"--seed {seed}: must be from 0 to", digits, "--seed", str(seed))
    for name in ("s.xyz", "sheet", "sheet.pdf"):
        assert main([digits, "--out", str(tmp_path / name)]) == 2
        assert f"--out {tmp_path / name}: must be the name of a PNG" in capsys.readouterr().err
    assert main([digits, "--out", str(tmp_path / "a.png"), "--rows", "1", "sequence.num_observed=1"]) == 0
    (tmp_path / "file").write_text("")
    assert main([digits, "--out", str(tmp_path / "file" / "sheet.png")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'file'}: File exists\n"


def test_refuses_what_training_refuses_in_its_words(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SECRET", "hidden")
    monkeypatch.chdir(tmp_path)  # runs/
    (tmp_path / "own.yaml").write_text("data: {root: '${oc.env:SECRET}'}\n")
    (tmp_path / "other.yaml").write_text("run: {name: '${oc.env:SECRET}'}\n")
    (tmp_path / "twice.yaml").write_text("data: {dataset: [digits}\n")
    for word in (
        *("data.root=${oc.env:SECRET}", "data.rooot=3", "data.batch_size=1", "sequence.scale=[2,1]", "data=3"),
        *("data.root=???", "data.root=nowhere", "data.dataset=cifar10", "nowhere.yaml", "=3"),
        *(str(tmp_path / name) for name in ("own.yaml", "other.yaml", "twice.yaml")),
    ):
        words = ["configs/data/digits_affine.yaml", word]
        assert train(words) == 2
        expected = capsys.readouterr().err
        assert main([*words, "--out", str(tmp_path / "sheet.png")]) == 2
        assert capsys.readouterr() == ("", expected)
        assert "hidden" not in expected
    assert not (tmp_path / "sheet.png").exists()


def test_every_section_of_training_may_stand_in_a_file(tmp_path):
    (tmp_path / "whole.yaml").write_text(dump(compose(["configs/smoke.yaml"]).config))
    assert main([str(tmp_path / "whole.yaml"), "--rows", "1", "--out", str(tmp_path / "sheet.png")]) == 0
