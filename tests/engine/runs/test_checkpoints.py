"""Damage to a checkpoint is found, named and survived; what is no checkpoint is refused in one line."""

import contextlib
import errno
import json
import os
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from seqjepa.configs.errors import InputError
from seqjepa.engine.evaluate import main as evaluate
from seqjepa.engine.evaluation.cases import open_case
from seqjepa.engine.runs import checksums as manifest
from seqjepa.engine.runs import tensors as checkpoint_files
from seqjepa.engine.runs.checkpoints import Checkpoints, find_checkpoint
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runs.metrics_file import read_rows
from seqjepa.engine.runs.state import TrainingState
from seqjepa.engine.train import main

pytestmark = pytest.mark.usefixtures("blank_figures")

FILES = ("model.safetensors", "probes.safetensors", "trainer.safetensors", "rng-00000.safetensors")
FILES += ("state.json", "manifest.json")
BEST = ("eval.best_metric=ep_loss", "eval.best_mode=min")
BEFORE = "probes.standardize=false"  # as in all versions before 6


@pytest.fixture
def tiny(tiny):
    """The tiny run with the probes that all versions have."""
    return partial(tiny, BEFORE)


@pytest.fixture(scope="module")
def saved(tiny_for_module, folder_of):
    """Folder of a run of three epochs, all of whose checkpoints are kept."""
    words = tiny_for_module(BEFORE, "run.epochs=3", "checkpoint.keep=9", *BEST)
    assert main(words) == 0
    return folder_of(words)


def resumed(epochs: int, keep: int = 9) -> tuple[str, ...]:
    """Words that go on with the run to so many epochs."""
    return (f"run.epochs={epochs}", f"checkpoint.keep={keep}", *BEST, "run.resume=auto")


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run", symlinks=True)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def same_weights(one: Path, other: Path) -> bool:
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in FILES[:3])


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_the_checkpoint_before_a_damaged_one_is_taken(copy, saved, tiny, capsys, name, damage):
    newest = copy / "checkpoints" / "epoch-0003"
    damage(newest / name)
    assert main(tiny(*resumed(3))) == 0
    printed = capsys.readouterr().out
    blamed = newest if (name, damage) == ("manifest.json", flip) else newest / name  # which of the two is wrong?
    assert f"damaged checkpoint passed over: {blamed}" in printed
    assert f"resumed from {copy / 'checkpoints' / 'epoch-0002'}" in printed
    assert same_weights(newest, saved / "checkpoints" / "epoch-0003")
    assert not list(newest.parent.glob("damaged-*"))  # its place is taken again


def test_retention_counts_whole_checkpoints_only(copy, tiny, interrupt_at, saved):
    """Two damaged ones at the end, of which two are kept: the good one before them must not go."""
    for epoch in (2, 3):
        flip(copy / "checkpoints" / f"epoch-000{epoch}" / "model.safetensors")
    interrupt_at(6)
    assert main(tiny(*resumed(3, keep=2))) == 143
    found, damaged = Checkpoints(copy / "checkpoints", 2).newest_whole(print)
    assert (found.name, damaged) == ("epoch-0001-step-00002", [])
    kept = {path.name for path in (copy / "checkpoints").iterdir()}
    assert {"epoch-0001", "damaged-epoch-0002", "damaged-epoch-0003"} <= kept


def test_when_all_are_damaged_nothing_is_overwritten(copy, tiny, refused):
    for path in (copy / "checkpoints").glob("epoch-*"):
        cut(path / "model.safetensors")
    before = (copy / "metrics.jsonl").read_text()
    words = ("run.epochs=3", *BEST, "run.overwrite=false")
    capture = tiny(*words, "run.resume=auto")
    refused(capture, "run.resume", "every checkpoint in", "is damaged; run.overwrite=true")
    assert (copy / "metrics.jsonl").read_text() == before


def test_a_checkpoint_named_by_its_path_is_checked_too(copy, tiny, refused):
    path = copy / "checkpoints" / "epoch-0002"
    flip(path / "probes.safetensors")
    words = ("run.epochs=3", *BEST)
    refused(tiny(*words, f"run.resume={path}"), "run.resume: ", "probes.safetensors: changed, its checksum")


def write_record(path: Path, state: dict) -> None:
    """Another state.json in a checkpoint, with a manifest that agrees."""
    (path / "state.json").write_text(json.dumps(state))
    (path / "manifest.json").unlink()
    seal(path)


# of the tiny run, as version 4 saved the sections that have other settings now
OLD_SECTIONS = Path(__file__).parents[2] / "version4" / "tiny.json"


def as_version_5(path: Path) -> None:
    """As when probes saw unscaled features, and a sequence was read forwards or both ways."""
    state = json.loads((path / "state.json").read_text())
    config = state["config"]
    del config["probes"]["standardize"]
    config["objective"]["symmetric"] = config["objective"].pop("reading")["kind"] == "both"
    write_record(path, state | {"version": 5})


def as_version_4(path: Path) -> None:
    """As when training knew nothing but epochs, and sections held the settings of all kinds."""
    as_version_5(path)
    state = json.loads((path / "state.json").read_text())
    position = state.pop("position")
    state |= {"version": 4, "epoch": position["segment"], "step": position["step"]}
    state["best"]["epoch"] = state["best"].pop("segment")
    state["config"] |= json.loads(OLD_SECTIONS.read_text())
    write_record(path, state)


def as_version_3(path: Path) -> None:
    """As the first checkpoints of version 3 were."""
    as_version_4(path)
    (path / "manifest.json").unlink()
    state = json.loads((path / "state.json").read_text())
    state["patience"]["value"] = state["patience"].pop("best")
    state["config"]["objective"]["temperature"] = 0.1
    (path / "state.json").write_text(json.dumps(state | {"version": 3}))


@pytest.mark.parametrize(("version", "as_before"), [(3, as_version_3), (4, as_version_4), (5, as_version_5)])
def test_older_versions_are_migrated_and_a_line_says_so(copy, saved, tiny, capsys, version, as_before):
    newest, before = (copy / "checkpoints" / f"epoch-000{epoch}" for epoch in (3, 2))
    shutil.rmtree(newest)
    as_before(before)
    assert main(tiny(*resumed(3))) == 0
    assert f"{before}: a checkpoint of version {version}; its settings are read by" in capsys.readouterr().out
    assert same_weights(newest, saved / "checkpoints" / "epoch-0003")
    ours, theirs = (json.loads((run / "checkpoints/epoch-0003/state.json").read_text()) for run in (copy, saved))
    for name in ("version", "position", "best"):
        assert ours[name] == theirs[name]
    assert {**ours["config"], "run": 0, "control": 0} == {**theirs["config"], "run": 0, "control": 0}
    assert main(tiny(*resumed(3))) == 0
    assert "a checkpoint of version" not in capsys.readouterr().out


def test_an_interrupted_run_of_version_4_goes_on_in_the_middle(tiny, tmp_path, capsys, interrupt_at, monkeypatch):
    assert main(tiny(run="whole")) == 0
    interrupt_at(7)
    assert main(tiny(run="cut")) == 143
    monkeypatch.undo()
    as_version_4(find_checkpoint(tmp_path / "cut"))
    assert main(tiny("run.resume=auto", run="cut")) == 0
    assert "epoch 2, step 3" in capsys.readouterr().out
    assert same_weights(*(tmp_path / run / "checkpoints" / "epoch-0002" for run in ("whole", "cut")))


def test_a_checkpoint_of_version_4_is_evaluated_alike(copy, tmp_path, capsys):
    words = [str(copy / "checkpoints" / "epoch-0002"), "eval.lengths=[1,2]", f"eval.out={tmp_path / 'eval'}"]
    results = []
    for before in (lambda path: None, as_version_4):
        before(Path(words[0]))
        assert evaluate(words) == 0
        results.append(json.loads((tmp_path / "eval" / "eval.json").read_text()))
        results[-1].pop("timing")
    assert results[0] == results[1]
    assert capsys.readouterr().out.count("epoch-0002: a checkpoint of version 4; its settings are read by") == 1


@pytest.mark.parametrize("missing", ["epoch", "step", "best", "config", "patience"])
def test_a_record_of_version_4_that_lacks_a_part_is_refused(copy, missing):
    path = copy / "checkpoints" / "epoch-0002"
    as_version_4(path)
    state = json.loads((path / "state.json").read_text())
    del state[missing]
    write_record(path, state)
    with pytest.raises(InputError, match=rf"{path / 'state.json'}: (no record of version 4 \(KeyError\)|{missing}: )"):
        checkpoint_files.read(path)


@pytest.mark.parametrize("version", [0, 2, 7, "4", None, True])
def test_other_versions_are_refused(copy, version):
    path = copy / "checkpoints" / "epoch-0002"
    as_version_3(path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | {"version": version}))
    with pytest.raises(InputError, match=f"a checkpoint of version {version!r}; 3, 4, 5, 6 can be read"):
        checkpoint_files.read(path)


def test_a_fork_of_another_run_keeps_that_run(copy, tiny, tmp_path, refused):
    """Its earlier epochs are copied; its id in W&B is not, and a run that stands in the way is refused."""
    words = ("run.epochs=3", *BEST)
    resume = f"run.resume={copy / 'checkpoints' / 'epoch-0002'}"
    assert main(tiny(*words, resume, run="fork")) == 0
    ours, theirs = (
        [{k: v for k, v in row.items() if k != "timing"} for row in read_rows(run / "metrics.jsonl")]
        for run in (tmp_path / "fork", copy)
    )
    assert ours == theirs
    assert (tmp_path / "fork" / "tracker-id").read_text() != (copy / "tracker-id").read_text()
    refused(tiny(*words, resume, "run.overwrite=false", run="fork"), "run.dir", "holds a run")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(
    field=st.sampled_from([*TrainingState.model_fields, "position.step", "best.segment", "patience.waited", "extra"]),
    value=json_values,
)
def test_a_hostile_record_is_refused(copy, field, value):
    """With a manifest that agrees: what is read is checked for itself; only an `InputError` may come of it."""
    path = copy / "checkpoints" / "epoch-0002"
    original = (path / "state.json").read_text()
    try:
        state = json.loads(original)
        section, _, key = field.rpartition(".")
        (state[section] if section else state)[key] = value
        write_record(path, state)
        with contextlib.suppress(InputError):
            _, found = checkpoint_files.read(path)
            assert field != "extra"
            assert all(isinstance(number, int) and number >= 0 for number in found.position)
    finally:
        write_record(path, json.loads(original))


def step_of(state):
    state["position"]["step"] = 10**9


def epoch_of(state):
    state["position"]["segment"] = 2**63


def secret_of(state):
    state["config"]["data"]["name"] = "${oc.env:PLANTED}"


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (step_of, "step 1000000000 of 5"),
        (epoch_of, "position.segment: Input should be less than 4294967296"),
        (secret_of, "'${' is not expanded"),
    ],
)
def test_a_record_is_not_believed(copy, tiny, capsys, monkeypatch, change, part):
    """Its checksum is right: somebody wrote it so."""
    monkeypatch.setenv("PLANTED", "c0ffee")
    newest = copy / "checkpoints" / "epoch-0003"
    state = json.loads((newest / "state.json").read_text())
    change(state)
    (newest / "state.json").write_text(json.dumps(state))
    refuse_resealed(newest, tiny, capsys, part)


def halved(tensors, name):
    tensors[name] = tensors[name].flatten()[:1].clone()


def gone(tensors, name):
    del tensors[name]


def whole_numbers(tensors, name):
    tensors[name] = tensors[name].to(torch.int64)


def other_optimizer(tensors, name):
    for key in [key for key in tensors if key.startswith("optimizer.")]:
        del tensors[key]


@pytest.mark.parametrize(
    ("file", "name", "change", "part"),
    [
        ("trainer", "probe_optimizer.{}.exp_avg", halved, "exp_avg is (1,) of torch.float32, not ("),
        ("trainer", "probe_optimizer.{}.exp_avg", gone, "has exp_avg_sq, step"),
        ("trainer", "probe_optimizer.{}.exp_avg_sq", whole_numbers, "of torch.int64, not ("),
        ("trainer", "", other_optimizer, "optimizer has no state"),
        ("rng-00000", "numpy", halved, "random-generator state is invalid"),
        ("rng-00000", "python", halved, "random-generator state is invalid"),
        ("rng-00000", "torch", halved, "random-generator state is invalid"),
    ],
)
def test_tensors_are_not_believed(copy, tiny, capsys, file, name, change, part):
    """torch's fused Adam, for one, writes beyond a state that is too short."""
    newest = copy / "checkpoints" / "epoch-0003"
    tensors = load_file(newest / f"{file}.safetensors")
    if "{}" in name:
        name = max(key for key in tensors if key.startswith("probe_optimizer.") and key.endswith(name.split("}")[1]))
    change(tensors, name)
    save_file(tensors, newest / f"{file}.safetensors")
    refuse_resealed(newest, tiny, capsys, part)


def refuse_resealed(checkpoint: Path, tiny, capsys, part: str) -> None:
    (checkpoint / "manifest.json").unlink()
    seal(checkpoint)
    capsys.readouterr()
    assert main(tiny(*resumed(4))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert part in error
    assert "c0ffee" not in error


def test_a_checkpoint_that_the_disk_cannot_read(copy, tiny, capsys, monkeypatch):
    """The one before it is taken."""
    broken = copy / "checkpoints" / "epoch-0003" / "model.safetensors"
    original = manifest.file_sha256

    def read(path):
        if path == broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return original(path)

    monkeypatch.setattr(manifest, "file_sha256", read)
    assert main(tiny(*resumed(3))) == 0
    printed = capsys.readouterr().out
    assert f"damaged checkpoint passed over: {broken}: cannot be read (Input/output error)" in printed
    assert f"resumed from {copy / 'checkpoints' / 'epoch-0002'}" in printed


def let_others_in(folder: Path) -> None:
    """Let other users into the folder, and into those above it that are pytest's and root's."""
    above = [path for path in folder.parents if path.stat().st_uid == 0 and path.name.startswith(("pytest-", "popen-"))]
    beside = [path for path in folder.parent.glob("*") if path.exists()]  # not pytest's links to folders that are gone
    modes = {path: path.stat().st_mode for path in [folder, *beside, folder.parent, *above]}
    for path, mode in modes.items():
        path.chmod(mode | 0o055)


@pytest.mark.parametrize("name", [*FILES, ".", ".."])
def test_what_may_not_be_read_is_not_called_damaged(copy, tmp_path, powerless, name):
    """Neither passed over for an older one, nor is it advised to start anew: it may be whole."""
    locked = (copy / "checkpoints" / "epoch-0003" / name).resolve()
    locked.chmod(0)
    let_others_in(tmp_path)
    try:
        with powerless(), pytest.raises(InputError) as caught:
            Checkpoints(copy / "checkpoints", 2).newest_whole(pytest.fail)
        with powerless(), pytest.raises(InputError) as by_name:
            checkpoint_files.check(find_checkpoint(copy / "checkpoints" / "epoch-0003"))
    finally:
        locked.chmod(0o755)
    for error in (caught.value, by_name.value):
        assert not isinstance(error, manifest.Damaged)
        assert f"{locked}" in str(error)
        assert "cannot be read (Permission denied); it may be undamaged: let this user read it" in str(error)
        assert error.field == "run.resume"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_the_umask_decides_who_may_read_a_run(tiny, tmp_path, umask):
    before = os.umask(umask)
    try:
        assert main(tiny("run.epochs=1", *(["diagnostics.every=1"] if umask == 0o002 else []))) == 0
    finally:
        os.umask(before)
    found = [path for path in (tmp_path / "run").rglob("*") if not path.is_symlink()]
    assert {tmp_path / "run" / ".lock", tmp_path / "run" / "summary.json"} < set(found)
    assert sum(path.suffix == ".safetensors" for path in found) == (5 if umask == 0o002 else 4)
    for path in found:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_pipe_among_the_files_is_not_waited_for(copy, tiny, capsys):
    for name in ("manifest.json", "model.safetensors"):
        path = copy / "checkpoints" / f"epoch-000{2 if name == 'manifest.json' else 3}" / name
        path.unlink()
        os.mkfifo(path)
    assert main(tiny(*resumed(3))) == 0
    assert f"resumed from {copy / 'checkpoints' / 'epoch-0001'}" in capsys.readouterr().out


def test_a_best_that_is_a_folder_is_replaced(copy, tiny):
    """As copies by some tools have it."""
    link = copy / "checkpoints" / "best"
    best = os.readlink(link)
    link.unlink()
    shutil.copytree(copy / "checkpoints" / best, link)
    assert main(tiny(*resumed(4))) == 0
    assert os.readlink(link) == "epoch-0004"  # the loss still falls


def test_where_results_go_is_not_for_a_checkpoint_to_say(copy, tmp_path):
    newest, elsewhere = copy / "checkpoints" / "epoch-0003", tmp_path / "elsewhere"
    state = json.loads((newest / "state.json").read_text())
    state["config"]["eval"]["out"] = str(elsewhere)
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "manifest.json").unlink()
    seal(newest)
    assert open_case(newest, [], 0).folder == copy / "eval" / "epoch-0003-fast"
    assert not elsewhere.exists()
    assert open_case(newest, [f"eval.out={elsewhere}"], 0).folder == elsewhere
