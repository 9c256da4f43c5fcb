"""Own images: val/ for test/, one folder alone, no classes, any size."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

import seqjepa
from seqjepa.configs.errors import InputError
from seqjepa.engine.train import main
from seqjepa.loaders.config import AffineConfig, DataConfig, SequenceConfig
from seqjepa.loaders.images.files import ImageFiles
from seqjepa.loaders.images.folder import list_images
from seqjepa.loaders.loader import build_loaders

FOLDER = ("data.dataset=imagefolder", "data.name=own", "gates.rules={}", "eval.best_metric=online_r2_test")


def photographs(folder, count=12, seed=0, size=None):
    """JPEGs of many shapes, smooth so that resizing can be checked."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    for number in range(count):
        width, height = size or rng.integers(30, 90, 2).tolist()
        pixels = rng.integers(0, 256, (4, 4, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.jpg")
    return folder


def loaders(root, **settings):
    data = DataConfig(dataset="imagefolder", root=str(root), batch_size=2, **{"size": 24, **settings})
    sequence: SequenceConfig = AffineConfig()
    return build_loaders(data, sequence, seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["test", "val", "valid", "validation"])
def test_what_is_validated_on_may_have_any_usual_name(tmp_path, name):
    for split, count in (("train", 6), (name, 4)):
        for label in ("cat", "dog"):
            photographs(tmp_path / split / label, count, seed=hash((split, label)) % 100)
    found = loaders(tmp_path)
    assert (len(found.train.sampler.indices), len(found.validation.sampler.indices)) == (12, 8)
    assert found.classes == ["cat", "dog"]
    assert found.notice is None
    assert found.validated_on == name
    (tmp_path / "train" / "dog").rename(tmp_path / "train" / "bird")
    with pytest.raises(InputError, match=f"train and {name} differ in classes: train alone has bird"):
        loaders(tmp_path)


def test_test_comes_before_val(tmp_path):
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        photographs(tmp_path / split / "cat", count, seed=count)
    assert len(loaders(tmp_path).validation.sampler.indices) == 4


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_tenth_of_one_folder_is_held_out_and_said_so(tmp_path, inside):
    photographs(tmp_path / "own" / inside, 30)
    one = loaders(tmp_path / "own")
    assert f"{tmp_path / 'own'}: no test/ or val/; 3 of 30 images are held out" in str(one.notice)
    train, held_out = set(one.train.sampler.indices), set(one.validation.sampler.indices)
    assert (len(train), len(held_out)) == (27, 3)
    assert not train & held_out
    assert held_out == set(loaders(tmp_path / "own").validation.sampler.indices)
    assert held_out != set(loaders(tmp_path / "own", subset_seed=1).validation.sampler.indices)
    assert len(loaders(tmp_path / "own", held_out=7).validation.sampler.indices) == 7
    assert len(loaders(tmp_path / "own", val_subset=2).validation.sampler.indices) == 2
    assert one.num_classes is None
    assert not one.train.labels().any()


@pytest.mark.parametrize("settings", [{}, {"held_out": 20}, {"held_out": 1}, {"subset_seed": 1}])
@pytest.mark.parametrize("of_run", [{"val_subset": 1}, {"held_out": 9, "train_subset": 12}])
def test_held_out_images_that_a_run_of_other_settings_trains_on_are_told_apart(tmp_path, settings, of_run):
    photographs(tmp_path / "own", 30)
    found, run = loaders(tmp_path / "own", **settings), loaders(tmp_path / "own", **of_run)
    held_out, trained = set(found.validation.sampler.indices), set(run.train.sampler.indices)
    assert set(found.unseen(DataConfig(**of_run))) == held_out - trained


def test_one_folder_with_classes(tmp_path):
    photographs(tmp_path / "cat", 10)
    photographs(tmp_path / "dog", 10, seed=1)
    found = loaders(tmp_path)
    assert found.classes == ["cat", "dog"]
    assert sorted([*found.train.labels(), *found.validation.labels()]) == [0] * 10 + [1] * 10


def test_images_beside_class_folders_are_still_passed_over(tmp_path, capsys):
    photographs(tmp_path / "cat", 4)
    Image.new("RGB", (9, 9)).save(tmp_path / "stray.png")
    classes, paths, _ = list_images(tmp_path)
    assert (classes, len(paths)) == (["cat"], 4)
    assert "stray.png" in capsys.readouterr().err


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 90), (24, 24), (23, 71)])
def test_the_middle_square_is_resized(tmp_path, width, height):
    """A horizontal and a vertical ramp keep their slopes and centres, whatever the shape was."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    side = min(width, height)
    ramps = [128 + 100 * (x + 0.5 - width / 2) / side, 128 + 100 * (y + 0.5 - height / 2) / side, 0 * x]
    Image.fromarray(np.stack(ramps, -1).round().astype(np.uint8)).save(tmp_path / "ramp.png")
    (found,) = ImageFiles([str(tmp_path / "ramp.png")], 24)[0:1]
    wanted = 128 + 100 * (np.arange(24) + 0.5 - 12) / 24
    inner = slice(2, -2)  # at the edges a bicubic filter sees no further
    assert np.abs(found[:, inner, 0] - wanted[None, inner]).max() <= 1.5
    assert np.abs(found[inner, :, 1] - wanted[inner, None]).max() <= 1.5


def test_resizing_is_antialiased(tmp_path):
    """Stripes of one pixel become gray; the nearest pixels would stay black or white."""
    stripes = np.zeros((96, 96, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    (found,) = ImageFiles([str(tmp_path / "stripes.png")], 24)[0:1]
    assert np.abs(found[:, 3:-3].astype(int) - 127).max() < 20


def test_a_jpeg_that_is_decoded_smaller_is_nearly_the_same(tmp_path):
    photographs(tmp_path / "own", 1, size=(640, 480))
    (path,) = (tmp_path / "own").iterdir()
    whole = Image.open(path).convert("RGB")
    whole.save(tmp_path / "whole.png")
    jpeg, png = (ImageFiles([str(file)], 32)[0:1].astype(int) for file in (path, tmp_path / "whole.png"))
    assert np.abs(jpeg - png).mean() < 2


def test_unlabelled_images_train_evaluate_and_export(tmp_path, tiny, folder_of, capsys):
    photographs(tmp_path / "own", 40)
    words = tiny(*FOLDER, f"data.root={tmp_path / 'own'}", "data.size=24", "data.batch_size=16", "data.train_subset=36")
    assert main([*words, "run.epochs=1"]) == 0
    said = capsys.readouterr().out
    assert "no classes" in said
    assert "4 of 40 images are held out" in said
    result = seqjepa.Result(folder_of(words))
    assert not any("linacc" in name for name in result.metrics)
    assert "online_r2_test" in result.metrics
    encoder = seqjepa.load_encoder(result.folder)
    assert (encoder.classes, encoder.image_size) == ([], (24, 24))
    from seqjepa.engine.evaluate import main as evaluate

    assert evaluate([str(result.folder), "eval.lengths=[1]", "eval.renderings=1", "eval.neighbours=3"]) == 0


def test_the_config_for_own_images_asks_for_a_margin_only(tmp_path, tiny, folder_of):
    photographs(tmp_path / "own", 40)
    words = ["configs/data/imagefolder.yaml" if word.endswith("small.yaml") else word for word in tiny()]
    small = ("data.size=16", "data.batch_size=16", "data.train_subset=36", "run.epochs=1", "model.encoder.kind=convnet")
    assert main([*words[:1], *small, *words[1:], f"data.root={tmp_path / 'own'}"]) == 0
    assert isinstance(seqjepa.Result(folder_of(words)).gate_pass, bool)


def test_unequal_classes_are_said(tmp_path, tiny, folder_of, capsys):
    photographs(tmp_path / "cat", 36)
    photographs(tmp_path / "dog", 4, seed=1)
    words = tiny(*FOLDER, f"data.root={tmp_path}", "data.size=16", "data.batch_size=16", "data.held_out=10")
    assert main([word for word in words if not word.startswith("data.train_subset")]) == 0
    said = capsys.readouterr().out
    (share,) = re.findall(
        r"the largest class has ([\d.]+) % of the held-out images: always guessing it is right as often", said
    )
    summary = json.loads((folder_of(words) / "summary.json").read_text())
    assert summary["largest_class"] >= 70  # at most 4 of these 10 are dogs; all are counted
    assert float(share) == pytest.approx(summary["largest_class"], abs=0.05)
    assert f"largest_class: {summary['largest_class']:g}" in said


def test_what_cannot_be_resized_or_read(tmp_path, tiny, refused):
    refused(tiny("data.size=24"), "digits is read as it is")
    refused(tiny("data.size=4"), "data.size")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(tiny(*FOLDER, f"data.root={empty}"), "neither folders of classes nor images")
    only_test = tmp_path / "only"
    photographs(only_test / "test" / "cat", 2)
    refused(tiny(*FOLDER, f"data.root={only_test}", "data.size=24"), "has test images and no train/")
    refused(tiny(*FOLDER, f"data.root={tmp_path / 'nowhere'}"), "no such folder")
    mixed = photographs(tmp_path / "mixed", 200)
    refused(tiny(*FOLDER, f"data.root={mixed}"), "data.size=64 would bring all to 64x64")
    few = photographs(tmp_path / "few", 1)
    refused(tiny(*FOLDER, f"data.root={few}", "data.size=24"), "data.held_out")


def test_betons_are_not_written_of_what_has_no_split_or_classes(tmp_path, capsys, monkeypatch):
    from seqjepa.loaders.write import main as write

    monkeypatch.setattr("seqjepa.loaders.images.beton.has_ffcv", lambda: True)
    photographs(tmp_path / "own", 5, size=(24, 24))
    for split in ("train", "val"):
        photographs(tmp_path / "flat" / split, 5, size=(24, 24), seed=len(split))
    for root, said in (("own", "needs train/ and test/"), ("flat", "has no folders of classes")):
        assert write([str(tmp_path / root), str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err


def test_held_out_of_the_first_split_needs_no_test_images(tmp_path):
    with pytest.raises(InputError, match="leaves none of the 5"):
        loaders(photographs(tmp_path / "own", 5), held_out=5)
