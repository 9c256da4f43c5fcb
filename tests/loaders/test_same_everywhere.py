"""The same thousand samples, whoever draws them: batch size, loader, processes, a restart, the compiler."""

import json
import subprocess
import sys

import pytest
import torch

from seqjepa.configs.section import by_kind
from seqjepa.loaders.batch import Batch
from seqjepa.loaders.config import ActionsConfig, AnySequence, DataConfig
from seqjepa.loaders.draws import words
from seqjepa.loaders.images.beton import has_ffcv
from seqjepa.loaders.loader import build_loaders
from seqjepa.loaders.sequences import build_sequence
from seqjepa.loaders.write import main as write

CPU = torch.device("cpu")
KINDS = by_kind(AnySequence)
CHANGES = {"symmetries": True, "colours": True, "shift": 2, "lost": 0.2, "blank": 0.1, "noise": 0.1}
OFTEN = {"augment": {"blur": [0.5, 0.5], "solarize": [0.5, 0.5]}, "program": {"changes": CHANGES}}
EPOCH = 3
# bicubic and bilinear weights, and blends of colours, in float32: other batch sizes sum them in another order
TOLERANCE = 1e-4


def loader(kind, batch, root=None, device=CPU):
    sequence = KINDS[kind](**OFTEN.get(kind, {}))
    grids = sequence.views == "grids"
    dataset, actions = ("object_grids", "none") if grids else ("digits", "standard")
    data = DataConfig(dataset=dataset, root=root and str(root), batch_size=batch, train_subset=1024)
    return build_loaders(data, sequence, ActionsConfig(normalization=actions), seed=11, device=device).train


def joined(batches):
    return Batch(*(torch.cat(field) for field in zip(*batches, strict=True)))


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def whole(kind):
    return joined(loader(kind, 512).epoch(EPOCH))


def assert_same(batch, whole):
    """All samples of `batch` are in `whole`, with the same bits of parameters and the same views."""
    row = {int(index): number for number, index in enumerate(whole.index)}
    rows = [row[int(index)] for index in batch.index]
    assert torch.equal(batch.params, whole.params[rows])
    assert torch.equal(batch.labels, whole.labels[rows])
    torch.testing.assert_close(batch.actions, whole.actions[rows], rtol=0, atol=1e-6)
    torch.testing.assert_close(batch.views, whole.views[rows], rtol=0, atol=TOLERANCE)


def test_a_batch_of_seven(kind, whole):
    batch = joined(loader(kind, 7).epoch(EPOCH))
    assert len(batch.index) == 1022
    assert_same(batch, whole)


@pytest.mark.skipif(not has_ffcv(), reason="FFCV is not installed")
@pytest.mark.parametrize("batch", [7, 512])
def test_ffcv(kind, whole, batch, tmp_path_factory):
    if KINDS[kind].views == "grids":
        pytest.skip("betons hold images")
    betons = tmp_path_factory.getbasetemp() / "betons"
    if not betons.exists():
        assert write(["digits", str(betons)]) == 0
    ours = joined(loader(kind, batch, betons).epoch(EPOCH))
    assert len(ours.index) >= 1000
    assert_same(ours, whole)


SHARE = """
import json, sys, torch
from seqjepa.configs.section import by_kind
from seqjepa.loaders.config import ActionsConfig, AnySequence, DataConfig
from seqjepa.loaders.batch import Batch
from seqjepa.loaders.loader import build_loaders

kind, rank, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dataset, actions = ("object_grids", "none") if kind == "program" else ("digits", "standard")
data = DataConfig(dataset=dataset, batch_size=256, train_subset=1024)
sequence = by_kind(AnySequence)[kind](**json.loads(sys.argv[4]))
split = {"rank": rank, "num_processes": 2, "device": torch.device("cpu")}
loaders = build_loaders(data, sequence, ActionsConfig(normalization=actions), seed=11, **split)
batches = list(loaders.train.epoch(3, start=2 * rank))  # process 1 was stopped after two batches, and goes on
torch.save([torch.cat(field) for field in zip(*batches)], out)
"""


@pytest.mark.slow
def test_two_processes_one_of_which_started_again(kind, whole, tmp_path):
    parts = []
    for rank in range(2):
        out = tmp_path / f"{rank}.pt"
        words = (kind, str(rank), str(out), json.dumps(OFTEN.get(kind, {})))
        subprocess.run([sys.executable, "-c", SHARE, *words], check=True, timeout=600)
        parts.append(Batch(*torch.load(out)))
        assert_same(parts[-1], whole)
    assert [len(part.index) for part in parts] == [512, 256]
    assert not set(parts[0].index.tolist()) & set(parts[1].index.tolist())


def test_the_compiler(kind):
    if KINDS[kind].views == "grids":
        pytest.skip("which steps make sense depends on the grid")
    sequence = build_sequence(KINDS[kind](), (24, 24))
    sequence.statistics  # noqa: B018 - made once, outside of the graph
    index = torch.arange(1000)
    images = torch.randint(0, 256, (1000, 24, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def draw(index, images):
        params = sequence.params(words(11, 0, EPOCH, index, sequence.num_views, sequence.num_draws))
        return params, sequence.actions(params), sequence.render(images, params)

    compiled = torch.compile(draw, fullgraph=True)
    (params, actions, views), (params_too, actions_too, views_too) = draw(index, images), compiled(index, images)
    assert torch.equal(params, params_too)
    torch.testing.assert_close(actions_too, actions, rtol=0, atol=1e-5)
    torch.testing.assert_close(views_too, views, rtol=0, atol=TOLERANCE)


@pytest.mark.gpu
def test_a_gpu(kind, whole):
    torch.set_float32_matmul_precision("high")  # as the trainer does
    on_gpu = loader(kind, 512, device=torch.device("cuda"))
    batch = Batch(*(field.cpu() for field in joined(on_gpu.epoch(EPOCH))))
    torch.set_float32_matmul_precision("highest")
    row = {int(index): number for number, index in enumerate(whole.index)}
    rows = [row[int(index)] for index in batch.index]
    assert torch.equal(batch.params, whole.params[rows])
    torch.testing.assert_close(batch.actions, whole.actions[rows], rtol=0, atol=1e-5)
    # TF32 rounds a crop's weights to 11 bits: about 2e-3 of the range, over the pixels' deviation of a quarter
    torch.testing.assert_close(batch.views, whole.views[rows], rtol=0, atol=2e-2)
