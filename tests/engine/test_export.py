"""`seqjepa export`: the folder, each format loaded by its own reader, the card, and what is refused."""

import importlib
import json
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

import seqjepa
from seqjepa.engine.export import main

ROOT = Path(__file__).resolve().parents[2]
IMAGES = torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(0))
RESNET = ("model.encoder.kind=resnet18",)
READERS = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("timm", "onnxscript", "onnxruntime")),
    reason="needs seqjepa[export]",
)


@pytest.fixture(scope="module")
def runs(tiny_for_module):
    """A run of a convnet."""
    return {"convnet": seqjepa.train(*tiny_for_module(run="convnet")).folder}


@pytest.fixture(scope="module")
def resnet(tiny_for_module):
    """A run of a ResNet-18."""
    small = ("data.train_subset=64", "data.batch_size=32", "data.val_subset=32", "run.epochs=1")
    return seqjepa.train(*tiny_for_module(*small, run="resnet", other=RESNET)).folder


@pytest.mark.parametrize("kind", ["convnet", pytest.param("resnet18", marks=pytest.mark.slow)])
def test_the_exported_encoder_is_that_of_the_run(kind, runs, request, tmp_path, capsys):
    runs = runs if kind == "convnet" else {kind: request.getfixturevalue("resnet")}
    assert main([str(runs[kind]), "--out", str(tmp_path / "out")]) == 0
    assert "loaded again" in capsys.readouterr().out
    one, two = seqjepa.load_encoder(runs[kind]), seqjepa.load_encoder(tmp_path / "out")
    with torch.inference_mode():
        assert torch.equal(one(IMAGES), two(IMAGES))
    assert (one.image_size, one.classes, one.num_features) == (two.image_size, two.classes, two.num_features)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("README.md", "config.json", "curves.png", "model.safetensors", "training.yaml")
    }


@READERS
@pytest.mark.filterwarnings("ignore")  # of torch's exporters
@pytest.mark.slow
def test_three_loaders_one_output(resnet, tmp_path):
    import onnxruntime
    import timm

    out = tmp_path / "out"
    assert main([str(resnet), "--out", str(out), "--format", "timm", "onnx", "pt2"]) == 0
    ours = seqjepa.load_encoder(out)
    by_timm = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    data = timm.data.resolve_model_data_config(by_timm)
    assert list(data["mean"]) == ours.mean.flatten().tolist()
    mean, std = (torch.tensor(data[name]).view(-1, 1, 1) for name in ("mean", "std"))
    session = onnxruntime.InferenceSession(str(out / "encoder.onnx"))
    program = torch.export.load(out / "encoder.pt2").module()
    with torch.inference_mode():
        wanted = ours(IMAGES)
        for found in (
            by_timm((IMAGES - mean) / std),
            torch.from_numpy(session.run(None, {"images": IMAGES.numpy()})[0]),
            program(IMAGES),
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@READERS
@pytest.mark.slow
def test_timms_other_ways_to_make_it(resnet, tmp_path):
    import timm

    assert main([str(resnet), "--out", str(tmp_path / "out")]) == 0
    name = f"local-dir:{tmp_path / 'out'}"
    plain = timm.create_model(name, pretrained=True).eval()
    classifier = timm.create_model(name, pretrained=True, num_classes=7).eval()
    gray = timm.create_model(name, pretrained=True, in_chans=1).eval()
    maps = timm.create_model(name, pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        wanted = plain(IMAGES)
        assert classifier(IMAGES).shape == (len(IMAGES), 7)
        assert torch.equal(classifier.forward_head(classifier.forward_features(IMAGES), pre_logits=True), wanted)
        # timm adds up the weights of the three colours: a gray image is one of three equal channels
        torch.testing.assert_close(
            gray(IMAGES[:, :1]), plain(IMAGES[:, :1].expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(maps(IMAGES)[-1].mean((2, 3)), wanted, rtol=1e-4, atol=1e-5)


@READERS
def test_timms_resnet_has_the_names_and_the_outputs_of_ours():
    import timm

    importlib.import_module("seqjepa.engine.timm_models")  # which registers it

    from seqjepa.engine.models.config import ModelConfig
    from seqjepa.engine.models.heads import build_encoder

    torch.manual_seed(0)
    ours = build_encoder(ModelConfig()).eval()
    theirs = timm.create_model("resnet18_cifar").eval()
    theirs.load_state_dict(ours.state_dict())  # strict
    with torch.inference_mode():
        images = IMAGES.contiguous(memory_format=torch.channels_last)  # as ours makes them
        assert torch.equal(theirs(images), ours(IMAGES[:, None])[:, 0])


@READERS
@pytest.mark.filterwarnings("ignore")  # of torch's exporters
def test_a_graph_takes_any_number_of_images(runs, tmp_path):
    assert main([str(runs["convnet"]), "--out", str(tmp_path / "out"), "--format", "pt2"]) == 0
    program = torch.export.load(tmp_path / "out" / "encoder.pt2").module()
    encoder = seqjepa.load_encoder(runs["convnet"])
    for count in (1, 2, 9):
        images = torch.rand(count, 3, 24, 24)
        torch.testing.assert_close(program(images), encoder(images), rtol=1e-5, atol=1e-5)


@READERS
@pytest.mark.filterwarnings("ignore")  # of torch's exporters
def test_graphs_name_no_place_of_this_machine(runs, tmp_path):
    """torch keeps the line of source of each operation, with its path."""
    out = tmp_path / "out"
    assert main([str(runs["convnet"]), "--out", str(out), "--format", "pt2", "onnx"]) == 0
    with zipfile.ZipFile(out / "encoder.pt2") as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    for content in (*contents, (out / "encoder.onnx").read_bytes()):
        assert str(ROOT).encode() not in content
        assert b"site-packages" not in content
    session = importlib.import_module("onnxruntime").InferenceSession(str(out / "encoder.onnx"))
    images = torch.rand(5, 3, 24, 24)  # another number than it was made with
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(found), seqjepa.load_encoder(out)(images), rtol=1e-5, atol=1e-5, check_stride=False
    )


def test_a_card_has_the_results_of_its_own_epoch(runs, tmp_path):
    first = runs["convnet"] / "checkpoints" / "epoch-0001"
    assert main([str(first), "--out", str(tmp_path / "out"), "--license", "a: b"]) == 0
    text = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1])["license"] == "a: b"
    rows = [json.loads(line) for line in (runs["convnet"] / "metrics.jsonl").read_text().splitlines()]
    assert f"| online_r2_test | {rows[0]['online_r2_test']:.4g} |" in text
    assert "later epoch" in text


def test_the_average_of_a_stream_has_its_control_on_the_card_of_the_last_task(runs, tmp_path):
    """The control is of all tasks: beside the average over the first ones it would be another's."""
    shutil.copytree(runs["convnet"], run := tmp_path / "run", symlinks=True)
    trained, untrained = {"stream_cosine_average": 0.5}, {"stream_cosine_average": 0.25}
    rows = [json.loads(line) | trained for line in (run / "metrics.jsonl").read_text().splitlines()]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = json.loads((run / "summary.json").read_text())
    summary["final"] |= trained
    summary["untrained"] |= untrained
    (run / "summary.json").write_text(json.dumps(summary))
    for epoch, shown in ((1, "-"), (2, "0.25")):
        assert main([str(run / "checkpoints" / f"epoch-000{epoch}"), "--out", str(tmp_path / shown)]) == 0
        assert f"| stream_cosine_average | 0.5 | {shown} |" in (tmp_path / shown / "README.md").read_text()


@pytest.mark.parametrize("content", ["[]", "{}", "x", '{"gate_pass": true, "untrained": null}'])
def test_a_damaged_summary_is_no_result(content, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["convnet"], run)
    (run / "summary.json").write_text(content)
    assert main([str(run), "--out", str(tmp_path / "out")]) == 0
    assert "no metrics of this epoch" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(seqjepa.InputError, match="not the folder of a finished run"):
        _ = seqjepa.Result(str(run)).metrics


def test_the_card_has_results_beside_the_control_and_nothing_of_this_machine(runs, tmp_path):
    out = tmp_path / "out"
    assert main([str(runs["convnet"]), "--out", str(out), "--license", "cc-by-4.0"]) == 0
    text = (out / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "cc-by-4.0"
    assert front["pipeline_tag"] == "image-feature-extraction"
    result = seqjepa.Result(runs["convnet"])
    for name in ("online_linacc_test", "online_r2_test", "online_r2_rotation_test"):
        assert f"| {name} | {result.metrics[name]:.4g} | {result.untrained[name]:.4g} |" in text
    assert f"| largest_class (always guessing it) | {result.summary['largest_class']:.4g} |" in text
    assert "2505.03176" in text
    assert "\n- `{metric: online_r2_test, margin: 0.25}`\n" in text
    assert "[B, 16]" in text  # four times the width of 4
    for path in out.iterdir():
        if path.suffix != ".png":
            assert str(tmp_path.parent).encode() not in path.read_bytes()


def test_the_recipe_trains_again(runs, tmp_path):
    """The exported config, with a folder of its own, gives the same features."""
    assert main([str(runs["convnet"]), "--out", str(tmp_path / "out")]) == 0
    again = seqjepa.train(tmp_path / "out" / "training.yaml", f"run.dir={tmp_path / 'again'}")
    one, two = seqjepa.load_encoder(again.folder), seqjepa.load_encoder(runs["convnet"])
    assert torch.equal(one(IMAGES), two(IMAGES))


def refuse(words, capsys, *parts):
    capsys.readouterr()
    assert main(list(map(str, words))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1, said
    assert all(part in said for part in parts), said


def test_what_is_refused_is_one_line_and_leaves_nothing(runs, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").touch()
    refuse([runs["convnet"], "--out", full], capsys, "new or empty")
    refuse([runs["convnet"], "--out", tmp_path / "new", "--push", "mine"], capsys, "--push mine", "USER/NAME")
    refuse([runs["convnet"], "--out", full / "mine"], capsys, "new or empty")
    refuse([tmp_path, "--out", tmp_path / "out"], capsys, "neither a run")
    refuse([tmp_path / "nowhere", "--out", tmp_path / "out"], capsys, "neither a run")
    refuse([runs["convnet"], "--out", tmp_path / "out", "--format", "timm"], capsys, "timm has no convnet encoder")
    refuse([runs["convnet"], "--out", "/proc/out"], capsys, "cannot be written")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_a_damaged_checkpoint_is_named_and_no_setting_of_training(runs, tmp_path, capsys):
    shutil.copytree(runs["convnet"], tmp_path / "run", symlinks=True)
    damaged = tmp_path / "run" / "checkpoints" / "epoch-0002"
    (damaged / "model.safetensors").write_bytes(b"")
    refuse([tmp_path / "run", "--out", tmp_path / "out"], capsys, f"error: {damaged}/model.safetensors: ")


def test_a_package_that_is_missing_is_named(runs, tmp_path, capsys, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    words = [runs["convnet"], "--out", tmp_path / "out", "--format", "onnx"]
    refuse(words, capsys, "onnxruntime is missing", "seqjepa[export]")


def test_a_file_that_gives_other_features_is_refused(runs, tmp_path, capsys, monkeypatch):
    import seqjepa.engine.export as module

    def wrong(encoder, images, path):
        return lambda images: 1.001 * encoder(images)

    monkeypatch.setattr(module, "_by_export", wrong)
    refuse([runs["convnet"], "--out", tmp_path / "out", "--format", "pt2"], capsys, "gives other features")
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_keeps_the_folder(runs, tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def fail(self, *args, **options):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    refuse([runs["convnet"], "--out", tmp_path / "out", "--push", "me/mine"], capsys, "no network", "is whole")
    assert (tmp_path / "out" / "config.json").is_file()


def test_grids_are_exported_too(tmp_path, capsys):
    grids = [
        *("configs/data/arc_programs.yaml", "configs/tier/arc_smoke.yaml", "run.epochs=1", "run.threads=1"),
        *("data.train_subset=96", "data.val_subset=48", "data.batch_size=48", "data.curriculum.kind=none"),
        *("eval.every=1", "tracking.wandb=disabled", f"run.dir={tmp_path / 'run'}", "gates.rules={}"),
        f"control.cache={tmp_path / 'untrained'}",
    ]
    result = seqjepa.train(*grids)
    refuse([result.folder, "--out", tmp_path / "no", "--format", "pt2"], capsys, "sees grids")
    assert main([str(result.folder), "--out", str(tmp_path / "out")]) == 0
    encoder = seqjepa.load_encoder(tmp_path / "out")
    colours = torch.randint(0, 10, (2, 9, 9))
    assert encoder(colours).shape == (2, encoder.num_features)
    with pytest.raises(ValueError, match=r"integers \[B, H, W\]"):
        encoder(torch.rand(2, 3, 9, 9))


def test_the_folder_has_the_permissions_of_others(runs, tmp_path):
    mask = os.umask(0o022)
    try:
        assert main([str(runs["convnet"]), "--out", str(tmp_path / "out")]) == 0
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert json.loads((tmp_path / "out" / "config.json").read_text())["seqjepa"]
