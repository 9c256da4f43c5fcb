"""Settings of version 4, in files and in checkpoints, by today's names."""

import contextlib
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from seqjepa.configs.errors import InputError
from seqjepa.configs.migration import NEW_NAMES, migrated
from seqjepa.configs.section import kinds_of
from seqjepa.engine.config import Config, compose
from seqjepa.engine.train import main
from seqjepa.loaders.show import main as show

SECTIONS = [*{name.partition(".")[0]: None for name in NEW_NAMES}, "sequence"]
FIELDS = [name.partition(".")[2] for name in NEW_NAMES] + ["kind", "projector", "rotation"]
VALUES = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(0, 1) | st.sampled_from(["unit", "ema", "augment", "x"])
)
JUNK = VALUES | st.dictionaries(
    st.sampled_from(FIELDS), VALUES | st.dictionaries(st.sampled_from(FIELDS), VALUES), max_size=4
)
# as version 4 printed them
PRINTED = sorted((Path(__file__).parent / "version4").glob("*.yaml"))


@pytest.mark.parametrize("path", PRINTED, ids=lambda path: path.stem)
def test_a_whole_config_of_version_4_is_todays(path):
    old = compose([str(path)])
    variant = f"configs/variant/{path.stem}.yaml"
    assert old.config == compose(["configs/data/cifar100_aug.yaml", "configs/tier/quick.yaml", variant]).config
    (note,) = old.notes
    assert note.startswith(f"{path}: settings of an earlier version")
    assert "rate.weight is objective.rate.weight" in note
    assert not compose([variant]).notes


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"model": {"encoder": "convnet", "width": 8}}, {"model": {"encoder": {"kind": "convnet", "width": 8}}}),
        ({"model": {"encoder": "resnet18", "width": 8}}, {"model": {"encoder": {"kind": "resnet18"}}}),
        ({"model": {"num_heads": 2, "action_dim": 7}}, {"model": {"aggregator": {"num_heads": 2}, "action_dim": 7}}),
        ({"model": {"projector_dim": None, "projector_hidden": 9}}, {"model": {"projector": {"kind": "none"}}}),
        (
            {"model": {"projector_dim": 3, "projector_norm": "unit"}},
            {"model": {"projector": {"kind": "mlp", "dim": 3, "unit": True}}},
        ),
        ({"target": {"sharpening": False, "temperature": None}}, {"target": {"sharpening": {"kind": "none"}}}),
        ({"target": {"kind": "ema", "update": "torch"}}, {"target": {"kind": "ema"}}),
        ({"sigreg": {"weight": 0.25}}, {"objective": {"sigreg": {"weight": 0.25}, "prediction": {"weight": 0.75}}}),
        ({"rate": {"alpha": 2.0}}, {"objective": {"rate": {"scale": {"kind": "alpha", "alpha": 2.0}}}}),
        ({"rate": {"eps": 0.3}}, {"objective": {"rate": {"scale": {"kind": "eps", "eps": 0.3}}}}),
        (
            {"rate": {"normalize": "unit", "alpha": None}},
            {"objective": {"rate": {"normalize": "unit", "scale": {"kind": "eps", "eps": 0.5}}}},
        ),
        ({"vicreg": {"covariance": 2.0}}, {"objective": {"covariance": {"weight": 2.0}}}),
        (
            {"sequence": {"kind": "augment", "angles": [0]}, "actions": {"full": True}},
            {"sequence": {"kind": "augment", "full_actions": True}, "actions": {}},
        ),
        ({"optim": {"lr": 0.1}, "model": {"encoder": {"kind": "convnet"}}}, None),
        ({"model": 3, "rate": {}}, None),
    ],
)
def test_parts_of_configs(old, new):
    before = yaml.safe_dump(old)
    assert migrated(old) == (old if new is None else new)
    assert yaml.safe_dump(old) == before  # it makes another one


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(st.sampled_from([*{name.partition(".")[0] for name in NEW_NAMES}, "sequence"]), JUNK, max_size=4)
)
def test_whatever_stands_there_is_migrated_or_refused(config):
    """Strange values reach the check of the config, which names them."""
    with contextlib.suppress(InputError):  # no other error
        compose([], ("strange", migrated(config)))


def test_every_new_name_is_a_field():
    for name in NEW_NAMES.values():
        schemas = [Config]
        for part in name.split("."):
            fields = [schema.model_fields[part] for schema in schemas if part in schema.model_fields]
            assert fields, name
            schemas = [kind for field in fields for kind in kinds_of(field.annotation)]


def test_the_sheet_reads_version_4_too(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("sequence: {kind: rotation, rotation: [0.0, 0.0]}\nactions: {full: false, normalization: none}")
    assert show([str(path), "--rows", "1", "--out", str(tmp_path / "sheet.png")]) == 0
    assert f"{path}: settings of an earlier version" in capsys.readouterr().out


def test_a_file_of_version_4_trains_after_a_line(tiny, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {encoder: convnet, width: 5}")
    assert main([*tiny("run.epochs=1"), str(path)]) == 0
    assert f"{path}: settings of an earlier version, read by their new names" in capsys.readouterr().out
