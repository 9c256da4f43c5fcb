"""`seqjepa.train`, `seqjepa.Result` and `seqjepa.load_encoder`."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest
import torch

import seqjepa
from seqjepa.__main__ import main
from seqjepa.engine.evaluation.cases import open_case
from seqjepa.engine.models.config import ModelConfig
from seqjepa.engine.models.heads import build_encoder
from seqjepa.engine.train import resolve

pytestmark = pytest.mark.usefixtures("blank_figures")


@pytest.fixture(scope="module")
def trained(tiny_for_module):
    return seqjepa.train(*tiny_for_module())


def test_a_result_has_metrics_paths_and_the_model(trained):
    assert trained.metrics["ep_loss"] == pytest.approx(trained.summary["final"]["ep_loss"])
    assert trained.untrained["online_r2_test"] != trained.metrics["online_r2_test"]
    assert trained.checkpoint.name == "epoch-0002"
    assert (trained.folder / "figures" / "curves.png").is_file()
    assert not trained.model.training


def test_the_command_trains_the_same_network(trained, tiny, folder_of):
    words = tiny()
    assert main(["train", *words]) == 0
    other = seqjepa.Result(folder_of(words))
    for one, two in zip(trained.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_it_trains_in_a_thread(tiny):
    found = []
    thread = threading.Thread(target=lambda: found.append(seqjepa.train(*tiny("run.epochs=1"))))
    thread.start()
    thread.join()
    assert found[0].summary["epochs"] == 1


def test_the_callers_number_of_threads_comes_back(tiny):
    """Also after bad input, which is noticed in between."""
    assert torch.get_num_threads() == 1
    for words in (["run.epochs=1"], ["data.dataset=imagefolder", "data.root=/nowhere"]):
        with contextlib.suppress(seqjepa.InputError):
            seqjepa.train(*tiny("run.threads=2", *words))
        assert torch.get_num_threads() == 1


@pytest.mark.parametrize("callers", [False, True])
def test_the_callers_determinism_comes_back(tiny, monkeypatch, callers):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not callers)
    torch.use_deterministic_algorithms(callers, warn_only=True)
    seqjepa.train(*tiny("run.epochs=1", f"run.deterministic={not callers}"))
    assert torch.are_deterministic_algorithms_enabled() is callers
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.benchmark is not callers
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_bad_input_is_an_exception_with_one_line(tiny):
    with pytest.raises(seqjepa.InputError, match=r"optim\.lr") as raised:
        seqjepa.train(*tiny("optim.lr=fast"))
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("word", ["--help", 3, ["run.epochs=1"]])
def test_words_that_are_none_are_refused(word):
    with pytest.raises(seqjepa.InputError, match=r"YAML file, or section\.key=value"):
        seqjepa.train(word)


def test_divergence_is_an_exception(tiny):
    with pytest.raises(seqjepa.RunFailed) as raised:
        seqjepa.train(*tiny("optim.lr=1e30", "optim.warmup_epochs=0"))
    assert raised.value.code == 3


def test_a_signal_is_a_keyboard_interrupt_and_saves(tiny, folder_of, interrupt_at):
    words = tiny("run.epochs=3")
    interrupt_at(2)
    with pytest.raises(KeyboardInterrupt):
        seqjepa.train(*words)
    assert [path.name for path in (folder_of(words) / "checkpoints").iterdir()]


def test_a_folder_without_a_run_is_no_result(tmp_path):
    with pytest.raises(seqjepa.InputError, match="not the folder of a finished run"):
        _ = seqjepa.Result(tmp_path).metrics


def test_the_package_imports_nothing_until_it_is_used():
    code = "import sys, seqjepa; dir(seqjepa)\n"
    code += "print(seqjepa.__version__, sorted({'torch', 'pydantic'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split(maxsplit=1)[1].strip() == "[]"
    with pytest.raises(AttributeError, match="fly"):
        _ = seqjepa.fly


# -- the encoder


def test_an_encoder_normalises_as_training_did(trained):
    """Against the features that the frozen evaluation sees: its loader normalises the same digits."""
    case = open_case(trained.folder, [], 0)
    _, loaders = case.open_data(2, print)
    views, _, index = next(iter(loaders.validation.clean()))
    with torch.inference_mode():
        wanted = case.model.eval().encoder(views[:, None])[:, 0]
        pixels = loaders.validation.pixels(len(index)).permute(0, 3, 1, 2)
        encoder = seqjepa.load_encoder(trained.folder)
        torch.testing.assert_close(encoder(pixels), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder(pixels.float() / 255), wanted, rtol=1e-5, atol=1e-5)
        gray = pixels[:, :1]  # digits are gray
        torch.testing.assert_close(encoder(gray), wanted, rtol=1e-5, atol=1e-5)
    assert encoder.num_features == wanted.shape[1]
    assert encoder.image_size == (24, 24)
    assert encoder.classes == [str(digit) for digit in range(10)]
    assert not encoder.training


def test_images_that_do_not_fit_are_refused(trained):
    encoder = seqjepa.load_encoder(trained.checkpoint)
    for images, said in (
        (torch.zeros(3, 24, 24), r"\[B, 3, H, W\] is expected"),
        (torch.zeros(1, 4, 24, 24), r"\[1, 4, 24, 24\]"),
        (torch.full((1, 3, 24, 24), 255.0), "from 0 to 1"),
        (torch.full((1, 3, 24, 24), -1.0), "from 0 to 1"),
        (torch.zeros(1, 3, 24, 24, dtype=torch.int64), "int64"),
    ):
        with pytest.raises(ValueError, match=said):
            encoder(images)


def test_an_encoder_moves_with_its_statistics(trained):
    encoder = seqjepa.load_encoder(trained.folder)
    images = torch.rand(2, 3, 24, 24)
    wanted = encoder(images)
    assert "mean" not in encoder.state_dict()
    torch.testing.assert_close(encoder(images.double()), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.double()(images), wanted, rtol=1e-4, atol=1e-5)
    assert encoder.bfloat16()(images).dtype == torch.float32


@pytest.mark.parametrize("place", ["nowhere at all", "/nowhere", ""])
def test_no_encoder_there(place, tmp_path):
    with pytest.raises(seqjepa.InputError):
        seqjepa.load_encoder(place or tmp_path)


def test_the_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    import huggingface_hub

    def refuse(*args, **options):
        raise ConnectionError("no network\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(seqjepa.InputError, match=r"someone/something: .*no network") as raised:
        seqjepa.load_encoder("someone/something")
    assert "\n" not in str(raised.value)


def test_the_hub_gives_what_export_wrote(trained, tmp_path, monkeypatch):
    import huggingface_hub

    from seqjepa.engine.export import main as export

    assert export([str(trained.folder), "--out", str(tmp_path / "out")]) == 0
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / "out"))
    images = torch.rand(2, 3, 24, 24)
    assert torch.equal(seqjepa.load_encoder("someone/digits")(images), seqjepa.load_encoder(trained.folder)(images))


def test_an_older_checkpoint_is_told_of(trained, tmp_path):
    import json
    import shutil

    from seqjepa.engine.runs.checksums import seal

    old = tmp_path / "epoch-0002"
    shutil.copytree(trained.checkpoint, old)
    state = json.loads((old / "state.json").read_text())
    del state["pixels"]
    (old / "state.json").write_text(json.dumps(state))
    (old / "manifest.json").unlink()
    seal(old)
    with pytest.raises(seqjepa.InputError, match="without mean and std"):
        seqjepa.load_encoder(old)


def test_the_encoder_of_a_config_has_its_neck():
    config = ModelConfig.model_validate({"encoder": {"kind": "convnet"}, "neck": {"kind": "linear", "dim": 7}})
    views = torch.rand(2, 3, 3, 24, 24)
    assert build_encoder(config)(views).shape == (2, 3, 7)


# -- run.name=auto


def test_a_name_of_its_own_for_each_experiment(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = [word for word in tiny("run.epochs=1", "run.name=auto") if not word.startswith("run.dir=")]
    one = seqjepa.train(*words)
    assert one.folder.parent.name == "runs"
    assert one.folder.name.startswith("digits_affine-")
    others = ("optim.lr=0.002", "run.precision=bf16", "data.root=elsewhere", "optim.accumulate=2", "run.seed=1")
    names = {resolve([*words, word]).config.run.name for word in others}
    assert len(names | {one.folder.name}) == 6
    # what does not decide what is learnt has the same folder, where the run is found finished
    again = seqjepa.train(*words, "run.resume=auto", "tracking.project=other")
    assert again.folder == one.folder
