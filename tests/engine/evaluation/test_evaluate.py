"""Frozen-probe evaluation: its heads against scikit-learn's, its features against the model's, its refusals."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from seqjepa.engine.analysis import regressions
from seqjepa.engine.analysis.regressions import held_out_rows, knn, logistic_regression, ridge_regression
from seqjepa.engine.config import compose
from seqjepa.engine.evaluate import main
from seqjepa.engine.evaluation import measure
from seqjepa.engine.evaluation.equivariance import read_moved
from seqjepa.engine.evaluation.frozen import FrozenNetwork, FrozenProbe, frozen_probes, untrained_network
from seqjepa.engine.evaluation.protocols import PROTOCOLS, fast_protocol, paper_protocol, ridge_protocol
from seqjepa.engine.evaluation.report import agreement, length_grid
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runtime.accelerator import build_accelerator
from seqjepa.engine.train import main as train
from seqjepa.loaders.loader import build_loaders

FACTORS = ("rotation", "translation_x", "translation_y", "scale")
R2_NAMES = [f"{feature}_r2_{factor}" for feature in ("z", "agg") for factor in FACTORS]
SMALL = ["eval.lengths=[1,2,4]", "eval.batch_size=32"]


@pytest.fixture(scope="module")
def run(tiny_for_module, folder_of):
    words = tiny_for_module(run="evaluated")
    assert train(words) == 0
    return str(folder_of(words))


@pytest.fixture
def parts(tiny):
    config = compose(tiny(*SMALL, "sequence.num_observed=4")).config
    accelerator = build_accelerator(config.run, 1)
    data = config.data.model_copy(update={"batch_size": 32})
    loaders = build_loaders(data, config.sequence, config.actions, seed=1, device=accelerator.device)
    network = FrozenNetwork(untrained_network(config, accelerator), [1, 2, 4], accelerator)
    return config, loaders, network


class Oracle:
    """In a network's place: features that hold nothing but the label and the first action, and noise."""

    def __init__(self, loaders, shuffled=False):
        self.loaders, self.shuffled = loaders, shuffled

    def features(self, batch):
        known = torch.cat([torch.eye(10)[batch.labels], batch.actions[:, 0]], dim=-1)
        if self.shuffled:
            known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(int(batch.index[0])))]
        return dict.fromkeys(("first", "pair", *(f"{name}_{n}" for name in ("agg", "mean") for n in (1, 2, 4))), known)

    def clean(self, loader):
        table = torch.zeros(2000, 15)
        for _, labels, index in loader.clean():
            chosen = labels.roll(1) if self.shuffled else labels
            table[index] = torch.cat([torch.eye(10)[chosen], torch.zeros(len(labels), 5)], dim=-1)
        return table

    read = FrozenNetwork.read


def blobs(seed=0, count=600, dims=12, classes=4):
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, classes, count)
    rows = generator.normal(size=(classes, dims))[labels] + generator.normal(size=(count, dims)) * 1.5
    return torch.from_numpy(rows * generator.uniform(0.1, 10, dims)).float(), torch.from_numpy(labels)


def test_ridge_is_scikit_learns_and_finds_its_penalty():
    rows, _ = blobs()
    generator = torch.Generator().manual_seed(0)
    targets = rows @ torch.randn(12, 3, generator=generator) + 4 * torch.randn(600, 3, generator=generator) + 7
    train_rows, test_rows, train_targets = rows[:400], rows[400:], targets[:400]
    path = regressions._ridge_path(train_rows, train_targets, test_rows)
    scaler = StandardScaler().fit(train_rows.double())
    for penalty, predicted in zip(regressions.RIDGE_PENALTIES, path, strict=True):
        # torch's deviation divides by n - 1, scikit-learn's by n
        alpha = penalty * 400 * 400 / 399
        expected = Ridge(alpha=alpha).fit(scaler.transform(train_rows.double()), train_targets)
        error = np.abs(expected.predict(scaler.transform(test_rows.double())) - predicted.numpy()).max()
        assert error < 1e-3  # float32 targets on scikit-learn's side
    chosen = ridge_regression(train_rows, train_targets, torch.arange(400) % 5 == 0, test_rows)
    errors = [(predicted - targets[400:]).square().mean() for predicted in path]
    assert (chosen - targets[400:]).square().mean() < 1.05 * min(errors)  # the best to within its draw
    assert max(errors) > 2 * min(errors)  # where another penalty would be much worse


@pytest.mark.parametrize(("count", "number"), [(1, 0), (1, 1), (2, 1), (2, 2), (9, 0), (9, 8), (9, 9)])
def test_rows_that_do_not_suffice_to_choose_a_penalty_get_the_largest(count, number):
    rows, labels = blobs()
    held_out, features, classes = torch.arange(count) < number, rows[:count], labels[:count]
    targets = torch.stack([rows[:count].sum(1), classes.float()], dim=1)
    path = regressions._ridge_path(features, targets, rows[count:])
    assert torch.equal(ridge_regression(features, targets, held_out, rows[count:]), path[-1])
    assert all(predicted.isfinite().all() for predicted in path)
    ours = logistic_regression(features, classes, held_out, rows[count:], num_classes=4)
    train_rows, test_rows = regressions._standardised(features, rows[count:])
    largest = max(regressions.LOGISTIC_PENALTIES)
    weights = regressions._logistic_fit(train_rows, classes, torch.zeros(13, 4), largest)
    assert torch.equal(ours, regressions._scores(test_rows, weights).argmax(-1))


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ([5, 1, 2], {5}),  # by their positions
        ([25, 5, 1, 2], {5, 25}),
        ([9, 4, 2, 1], {1}),  # none would be held out
        ([10, 5], {5}),  # none would be kept
        ([0, 5, 10, 15, 20, 25], {0, 25}),
    ],
)
def test_a_few_images_are_held_out_by_rank_where_positions_leave_too_few(positions, expected):
    index = torch.tensor(positions).repeat(2)  # two renderings
    held_out = held_out_rows(index)
    assert set(index[held_out].tolist()) == expected
    assert not expected & set(index[~held_out].tolist())


def test_logistic_regression_is_scikit_learns():
    rows, labels = blobs(count=1200)
    predicted = logistic_regression(
        rows[:800], labels[:800], torch.arange(800) % 5 == 0, rows[800:], num_classes=4
    ).numpy()
    scaler = StandardScaler().fit(rows[:800])
    best = max(
        (LogisticRegression(C=1 / (800 * penalty), max_iter=1000) for penalty in regressions.LOGISTIC_PENALTIES),
        key=lambda model: model.fit(scaler.transform(rows[:800]), labels[:800]).score(
            scaler.transform(rows[800:]), labels[800:]
        ),
    )
    theirs = best.predict(scaler.transform(rows[800:]))
    assert (predicted == theirs).mean() > 0.95  # they may have settled on neighbouring penalties
    assert (predicted == labels[800:].numpy()).mean() > 0.6  # chance is a quarter


def test_logistic_fit_reaches_a_minimum_that_is_near():
    rows, labels = blobs()
    rows = (rows - rows.mean(0)) / rows.std(0)
    weights = regressions._logistic_fit(rows, labels, torch.zeros(13, 4), 0.01)
    expected = LogisticRegression(C=1 / (600 * 0.01), max_iter=1000, tol=1e-8).fit(rows, labels)
    np.testing.assert_allclose(weights[:-1].numpy().T, expected.coef_, atol=5e-3)


def test_neighbours_are_scikit_learns():
    rows, labels = blobs()

    def similarity(distance):
        return 1 - distance

    expected = KNeighborsClassifier(20, metric="cosine", algorithm="brute", weights=similarity)
    expected.fit(rows[:400], labels[:400])
    ours = knn(rows[:400], labels[:400], rows[400:], num_classes=4, k=20)
    assert (ours.numpy() == expected.predict(rows[400:])).mean() > 0.99  # float32 may swap the twentieth


def test_features_of_a_length_need_only_its_views(parts):
    _, loaders, network = parts
    batch = next(loaders.train.epoch(0))
    whole = network.features(batch)
    assert whole.keys() == {"first", "pair", *(f"{name}_{n}" for name in ("agg", "mean") for n in (1, 2, 4))}
    torch.testing.assert_close(whole["mean_2"], whole["pair"].unflatten(1, (2, -1)).mean(1))
    for length in (1, 2, 4):
        views, actions = batch.views.clone(), batch.actions.clone()
        views[:, max(length, 2) :], actions[:, max(length - 1, 1) :] = 9.0, 9.0
        short = FrozenNetwork(network.model, [length], network.accelerator)
        found = short.features(batch._replace(views=views, actions=actions))[f"agg_{length}"]
        # a batch of fewer images sums its convolutions in another order
        torch.testing.assert_close(found, whole[f"agg_{length}"], rtol=0, atol=1e-5)
    # what training calls the aggregate, at the length of training
    with torch.no_grad():
        output = network.model(batch.views, batch.actions)
    torch.testing.assert_close(whole["agg_4"], output.agg, rtol=0, atol=1e-5)
    torch.testing.assert_close(whole["pair"], output.z[:, :2].flatten(1), rtol=0, atol=1e-5)


def test_clean_features_are_those_of_the_images(parts):
    _, loaders, network = parts
    table = network.clean(loaders.train)
    batch = next(loaders.train.epoch(0))  # view 0 of an affine sequence is the image
    torch.testing.assert_close(table[batch.index], network.features(batch)["first"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("protocol", [ridge_protocol, fast_protocol, paper_protocol])
def test_the_teacher_and_the_predictor_are_never_run(parts, protocol, monkeypatch):
    config, loaders, network = parts
    settings = config.eval.model_copy(update={"epochs": 1, "linear_epochs": 1})

    def refuse(*args):
        raise AssertionError("was run")

    for module in (network.model.target, network.model.target.teacher, network.model.predictor):
        monkeypatch.setattr(module, "forward", refuse)
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}
    probes = frozen_probes([1, 2, 4], 4, loaders.num_classes, loaders.sequence.factors)
    scores = protocol(network, probes, loaders, settings, lambda: None)
    assert {probe.name for probe in probes} <= scores.keys()
    for name, tensor in network.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("protocol", [ridge_protocol, fast_protocol, paper_protocol])
def test_what_the_features_hold_is_found(parts, protocol):
    """Features that are the label and the action answer everything; those of another sequence answer nothing."""
    config, loaders, _ = parts
    settings = config.eval.model_copy(update={"epochs": 60, "linear_epochs": 60, "lr": 1e-2, "hidden": 32})
    probes = frozen_probes([1, 2, 4], 4, loaders.num_classes, loaders.sequence.factors)
    told = protocol(Oracle(loaders), probes, loaders, settings, lambda: None)
    misled = protocol(Oracle(loaders, shuffled=True), probes, loaders, settings, lambda: None)
    for name, value in told.items():
        if "_r2" in name:
            assert value > 0.95
            assert misled[name] < 0.3
        else:
            assert value == 100 or (name.endswith("_knn") and value > 90)  # to which the action is noise
            assert misled[name] < 40  # of ten classes; 70 images


def test_every_image_is_read_whatever_the_batch(parts):
    config, loaders, network = parts
    data = config.data.model_copy(update={"batch_size": 100})
    loaders = build_loaders(data, config.sequence, config.actions, seed=1, device=torch.device("cpu"), drop_last=False)
    calls = []
    rows = network.read(loaders.train, 2, lambda: calls.append(1))
    assert len(calls) == 4
    assert sorted(rows["index"].tolist()) == sorted(2 * loaders.train.sampler.indices.tolist())
    # two renderings of one image, of which the clean features are the same
    order = rows["index"].sort(stable=True).indices
    assert torch.equal(rows["clean"][order[0]], rows["clean"][order[1]])
    assert not torch.equal(rows["agg_4"][order[0]], rows["agg_4"][order[1]])


def test_linear_heads_of_one_number_rest_after_their_epochs(parts):
    config, loaders, network = parts
    scores = []
    for epochs, linear_epochs in ((1, 1), (3, 1), (3, 3)):
        settings = config.eval.model_copy(update={"epochs": epochs, "linear_epochs": linear_epochs})
        torch.manual_seed(0)
        probes = [FrozenProbe("scale", "pair", 1, loaders.sequence.factors["scale"])]
        # an MLP beside it goes on
        probes.append(FrozenProbe("turn", "pair", 2, loaders.sequence.factors["rotation"]))
        scores.append(paper_protocol(network, probes, loaders, settings, lambda: None))
    once, rested, trained = scores
    assert once["scale"] == rested["scale"] != trained["scale"]
    assert once["turn"] != rested["turn"] == trained["turn"]


def test_evaluates_a_run_beside_its_control(run, tmp_path, capsys):
    out = tmp_path / "out"
    words = [run, *SMALL, f"eval.out={out}", "eval.protocol=both", "eval.epochs=1"]
    assert main(words) == 0
    result = json.loads((out / "eval.json").read_text())
    assert result["lengths"] == [1, 2, 4]
    assert result["images"] == {"train": 160, "test": 70}
    for protocol in ("fast", "paper"):
        assert result[protocol]["trained"].keys() == result[protocol]["untrained"].keys()
        assert result[protocol]["trained"] != result[protocol]["untrained"]
        for name, value in result[protocol]["trained"].items():
            assert -math.inf < value <= (1 if "_r2" in name else 100)
    assert {f"agg_top1_{n}" for n in (1, 2, 4)} <= result["paper"]["trained"].keys()
    assert {"z_top1_knn", "first_top1", "mean_top1_4", "z_r2", "z_r2_scale", "agg_r2_rotation"} <= result["fast"][
        "trained"
    ].keys()
    assert result["timing"]["fast_trained_seconds"] > 0
    for figure in ("lengths.png", "factors.png"):
        assert (out / figure).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "agg_r2_translation_x" in said
    share = json.loads((Path(run) / "summary.json").read_text())["largest_class"]
    assert re.search(rf"largest_class( +{share:.2f}){{4}}", said)


def test_images_that_were_trained_on_are_not_held_out(run, tmp_path, capsys):
    """Of two runs with other subsets each leaves out its own, for its control too."""
    other = tmp_path / "other"
    shutil.copytree(run, other, symlinks=True)
    checkpoint = other / "checkpoints" / "epoch-0002"
    state = json.loads((checkpoint / "state.json").read_text())
    words = ["data.held_out=300", "data.subset_seed=5", "eval.lengths=[1]", "eval.protocol=ridge"]

    def loaders(*words):
        config = compose([*words], ("", state["config"])).config
        return build_loaders(config.data, config.sequence, seed=0, device=torch.device("cpu"))

    runs = [set(loaders().train.sampler.indices)]
    state["config"]["data"]["subset_seed"] += 1
    runs.append(set(loaders().train.sampler.indices))
    held_out = set(loaders(*words[:2]).validation.sampler.indices)
    write_state(checkpoint, json.dumps(state))
    assert main([run, str(other), *words, f"eval.out={tmp_path / 'out'}"]) == 0
    said, untrained = capsys.readouterr().out, []
    for folder, trained in zip(("1-evaluated-epoch-0002", "2-other-epoch-0002"), runs, strict=True):
        result = json.loads((tmp_path / "out" / folder / "eval.json").read_text())
        assert trained & held_out
        assert result["images"]["test"] == len(held_out - trained)
        assert f"{len(held_out & trained)} of the 300 held-out images were trained on, and are left out" in said
        untrained.append(result["ridge"]["untrained"])
    assert untrained[0] != untrained[1]


@pytest.mark.parametrize("variant", ["ema", "stop_gradient"])
def test_the_control_is_the_network_that_training_starts_from(tiny, tmp_path, variant, monkeypatch):
    """A run at a rate of zero ends with the control's weights, and batch statistics of about the same images."""
    words = tiny("optim.lr=0", "optim.min_lr=0", "run.epochs=10", "checkpoint.every=10", f"target.kind={variant}")
    assert train([*words, "sequence.kind=augment"]) == 0
    made = []

    def watched(*args):
        made.append(untrained_network(*args))
        return made[-1]

    monkeypatch.setattr(measure, "untrained_network", watched)
    assert main([str(tmp_path / "run"), *SMALL]) == 0
    (control,) = made
    trained = load_file(tmp_path / "run" / "checkpoints" / "epoch-0010" / "model.safetensors")
    for name, parameter in control.named_parameters():
        assert torch.equal(parameter, trained[name]), name
    # other batches of the same 160 images: the statistics agree to a few per cent, and those of evaluation's
    # sequences, without the target's views and with more actions, would not
    for name, buffer in control.named_buffers():
        if "running_" in name and not name.startswith("target"):
            assert (buffer - trained[name]).norm() < 0.25 * trained[name].norm() + 0.1, name
    (path,) = (tmp_path / "run" / "eval").glob("*/eval.json")
    fast = json.loads(path.read_text())["fast"]
    for name, value in fast["trained"].items():
        if "_r2_" in name:
            assert value == pytest.approx(fast["untrained"][name], abs=0.15), name


def test_trained_and_untrained_are_not_confused(run, tmp_path, monkeypatch):
    measured = []

    def protocol(network, *args):
        measured.append(network.model.state_dict()["encoder.0.weight"].clone())
        return {"agg_top1_1": float(len(measured)), "z_top1": 0.0, **dict.fromkeys(R2_NAMES, 0.0)}

    monkeypatch.setitem(PROTOCOLS, "fast", protocol)
    assert main([run, "eval.lengths=[1]", f"eval.out={tmp_path}"]) == 0
    result = json.loads((tmp_path / "eval.json").read_text())["fast"]
    saved = load_file(Path(run) / "checkpoints" / "epoch-0002" / "model.safetensors")["encoder.0.weight"]
    place = 0 if torch.equal(measured[0], saved) else 1
    assert torch.equal(measured[place], saved)
    assert not torch.equal(measured[1 - place], saved)
    assert result["trained"]["agg_top1_1"] == place + 1
    assert result["untrained"]["agg_top1_1"] == 2 - place


def test_several_runs_make_a_grid_of_lengths(run, tiny, tmp_path, capsys):
    assert train(tiny("sequence.num_observed=2", "run.epochs=1")) == 0
    out = tmp_path / "out"
    assert main([run, str(tmp_path / "run"), *SMALL, f"eval.out={out}"]) == 0
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["agg_top1"].keys() == {"2", "3"}
    for row in comparison["agg_top1"].values():
        assert row.keys() == {"1", "2", "4"}
        assert row["1"].keys() == {"trained", "untrained", "runs"}
    assert (out / "lengths_grid.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.glob("*/eval.json"))) == 2
    assert "trained on 2" in capsys.readouterr().out


def test_the_grid_takes_the_newest_checkpoint_of_each_run():
    def result(run, epoch, trained, **values):
        scores = {f"agg_top1_{name[1:]}": value for name, value in values.items()}
        control = dict.fromkeys(scores, 1.0)
        facts = {"checkpoint": f"runs/{run}/checkpoints/{epoch}", "epoch": epoch, "num_observed": trained}
        lengths = [int(name[1:]) for name in values]
        return {**facts, "lengths": lengths, "fast": {"trained": scores, "untrained": control}}

    results = [
        result("a", 2, 3, n1=10.0, n2=20.0),
        result("b", 9, 1, n1=5.0),
        result("c", 1, 3, n2=50.0, n4=60.0),
        result("a", 1, 3, n1=99.0, n2=99.0),  # older
    ]
    assert length_grid(results, "fast") == {
        1: {1: (5.0, 1.0, 1)},
        3: {1: (10.0, 1.0, 1), 2: (35.0, 1.0, 2), 4: (60.0, 1.0, 1)},
    }


def test_agreement_is_kendalls_tau():
    def result(fast, paper):
        return {"fast": {"trained": {"m": fast}}, "paper": {"trained": {"m": paper}}}

    ranks = [(1, 2), (2, 1), (3, 3), (4, 4), (5, 6), (6, 5)]
    rows = agreement([result(float(fast), float(paper)) for fast, paper in ranks])
    # 15 pairs of which two are turned round: (13 - 2) / 15
    assert rows["m"]["tau"] == pytest.approx(11 / 15)
    assert rows["m"]["n"] == 6
    assert agreement([result(1.0, 1.0)]) == {}


def write_state(checkpoint, text):
    """Another record in a checkpoint, with checksums that agree."""
    (checkpoint / "state.json").write_text(text)
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)


def test_refuses_what_it_cannot_evaluate(run, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (checkpoint,) = (copy / "checkpoints").glob("epoch-0002")
    weights, state = (checkpoint / "model.safetensors").read_bytes(), (checkpoint / "state.json").read_text()

    def refused(part, *words):
        assert main([str(copy), *SMALL, *words]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert part in line

    refused("encoder.0.weight is (4, 3, 3, 3), the config asks for (8, 3, 3, 3)", "model.encoder.width=8")
    refused("eval.lengths = [3, 1]: must grow", "eval.lengths=[3,1]")
    for lengths in ("[]", "[0]", "[1,65]", "[2,2]"):
        refused("must grow within 1 to 64, such as [1, 3, 5]", f"eval.lengths={lengths}")
    few = json.loads(state)
    few["config"]["model"]["aggregator"] |= {"time_embedding": True, "positions": 3}
    timed = load_file(checkpoint / "model.safetensors") | {"aggregator.time": torch.zeros(3, 24)}
    save_file(timed, checkpoint / "model.safetensors")
    write_state(checkpoint, json.dumps(few))
    refused("eval.lengths: the aggregator has positions for 3 views, not for 4", "eval.lengths=[1,4]")
    (checkpoint / "model.safetensors").write_bytes(weights)
    write_state(checkpoint, state)
    (checkpoint / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    refused("bytes, the manifest says")
    (checkpoint / "model.safetensors").write_bytes(weights)
    without = json.loads(state)
    del without["config"]
    write_state(checkpoint, json.dumps(without))
    refused("state.json: config: Field required")
    for config in (None, [1]):
        write_state(checkpoint, json.dumps(json.loads(state) | {"config": config}))
        refused("state.json: config: Input should be a valid dictionary")
    write_state(checkpoint, "{")
    refused("state.json: not readable")
    write_state(checkpoint, state)
    # before anything is measured
    monkeypatch.setitem(PROTOCOLS, "fast", None)
    (tmp_path / "file").write_text("")
    refused("cannot be written", f"eval.out={tmp_path / 'file'}")
    link = tmp_path / "best"
    link.symlink_to(checkpoint)
    for again in (copy, checkpoint, link):
        refused(f"{copy} and {again} are one checkpoint, {checkpoint}: give one of them", run, str(again))
    refused("encoder.0.weight is (4, 3, 3, 3)", run, "model.encoder.width=8")
    every = json.loads(state)
    every["config"]["data"]["train_subset"] = None
    write_state(checkpoint, json.dumps(every))
    refused("all 30 held-out images were trained on; leave data.held_out", "data.held_out=30")
    other = json.loads(state)
    other["config"]["data"]["name"] = "other_task"
    write_state(checkpoint, json.dumps(other))
    refused("compare runs of one task", run)
    other["config"]["data"]["name"], other["config"]["eval"]["protocol"] = "digits_affine", "paper"
    write_state(checkpoint, json.dumps(other))
    refused("have no protocol in common", run)
    assert main([str(tmp_path / "nothing")]) == 2
    assert "neither a checkpoint nor a run folder" in capsys.readouterr().err
    assert main(["--help"]) == 0
    assert "eval.lengths" in capsys.readouterr().out


def test_a_machine_that_fails_is_one_line(run, tmp_path, capsys, monkeypatch):
    words = [str(run), f"eval.out={tmp_path}", "eval.lengths=[1]", "eval.renderings=1"]
    (tmp_path / "eval.json").mkdir()  # nothing can be written there
    assert main(words) == 4
    assert re.fullmatch(r"cannot read or write: .*eval.json\S*: Is a directory; .*\n", capsys.readouterr().err)
    monkeypatch.setattr(FrozenNetwork, "read", lambda *args: torch.empty(2**50))
    assert main(words) == 4
    said = capsys.readouterr().err
    assert "out of memory; a smaller eval.batch_size" in said
    assert said.count("\n") == 1


def test_runs_under_the_launcher(run, run_process, python, tmp_path):
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no"]
    command = [python, "-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no", "engine/evaluate.py"]
    result = run_process(*command, run, *SMALL, f"eval.out={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "eval.json").exists()
    alone = run_process(python, "engine/evaluate.py", "--nowhere")
    assert (alone.returncode, alone.stderr.count("\n")) == (2, 1)


def test_subspaces_of_a_checkpoint_beside_the_untrained_network(run, capsys):
    assert main([run, "eval.subspace=true", "eval.batch_size=32", "diagnostics.anchors=8"]) == 0
    (folder,) = Path(run).glob("eval/*-subspace")
    found = json.loads((folder / "subspace.json").read_text())
    assert found["trained"].keys() == found["untrained"].keys()
    assert {f"subspace_ev_{f}_{2 if f == 'rotation' else 1}" for f in FACTORS} <= found["trained"].keys()
    for name in ("equivariance_error", "invariance_error_agg", "gap_class", "rank_eq_eff", "rankme_agg"):
        assert math.isfinite(found["trained"][name])
        assert found["trained"][name] != found["untrained"][name]
    assert found["timing"]["seconds"] > 0
    figures = {path.stem for path in folder.glob("*.png")}
    assert {"rotation_circle", "combined_trajectories", "overlap_heatmap", "rank_monitor"} <= figures
    assert {f"{kind}_{factor}" for kind in ("eigs", "sweep_traj") for factor in FACTORS} <= figures
    assert "equivariance_error" in capsys.readouterr().out


def test_moved_views_are_those_after_the_first(parts):
    """agg of the second view on, with the moves between them; computed as the reference code does."""
    _, loaders, network = parts
    network = FrozenNetwork(network.model, [3], network.accelerator)
    found = read_moved(network, loaders.validation, lambda: None)
    batch = next(loaders.validation.epoch(0))
    model = network.model
    z = model.encoder(batch.views[:, :4])
    agg = model.aggregate(z[:, 1:4], model.embed(batch.actions[:, 1:3]))
    count = len(batch.labels)
    for name, expected in (("first", z[:, 0]), ("second", z[:, 1]), ("agg", agg), ("actions", batch.actions[:, 0])):
        torch.testing.assert_close(found[name][:count], expected.float(), rtol=1e-4, atol=1e-5)
    again = read_moved(network, loaders.validation.redrawn(), lambda: None)
    assert torch.equal(again["index"], found["index"])
    assert not torch.equal(again["actions"], found["actions"])
    torch.testing.assert_close(again["first"], found["first"], rtol=1e-4, atol=1e-5)  # at rest in affine sequences
    alone = read_moved(FrozenNetwork(model, [1], network.accelerator), loaders.validation, lambda: None)
    torch.testing.assert_close(
        alone["agg"][:count], model.aggregate(z[:, 1:2], model.embed(batch.actions)[:, :0]).float()
    )
