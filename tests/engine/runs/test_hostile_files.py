"""Whatever stands in the files of a run or beside a beton: one line at most, no traceback, no hang."""

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqjepa.configs.errors import InputError
from seqjepa.engine.compare import group, read_run, to_markdown
from seqjepa.engine.config import compose
from seqjepa.engine.runs import tensors as checkpoint_files
from seqjepa.engine.runs.checkpoints import Checkpoints
from seqjepa.engine.runs.checksums import seal
from seqjepa.engine.runs.folder import RunFolder
from seqjepa.engine.runs.metrics_file import MetricsFile
from seqjepa.engine.train import main
from seqjepa.loaders.images import find_dataset
from seqjepa.loaders.images.beton import Sidecar, open_beton

pytestmark = pytest.mark.usefixtures("blank_figures")

RUN_FILES = ("config.yaml", "metrics.jsonl", "summary.json", "tracker-id")
CHECKPOINT_FILES = ("manifest.json", "state.json", "model.safetensors", "trainer.safetensors", "rng-00000.safetensors")


@pytest.fixture(scope="module")
def run(tiny_for_module, folder_of):
    """Folder of a run of one epoch."""
    words = tiny_for_module("run.epochs=1")
    assert main(words) == 0
    return folder_of(words)


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory):
    """A beton that is none, with a sidecar that is one."""
    folder = tmp_path_factory.mktemp("betons")
    (folder / "train.beton").write_bytes(b"beton")
    Sidecar("digits", "train", 3, [24, 24], ["0", "1"], [0.5] * 3, [0.5] * 3, "0" * 64, 5, "0" * 64).write(
        folder / "train.beton.json"
    )
    return folder / "train.beton.json"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed(draw, content: bytes) -> bytes:
    """A file's content with one thing about it changed."""
    kind = draw(st.sampled_from(["cut", "flip", "insert", "replace", "json", "field", "deep", "aliases"]))
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    if kind == "cut":
        return content[:place]
    if kind == "flip" and content:
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if kind == "insert":
        return content[:place] + draw(st.binary(min_size=1, max_size=9)) + content[place:]
    if kind == "json":
        return json.dumps(draw(json_values)).encode()
    if kind == "field":
        with contextlib.suppress(ValueError):
            record = json.loads(content.splitlines()[0] if content.startswith(b'{"epoch"') else content)
            if isinstance(record, dict) and record:
                record[draw(st.sampled_from(sorted(record)))] = draw(json_values)
                return json.dumps(record).encode()
    if kind == "deep":
        return b"[" * 100_000
    if kind == "aliases":
        levels = "\n".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]" for n in range(1, 30))
        return f"k0: &k0 [x]\n{levels}\n".encode()
    return draw(st.binary(max_size=60))


def allowed(reader) -> None:
    """A reader reads, or refuses in one line."""
    try:
        reader()
    except InputError as error:
        if len(str(error).splitlines()) != 1:
            raise AssertionError(f"not one line: {error}") from error


def read_all(folder: Path) -> None:
    def table():
        found = group([read_run(folder)])
        if found[0].runs[0].rows:
            to_markdown(found, ["online_linacc_test"])

    def whole():
        found, _ = Checkpoints(folder / "checkpoints", 2).newest_whole(lambda line: None)
        if found:
            checkpoint_files.read(found)

    config = compose(["configs/smoke.yaml", f"run.dir={folder}"]).config
    run_folder = RunFolder(config, config.run, 1)
    for reader in (table, whole, lambda: run_folder.tracker_id, lambda: MetricsFile(folder / "metrics.jsonl", 1)):
        allowed(reader)


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_run_folder(run, examples, record_property):
    record_property("faults", examples)
    checkpoint = run / "checkpoints" / "epoch-0001"
    files = [*(run / name for name in RUN_FILES), *(checkpoint / name for name in CHECKPOINT_FILES)]

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data(), st.sampled_from(files), st.booleans())
    def check(data, path, resealed):
        kept = {other: other.read_bytes() for other in (*files, checkpoint / "probes.safetensors")}
        try:
            path.write_bytes(data.draw(changed(kept[path])))
            if resealed and path.parent == checkpoint and path.name != "manifest.json":
                (checkpoint / "manifest.json").unlink()
                seal(checkpoint)  # checksums that agree: what is read is judged for itself
            read_all(run)
        finally:
            for other, content in kept.items():
                other.write_bytes(content)

    check()


@pytest.mark.parametrize("examples", [100, pytest.param(10_000, marks=pytest.mark.soak)])
def test_a_sidecar(sidecar, examples, record_property):
    record_property("faults", examples)

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(st.data())
    def check(data):
        kept = sidecar.read_bytes()
        try:
            sidecar.write_bytes(data.draw(changed(kept)))
            allowed(lambda: open_beton(sidecar.parent, find_dataset("digits"), "train"))
        finally:
            sidecar.write_bytes(kept)

    check()


def test_yaml_builds_no_objects(tmp_path, refused):
    """Neither in a config nor in a run's folder."""
    marker = tmp_path / "executed"
    evil = f"run: !!python/object/apply:os.system ['touch {marker}']\n"
    (tmp_path / "evil.yaml").write_text(evil)
    refused(["configs/smoke.yaml", str(tmp_path / "evil.yaml")], "evil.yaml", "not readable as YAML")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(evil)
    with pytest.raises(InputError, match="not the folder of a run"):
        read_run(folder)
    assert not marker.exists()


def test_nothing_in_a_config_reaches_a_shell(tiny, tmp_path):
    """Names and paths that a shell would act on are names and paths."""
    words = tiny("run.epochs=1", "run.name='$(touch executed); `touch executed`'", run="a b; touch executed")
    assert main(words) == 0
    assert (tmp_path / "a b; touch executed" / "summary.json").exists()
    assert not list(Path.cwd().rglob("executed"))
    shutil.rmtree(tmp_path / "a b; touch executed")
