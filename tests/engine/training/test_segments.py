"""Training goes by segments: epochs, and any other kind that says how many there are and how long each is."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.runs.state import Position
from seqjepa.engine.train import main
from seqjepa.engine.training import step, trainer
from seqjepa.engine.training.segments import Epochs, Segments

pytestmark = pytest.mark.usefixtures("blank_figures")


class Phases(Segments):
    """Two stretches of training, of four steps and of seven; the second takes its batches from two epochs."""

    lengths = (4, 7)

    def __init__(self, config, loaders):
        self.loader = loaders.train

    def __len__(self):
        return len(self.lengths)

    def start(self, segment):
        return sum(self.lengths[:segment])

    def batches(self, position):
        for number in range(self.start(position.segment) + position.step, self.start(position.segment + 1)):
            epoch, batch = divmod(number, len(self.loader))
            yield next(self.loader.epoch(epoch, batch))


@pytest.fixture
def phases(monkeypatch):
    for module in (trainer, step):
        monkeypatch.setattr(module, "segments_of", Phases)


def timeless(run: Path) -> list[dict]:
    return [
        {name: value for name, value in row.items() if name != "timing"} for row in read_rows(run / "metrics.jsonl")
    ]


def test_steps_and_segments_translate_into_each_other():
    config, loaders = SimpleNamespace(run=SimpleNamespace(epochs=3)), SimpleNamespace(train=range(5))
    for kind, lengths in ((Phases(config, loaders), (4, 7)), (Epochs(config, loaders), (5, 5, 5))):
        assert [kind.steps(segment) for segment in range(len(kind))] == list(lengths)
        assert kind.start(len(kind)) == sum(lengths)
        owners = [segment for segment, length in enumerate(lengths) for _ in range(length)]
        assert [kind.segment_of(number) for number in range(sum(lengths))] == owners


@pytest.mark.parametrize(
    ("at", "name", "where"),
    [
        (2, "segment-0000-step-00003", "segment 1, step 3"),
        (3, "segment-0000-step-00004", "segment 1, step 4"),  # its last step, before the validation
        (9, "segment-0001-step-00006", "segment 2, step 6"),
    ],
)
def test_segments_of_other_lengths_train_stop_and_resume(tiny, tmp_path, capsys, phases, interrupt_at, at, name, where):
    words = ("optim.schedule=cosine", "target.schedule=cosine", "run.log_every=3")
    assert main(tiny(*words, run="whole")) == 0
    assert "segment 2/2" in capsys.readouterr().out
    interrupt_at(at)
    assert main(tiny(*words, run="cut")) == 143
    assert main(tiny(*words, "run.resume=auto", run="cut")) == 0
    folder = tmp_path / "cut" / "checkpoints"
    assert f"resumed from {folder / name}: {where}" in capsys.readouterr().out
    assert timeless(tmp_path / "cut") == timeless(tmp_path / "whole")
    assert [row["epoch"] for row in timeless(tmp_path / "cut")] == [1, 2]
    for file in ("model", "probes", "trainer", "rng-00000"):
        ours, theirs = (tmp_path / run / f"checkpoints/segment-0002/{file}.safetensors" for run in ("cut", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), file
    steps = {
        key: value for key, value in load_file(folder / "segment-0002/trainer.safetensors").items() if ".step" in key
    }
    assert steps
    assert all(value == sum(Phases.lengths) for value in steps.values())


def test_a_position_beyond_the_last_segment_is_refused(tiny, tmp_path, phases, monkeypatch, refused):
    """As when the segments have become fewer, or shorter, since the checkpoint."""
    assert main(tiny()) == 0
    monkeypatch.setattr(Phases, "lengths", (4,))
    refused(tiny("run.resume=auto"), "run.epochs: is 1, ", "has 2 already; at least 2 is allowed")


def test_positions_are_ordered():
    assert sorted([Position(1), Position(0, 4), Position(0), Position(1, 2)]) == [(0, 0), (0, 4), (1, 0), (1, 2)]
