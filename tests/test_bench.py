"""What the benchmarks compare with is the same experiment, and what they count is right."""

import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from seqjepa.engine.config import compose
from seqjepa.loaders.config import AugmentConfig, RotationConfig

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPTS = sorted(path for path in BENCH.rglob("*.py") if "__main__" in path.read_text(encoding="utf-8"))
STATISTICS = ((0.0,) * 3, (1.0,) * 3)


@pytest.fixture(autouse=True, scope="module")
def _bench_on_the_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


@pytest.fixture
def image():
    from PIL import Image

    return Image.fromarray(torch.arange(32 * 32 * 3).remainder(251).view(32, 32, 3).byte().numpy())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize(("word", "code"), [("--help", 0), ("--no-such-option", 2)])
def test_scripts_say_what_they_take_before_they_do_anything(script, word, code, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), word])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(script), run_name="__main__")
    assert left.value.code == code
    printed = capsys.readouterr()
    assert (printed.err if code else printed.out).startswith(f"usage: {script.name}")


def test_the_peers_turns_lead_from_view_to_view(image):
    from pillow import pillow_sequence

    draw = pillow_sequence(RotationConfig(angles=[0, 90, 180, 270]), *STATISTICS)
    turned = 0
    for _ in range(20):
        views, moves = draw(image)
        assert moves.shape == (3, 2)
        for number, (sin, cos) in enumerate(moves.round().long().tolist()):
            quarters = [(0, 1), (1, 0), (0, -1), (-1, 0)].index((sin, cos))
            assert torch.equal(views[number].rot90(quarters, (1, 2)), views[number + 1])
            turned += quarters > 0
    assert turned > 20


def test_the_peer_tells_the_crop_that_it_cut(image):
    from pillow import pillow_sequence

    config = AugmentConfig(flip=0.0, jitter=0.0, grayscale=0.0, blur=[0.0, 0.0], solarize=[0.0, 0.0])
    views, params = pillow_sequence(config, *STATISTICS)(image)
    assert params.shape == (4, 9)
    assert len(set(map(tuple, params[:, :4].tolist()))) > 1
    for view, (top, left, height, width, *rest) in zip(views, params.tolist(), strict=True):
        assert rest == [1.0, 1.0, 1.0, 0.0, 0.0]
        box = [int(x) for x in (top, left, height, width)]
        cut = F.resized_crop(image, *box, [32, 32], InterpolationMode.BICUBIC)
        assert torch.equal(view, F.to_tensor(cut))


def test_the_peer_learns_and_its_teacher_follows(tiny):
    from common import random_images
    from peer import Peer

    words = ("sequence.kind=augment", "data.dataset=cifar10", "data.root=none", "target.decay=0.9")
    config = compose(tiny(*words, "gates.rules.digits_affine=[]")).config
    torch.manual_seed(0)
    peer = Peer(config, random_images("cifar10", 64), torch.device("cpu"), workers=0)
    pairs = peer.model.target.pairs(peer.model.encoder)
    before = [teacher.clone() for _, teacher in pairs]
    heads = [p.detach().clone() for head in peer.heads.values() for p in head.parameters()]
    assert 0 < peer.step() < 2  # a cosine distance
    for (student, teacher), old in zip(pairs, before, strict=True):
        torch.testing.assert_close(teacher, 0.9 * old + 0.1 * student)
    moved = [p for head in peer.heads.values() for p in head.parameters()]
    assert not any(torch.equal(a, b) for a, b in zip(heads, moved, strict=True))
    assert [len(predicted) for predicted, _ in peer.kept.values()] == [32] * 4


def test_flops_are_those_of_the_products():
    from roofline import training_flops

    layer, x = nn.Linear(30, 20, bias=False), torch.ones(7, 30)
    assert training_flops(lambda: layer(x).sum()) == 2 * (2 * 7 * 30 * 20)  # forward, and the weight's gradient
    x.requires_grad_()
    assert training_flops(lambda: layer(x).sum()) == 3 * (2 * 7 * 30 * 20)


def test_the_roofline_has_every_convolution():
    """ResNet-18's twenty, with shapes whose products are all that torch counts in the network."""
    from roofline import _layers

    net = resnet18(num_classes=10)
    layers = _layers(net, torch.ones(2, 3, 32, 32))
    assert len(layers) == 20
    products = sum(
        2 * 2 * layer.conv(torch.ones(1, *layer.shape[1:])).numel() * layer.conv.weight[0].numel() for layer in layers
    )
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.ones(2, 3, 32, 32))
    assert products == counter.get_total_flops() - 2 * 2 * 512 * 10


def test_memory_kept_for_backward_is_what_the_formulas_need():
    """tanh needs its output and a product both factors; each storage counts once, and none that was given."""
    from common import kept_for_backward

    x, other = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    assert kept_for_backward(lambda: x.tanh(), x) == x.nbytes
    assert kept_for_backward(lambda: (x.tanh() * other[:, :1]).sum(), x) == x.nbytes + other.nbytes
    assert kept_for_backward(lambda: (x.tanh() * other).sum(), x, other) == x.nbytes
    assert kept_for_backward(lambda: x.detach().tanh()) == 0


def test_a_report_counts_and_times_every_part_of_a_step(monkeypatch, capsys):
    import report

    monkeypatch.setattr(report, "BATCHES", {"cpu": (2, 4)})
    monkeypatch.setattr(report, "matmul_peak", lambda device, dtype: 1e12)  # the real one takes seconds
    small = ("model.encoder.kind=convnet", "model.encoder.width=8", "model.aggregator.kind=mean")
    small += ("model.predictor.hidden=8", "model.action_dim=8", "probes.hidden=8")
    words = ["configs/data/cifar10_rot.yaml", "target.kind=stop_gradient", *small, "data.root=none"]
    kept = []
    found = report.measure(words, 4, report.BATCHES["cpu"], lambda found: kept.append(dict(found)))
    assert all(seconds > 0 for name, seconds in found["parts"].items() if name != "backward")
    assert found["rates"].keys() == {2, 4}
    assert kept[0]["step_seconds"] == found["step_seconds"]  # kept before its parts are timed
    assert "parts" not in kept[0]
    # the encoder's four views: a forward, a weight gradient, and an input gradient except for the first layer
    config = compose([*words, "data.batch_size=4"]).config
    encoder = config.model.encoder.build()
    shapes = []
    for layer in (layer for layer in encoder.modules() if isinstance(layer, nn.Conv2d)):
        layer.register_forward_hook(lambda conv, given, y: shapes.append((y.numel(), conv.weight[0].numel())))
    encoder.eval()(torch.zeros(1, 1, 3, 32, 32))
    of_encoder = 4 * sum((6 if number else 4) * pixels * weights for number, (pixels, weights) in enumerate(shapes))
    assert of_encoder < found["flops_per_sequence"] < 1.05 * of_encoder  # predictor and probes are the rest
    report.show(found | {"task": "cifar10_rot"}, 0.2)
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{found['flops_per_sequence'] / 1e9:.2f} GFLOP a sequence" in printed
    steps, batches = 50_000 // 4, 2_500
    epoch = steps * found["step_seconds"] + batches * found["parts"]["(validation, a batch)"] / found["eval_every"]
    assert f"{found['kept_per_sequence'] / 2**20:.1f} MiB a sequence" in printed
    # of four views at least each layer's input, in fp32
    assert found["kept_per_sequence"] > 4 * 4 * sum(pixels for pixels, _ in shapes)
    assert f"{2000 * epoch / 3600:,.1f} hours, {2000 * epoch / 3600 * 0.2:,.2f} at 0.20 an hour" in printed


def test_the_table_of_a_stream_has_every_arm_and_its_range():
    from streams import table

    def run(average):
        return {"cosine": {"untrained": [0.0, 0.2], "average": average, "backward": -0.5, "forgetting": 0.5}}

    lines = table({"nothing kept": [run(0.3), run(0.5)], "all at once": [run(0.7), run(0.7)]}).splitlines()
    assert lines[2:] == [
        "| cosine | untrained | 0.100 (0.100 to 0.100) | | |",
        "| cosine | nothing kept | 0.400 (0.300 to 0.500) | -0.500 (-0.500 to -0.500) | 0.500 (0.500 to 0.500) |",
        "| cosine | all at once | 0.700 (0.700 to 0.700) | -0.500 (-0.500 to -0.500) | 0.500 (0.500 to 0.500) |",
    ]


def test_the_table_of_changes_says_what_never_came_back():
    from streams import changes

    def run(fall, steps):
        final = {"stream_cosine_drop": fall, "stream_cosine_recovery": steps, "stream_cka": 0.9, "stream_overlap": 0.8}
        drift = {name: {"untrained": [0.1, 0.3, 0.9]} for name in ("cka", "overlap")}
        return {"final": final, "stream": {"drift": drift}}

    lines = changes({"nothing kept": [run(0.5, None), run(0.3, None)], "all at once": [run(0.0, 0.0)]}).splitlines()
    same = "0.900 (0.900 to 0.900) | 0.800 (0.800 to 0.800)"
    assert lines[2:] == [
        f"| nothing kept | 0.400 (0.300 to 0.500) | never, never | {same} |",
        f"| all at once | 0.000 (0.000 to 0.000) | 0 | {same} |",
        "| untrained | | | 0.200 (0.200 to 0.200) | 0.200 (0.200 to 0.200) |",
    ]


def test_memory_that_is_kept_at_a_time_is_counted_by_storage():
    """Two views of a storage count once, until both are gone; the most of all times is kept."""
    from local import _Kept

    _Kept.alive, _Kept.most = {}, 0
    x, y = torch.ones(100), torch.ones(50)
    first, second = _Kept(x), _Kept(x[:10])
    assert _Kept.most == x.nbytes
    del first
    third = _Kept(y)
    assert _Kept.most == x.nbytes + y.nbytes
    del second, third
    assert not _Kept.alive
    _Kept(y)
    assert _Kept.most == x.nbytes + y.nbytes


def test_contenders_get_eight_trials_and_equal_passes(tmp_path):
    from contenders import CONTENDERS
    from records import common, searched

    passes, words = set(), common("cifar10_aug", str(tmp_path))
    for name, plans in searched().items():
        assert len(set(CONTENDERS[name].trials)) == len(plans) == 8
        for plan in plans:
            config = compose([*words, *plan.words, f"run.dir={tmp_path}"]).config
            views = config.sequence.num_observed + 1
            passes.add(config.run.epochs * config.data.train_subset * views)
            assert config.data.held_out  # the test images have no say
            assert views == CONTENDERS[name].views
    assert len(passes) == 1


def test_a_record_beats_the_last_by_more_than_the_spread():
    from records import beats

    def row(*agg):
        return {"measures": {"trained": {"agg": agg, "R²": (0.5, 0.5, 0.5)}}}

    old = row(40.0, 41.0, 42.0)  # scores 45, 45.5, 46: a deviation of 0.5
    assert beats(row(42.3, 42.3, 42.3), old)
    assert not beats(row(41.9, 41.9, 41.9), old)
    assert not beats(row(40.0, 42.0, 46.0), old)  # better by 0.83, but with a deviation of 1.5
    assert not beats(old, old)


def test_margins_are_taken_seed_by_seed():
    from records import margins, record_table

    trained = {"agg": [50.0, 60.0], "z": [1.0, 2.0], "R²": [0.3, 0.5]}
    control = {"agg": [40.0, 50.0], "z": [0.0, 0.0], "R²": [0.1, 0.4]}
    row = {"task": "t", "recipe": "r", "passes": 1000, "seconds": [1.0, 3.0]}
    row["measures"] = {"trained": trained, "untrained": control, "shuffled": control, "frozen": control}
    assert margins(row, "agg", "untrained") == [10.0, 10.0]
    table = record_table([row]).splitlines()
    assert table[2] == "| t, `r`, 1,000, 2 s | class, agg, % | 55.0 (7.1) |" + " +10.0 (0.0) |" * 3
    assert table[4].endswith("| R² of the action | 0.400 (0.141) |" + " +0.150 (0.071) |" * 3)


def test_every_arm_on_grids_composes_and_the_table_shows_it():
    bench = runpy.run_path(str(BENCH / "arc.py"))
    for arms in bench["TABLES"].values():
        for settings in arms.values():
            compose([*bench["WORDS"], *settings])
    scores = dict.fromkeys(bench["SHOWN"], 0.5)
    runs = [{**scores, "steps": 300, "next_cf16": value} for value in (10.0, 20.0)]
    coded = [{**scores, "steps": 280, "codes_active": 50.0, "codes_perplexity": 30.25}]
    first, _, one, two = bench["table"]({"none": runs, "codes": coded}).splitlines()
    assert first.split(" | ")[2:4] == ["next_cf16", "next_top1"]
    assert one.startswith("| none | 300 | 15.0 (10.0 to 20.0) | 0.5 (0.5 to 0.5) |")
    assert one.endswith("|  |  |")
    assert two.endswith("| 50.0 | 30.2 |")


def counted(work) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@pytest.mark.parametrize("shape", [(3, 40, 24), (1, 24, 40), (2, 16, 16)])
def test_the_least_work_of_rates(shape):
    from kernel_table import by_cholesky
    from roofline import factor_work, rate_work

    z = torch.randn(shape, dtype=torch.bfloat16)
    matrices, (n, _) = shape[0], sorted(shape[1:])
    forward, backward, both = (rate_work(*shape, z.element_size(), mode) for mode in ("forward", "backward", "both"))
    narrow = z if shape[1] >= shape[2] else z.mT
    gram = counted(lambda: by_cholesky(narrow))  # all n² elements, of which (n + 1) n / 2 are needed
    subtractions = sum(2 * j for i in range(n) for j in range(i + 1))  # of products, for element (i, j) of the factor
    assert forward.products == gram * (n + 1) // (2 * n) + matrices * (n**3 // 3)
    assert abs(subtractions - n**3 // 3) <= n**2
    # two triangles are solved with as many operations as one full matrix is multiplied
    assert backward.products == counted(lambda: narrow.float() @ torch.zeros(matrices, n, n))
    assert both.products == forward.products + backward.products
    assert (forward.moved, backward.moved, both.moved) == (z.nbytes, 2 * z.nbytes, 2 * z.nbytes)
    inverse = torch.eye(n).expand(matrices, n, n)
    moved, products, _ = factor_work(matrices, n)
    assert moved == matrices * 4 * (len(torch.tril_indices(n, n)[0]) + inverse[0].numel())
    # the columns of the inverse: forward from row j, and backward up to row j, by symmetry
    solves = sum(2 * (i - j) + 2 * (n - 1 - i) for j in range(n) for i in range(j, n))
    assert abs(products - matrices * (subtractions + solves)) <= 4 * matrices * n**2
    members = torch.ones(5, shape[1])
    one_class = rate_work(1, *shape[1:], 4, "forward")
    classes = rate_work(5, *shape[1:], 4, "forward", shared=True)
    assert classes == (one_class.moved + members.nbytes, 5 * one_class.products, 0)


def test_the_least_work_of_sigreg():
    from kernel_table import eager_sigreg
    from roofline import sigreg_work

    z, unit, table = torch.randn(48, 20, requires_grad=True), torch.randn(20, 28), torch.ones(3, 7)
    forward, both = (sigreg_work(48, 20, 28, 7, mode) for mode in ("forward", "both"))
    assert forward.products == counted(lambda: eager_sigreg(z, unit, table))
    assert both.products == counted(lambda: torch.autograd.grad(eager_sigreg(z, unit, table), z))
    assert (forward.moved, both.moved) == (z.nbytes, 2 * z.nbytes)
    # the recurrences that the FLOPs are counted from: of each knot, one multiplication and one subtraction a wave,
    # and one addition to a sum; or two additions, where the sum is Clenshaw's
    x, slopes = z.detach().double() @ unit.double(), torch.randn(2, 7, dtype=torch.double)
    turn, waves, later = 2 * x.cos(), [torch.ones_like(x), x.cos()], [torch.zeros_like(x), torch.zeros_like(x)]
    for _ in range(6):
        waves.append(turn * waves[-1] - waves[-2])
    for slope in slopes[0].flip(0):
        later.append(slope + turn * later[-1] - later[-2])
    torch.testing.assert_close(waves[-1], (7 * x).cos())
    knots = torch.arange(1, 8)
    torch.testing.assert_close(later[-1] * x.cos() - later[-2], (slopes[0] * (x[..., None] * knots).cos()).sum(-1))
    assert both.others == 2 * forward.others == 2 * 3 * 2 * x.numel() * 7


def test_the_least_times_on_an_h100_are_those_of_its_peaks():
    """The fastest products in float32 accuracy are three in TF32, and the table's column is what the functions give."""
    from kernel_table import BATCHED, SINGLE, SLICED
    from roofline import CARDS, Work, least_seconds, published, rate_work, sigreg_work

    peaks = published(CARDS["H100"])
    assert least_seconds(Work(3350 * 10**9), peaks) == pytest.approx(1)
    assert least_seconds(Work(10**12, 2 * 494_700 * 10**9 // 3), peaks) == pytest.approx(2)
    assert least_seconds(Work(10**12, 10**12, 3 * 66_900 * 10**9), peaks) == pytest.approx(3)
    assert published(CARDS["RTX 4090"]).products == pytest.approx(82.6e12)  # no TF32: it is as slow as float32
    works = {f"({rows}, {width})": partial(rate_work, 1, rows, width, 4) for rows, width in SINGLE}
    works |= {f"{s} of ({rows}, {width})": partial(rate_work, s, rows, width, 4) for s, rows, width in BATCHED}
    works |= {f"({n}, {width}), {k} slices": partial(sigreg_work, n, width, k, 16) for n, width, k in SLICED}
    page = (BENCH / "README.md").read_text().split("## On an H100")[1].split("\n## ")[0]
    table = dict([cell.strip() for cell in line.split("|")[1:3]] for line in page.splitlines() if line.startswith("| "))
    table = {label.removeprefix("coding rate ").removeprefix("SIGReg "): least for label, least in table.items()}
    for label, work in works.items():
        assert table[label] == f"{least_seconds(work('both'), peaks) * 1e6:.2g}"
        assert table[f"{label}, forward alone"] == f"{least_seconds(work('forward'), peaks) * 1e6:.2g}"


@pytest.mark.skipif(sys.platform != "linux", reason="triton is for Linux")
def test_tiles_compares_what_its_shapes_compute(run_process):
    """In Triton's interpreter, which has no time to tell: each shape computes the product, and is taken in turn."""
    script = """
import sys
sys.path.insert(0, "bench")
import torch, tiles
from seqjepa.kernels.internal import matmul

used = []
tiles.microseconds = lambda what, work: used.append(matmul.product_shapes((0, 0))[0]["BLOCK_M"]) or 1.0
tiles.TILES, tiles.PRECISIONS, tiles.SHOWN = ((32, 64), (64, 32)), ("ieee", "tf32x3"), 24
tiles.multiply(1, 20, 40, 30, torch.device("cpu"))
print(*used)
tiles.TILES = ((32, 32),)
tiles.gram(2, 20, 40, torch.device("cpu"))
"""
    result = run_process(sys.executable, "-c", script, TRITON_INTERPRET="1")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    errors = [float(line.split()[2]) for line in lines if "µs" in line]
    assert len(errors) == (3 + 24) + (3 + 12)  # the library in two precisions, and now
    assert max(errors) < 1e-6
    used = next(line.split() for line in lines if line.startswith("64 "))
    assert (used.count("64"), used.count("32")) == (3 + 12, 12)
