"""What a resumed run may change, and what is said of it."""

import errno
import json
import math
import re
from pathlib import Path
from unittest.mock import Mock

import PIL
import pytest
from filelock import FileLock
from image_data import write_images
from PIL import Image, features

from seqjepa.configs.errors import InputError
from seqjepa.configs.section import Operation, Section, leaves
from seqjepa.engine.config import Config, compose
from seqjepa.engine.runs.checkpoints import find_checkpoint
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runs.folder import RunFolder
from seqjepa.engine.train import main

pytestmark = pytest.mark.usefixtures("blank_figures")

# 160 images in batches of 16: ten steps an epoch
TEN_STEPS = ("data.batch_size=16", "optim.warmup_epochs=0")


def folder(words) -> Path:
    return Path(next(word.removeprefix("run.dir=") for word in words if word.startswith("run.dir=")))


def folder_of(config) -> RunFolder:
    return RunFolder(config, config.run, config.checkpoint.keep)


@pytest.mark.parametrize("error", [NotImplementedError(), OSError(errno.ENOLCK, "No locks available")])
def test_a_disk_without_locks_is_named(error, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(FileLock, "acquire", Mock(side_effect=error))
    (tmp_path / "run").mkdir()
    config = compose(tiny(f"run.dir={tmp_path / 'run'}")).config
    with pytest.warns(match=f"{tmp_path / 'run'}: this disk has no locks"), RunFolder(config, config.run, 1):
        pass


def replaced(section, field: str):
    """A section with something else in a field, unvalidated."""
    name, _, inner = field.partition(".")
    new = replaced(getattr(section, name), inner) if inner else "something else"
    return section.model_copy(update={name: new})


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")  # of what is put there
@pytest.mark.parametrize("field", [name for name in leaves(Config().model_dump()) if name != "gates.rules"])
def test_no_setting_changes_silently(field, tmp_path):
    saved = Config()
    folder = folder_of(replaced(saved, field))
    if Config.is_free(field):
        said = folder.check_same_experiment(saved, tmp_path)
        assert set(said) == (set() if field in ("run.resume", "run.overwrite") else {field})
        return
    with pytest.raises(InputError) as caught:
        folder.check_same_experiment(saved, tmp_path)
    assert caught.value.field == field


def test_a_new_section_is_fixed_unless_it_says_otherwise(tmp_path):
    """As when somebody adds a term: nothing but the section has to be written."""

    class Novelty(Section):
        weight: float = 0.1
        workers: int = 1
        free = frozenset({"workers"})

    class Watching(Operation):
        every: int = 1

    class Longer(Config):
        novelty: Novelty = Novelty()
        watching: Watching = Watching()

    folder = folder_of(Longer(novelty=Novelty(weight=50.0)))
    with pytest.raises(InputError, match=r"is 50.0, the checkpoint .* was trained with 0.1") as caught:
        folder.check_same_experiment(Longer(), tmp_path)
    assert caught.value.field == "novelty.weight"
    folder = folder_of(Longer(novelty=Novelty(workers=8), watching=Watching(every=9)))
    changed = folder.check_same_experiment(Longer(), tmp_path)
    assert changed == {"novelty.workers": (1, 8), "watching.every": (1, 9)}


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("early_stop.metric", ["early_stop.metric=online_r2_test"]),  # patience would compare two metrics
        ("probes.hidden", ["probes.hidden=8"]),
        ("run.batch_statistics", ["run.batch_statistics=process"]),
        ("ablation.shuffle_actions", ["ablation.shuffle_actions=true"]),
        (
            "objective.variance.weight",
            [
                "objective.variance.weight=1.0",
                "model.projector.kind=mlp",
                "model.projector.dim=8",
                "target.kind=shared",
            ],
        ),
    ],
)
def test_what_decides_what_is_learnt_is_fixed(field, words, tmp_path):
    folder = folder_of(compose(["configs/smoke.yaml", *words]).config)
    with pytest.raises(InputError) as caught:
        folder.check_same_experiment(compose(["configs/smoke.yaml"]).config, tmp_path)
    assert caught.value.field in {field, *(word.partition("=")[0] for word in words)}


def test_more_epochs_move_the_schedules_and_lines_say_so(tiny, capsys):
    """The schedules are spread over all epochs: a cosine that had ended begins anew from its middle."""
    words = tiny(*TEN_STEPS, "optim.lr=1e-3", "optim.min_lr=1e-5", "target.schedule=cosine", "target.decay=0.9")
    assert main([*words, "run.epochs=1"]) == 0
    capsys.readouterr()
    assert main([*words, "run.epochs=2", "run.resume=auto"]) == 0
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: run.epochs from 1 to 2" in printed
    # step 10 of 0 to 19 is 10/19 of the way down
    rate = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * 10 / 19)) / 2
    was, now = map(
        float, re.search(r"the learning rate was (\S+) in the last step and is (\S+) in the next", printed).groups()
    )
    assert (was, now) == (pytest.approx(1e-5, rel=1e-5), pytest.approx(rate, rel=1e-5))
    was, now = map(
        float, re.search(r"teacher's decay was (\S+) in the last step and is (\S+) in the next", printed).groups()
    )
    assert now < was <= 1
    assert was > 0.99  # near the end of its cosine from 0.9 to 1


def test_more_epochs_of_constant_schedules_change_nothing(tiny, capsys):
    words = tiny(*TEN_STEPS, "optim.schedule=constant", "target.schedule=constant")
    assert main([*words, "run.epochs=1"]) == 0
    assert main([*words, "run.epochs=2", "run.resume=auto"]) == 0
    printed = capsys.readouterr().out
    assert "run.epochs from 1 to 2" in printed
    assert "in the last step and is" not in printed


def test_the_advice_on_a_lack_of_memory_can_be_followed(tiny, capsys):
    """More micro-batches and run.resume=auto, as the message advises."""
    words = tiny(*TEN_STEPS, "run.epochs=2", "run.overwrite=false")
    assert main([*words, "run.epochs=1"]) == 0
    assert main([*words, "run.resume=auto", "optim.accumulate=2"]) == 0
    printed = capsys.readouterr().out
    assert "optim.accumulate from 1 to 2" in printed
    assert "batch norm and the terms of the objective now see 8 sequences at a time instead of 16" in printed


def test_what_another_machine_makes_of_the_config_is_reported(tiny, capsys, monkeypatch):
    """run.precision=auto is bf16 where a CPU has it, and the number of processes is no field of the config."""
    words = tiny(*TEN_STEPS, "run.precision=auto", "run.batch_statistics=process")
    bf16 = "seqjepa.engine.runtime.accelerator._use_bf16"
    monkeypatch.setattr(bf16, lambda precision, device: True)
    assert main([*words, "run.epochs=1"]) == 0
    state = find_checkpoint(folder(words)) / "state.json"
    saved = json.loads(state.read_text())
    assert saved["settled"] == {"processes": 1, "device": "cpu", "precision": "bf16", "compile": "none"}
    state.write_text(json.dumps(saved | {"settled": saved["settled"] | {"processes": 2}}))
    (state.parent / "manifest.json").unlink()
    seal(state.parent)
    capsys.readouterr()
    monkeypatch.setattr(bf16, lambda precision, device: False)
    assert main([*words, "run.epochs=2", "run.resume=auto"]) == 0
    printed = capsys.readouterr().out
    assert "run.precision from 'bf16' to 'fp32'" in printed
    assert "the number of processes from 2 to 1" in printed
    assert "now see 16 sequences at a time instead of 8" in printed


def test_fewer_epochs_than_have_begun_are_refused(tiny, interrupt_at, refused):
    """Also in the middle of one: its steps would be dropped in silence."""
    words = tiny(*TEN_STEPS, "run.epochs=3", "run.overwrite=false")
    interrupt_at(14)
    assert main(words) == 143
    refused([*words, "run.epochs=1", "run.resume=auto"], "run.epochs: is 1, ", "is in epoch 2 already; at least 2")


def test_other_images_are_refused(tiny, refused, tmp_path, monkeypatch):
    """One pixel is enough; where another Pillow is installed than at the time, the line says so."""
    images = write_images(tmp_path / "images", size=(24, 24))
    data = ["data.dataset=imagefolder", "data.name=own", f"data.root={images}", "data.train_subset=null"]
    words = tiny(*data, "data.batch_size=2", "optim.warmup_epochs=0", "run.epochs=1")
    assert main(words) == 0
    again = [*words, "run.epochs=2", "run.resume=auto"]
    place = images / "train" / "cat" / "0.png"
    image = Image.open(place).convert("RGB")
    image.putpixel((3, 4), (1, 2, 3))
    image.save(place)
    refused(again, "data.root: holds other images than", "epoch-0001 was trained on\n")
    monkeypatch.setattr(PIL, "__version__", "1.2.3")
    refused(again, f"was trained on; Pillow 1.2.3 resizes a little differently from {features.version('pil')}")
