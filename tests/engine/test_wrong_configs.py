"""Five hundred wrong configs: each ends with 2 and one line that names the field and where it was set."""

import os
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from seqjepa.configs.section import Section
from seqjepa.engine.config import compose
from seqjepa.engine.train import main


def sections(section: Section, name: str = ""):
    """The sections of a config by their dotted names."""
    if name:
        yield name, section
    for key, value in section:
        if isinstance(value, Section):
            yield from sections(value, f"{name}.{key}".strip("."))


SECTIONS = dict(sections(compose(["configs/smoke.yaml"]).config))
FIELDS = {
    f"{name}.{key}": (section, key)
    for name, section in SECTIONS.items()
    for key, value in section
    if not isinstance(value, Section)
}
scalars = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats()
scalars |= st.text("abcxyz_-/ü0", min_size=1, max_size=12)
values = scalars | st.lists(scalars, max_size=3)
values |= st.dictionaries(st.sampled_from("abc"), scalars, min_size=1, max_size=2)


def refuses(wrong: tuple[str, object]) -> bool:
    """Whether the section by itself excludes a value of one of its fields, where it is not taken as it was written."""
    section, key = FIELDS[wrong[0]]
    if type(section).model_fields[key].annotation in (str, str | None) and isinstance(wrong[1], (bool, int, float)):
        return False
    try:
        type(section).model_validate({key: wrong[1]})
    except ValidationError:
        return True
    return False


wrong_values = st.tuples(st.sampled_from(sorted(FIELDS)), values).filter(refuses)
names = st.tuples(st.sampled_from(sorted(SECTIONS)), st.text("abcdefgh_", min_size=3, max_size=9)).map(".".join)
unknown_keys = st.tuples(names.filter(lambda name: name not in FIELDS.keys() | SECTIONS.keys()), st.just(1))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(wrong=wrong_values | unknown_keys, in_a_file=st.booleans())
def test_a_wrong_config_is_one_line(capsys, wrong, in_a_file):
    name, value = wrong
    with tempfile.TemporaryDirectory() as folder:
        if in_a_file:
            source, layer = str(Path(folder) / "wrong.yaml"), value
            for key in reversed(name.split(".")):
                layer = {key: layer}
            Path(source).write_text(yaml.safe_dump(layer, allow_unicode=True))
        else:
            text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10**6)
            source = f"{name}={text.strip()[1:-1]}"
        capsys.readouterr()
        assert main(["configs/smoke.yaml", source]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert printed.err.startswith("error: ")
    assert source in printed.err  # where it was set
    assert name in printed.err.replace(source, "", 1)


BOMB = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}' if n else 'x'] * 9)}]" for n in range(9))
STRANGE = [
    "run: {name: '${oc.env:HOME}'}",
    "run: {name: '${data.name}'}",
    "run: {name: '${'}",
    'run: {name: !!timestamp "2020-13-45"}',
    "run: {epochs: !!int abc}",
    "run: {epochs: " + "9" * 5000 + "}",
    "run: {overwrite: !!bool x}",
    "run: {name: !!binary aGVsbG8=}",
    "run: !!python/object/apply:os.system [exit]",
    "run: " + "[" * 300 + "]" * 300,
    "run: {name: '???'}",
    "run: {epochs: 1, epochs: 2}",
    "run: {<<: 3}",
    'run: {"a\\nb": 1}',
    '"a\\nb": 1',
    "&x {name: *x}",
    "1: {2: 3}",
    "[1, 2]",
    "text",
    "a: " + "x" * 40_000,
    BOMB,
]


@pytest.mark.parametrize("text", STRANGE, ids=lambda text: text[:30])
def test_strange_yaml_is_one_line(tmp_path, refused, text):
    """Nothing is looked up, run, or unfolded."""
    path = tmp_path / "strange.yaml"
    path.write_text(text)
    refused(["configs/smoke.yaml", str(path)], "strange.yaml")


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("run.epochs=${oc.env:HOME}", ["run.epochs", "'${' is not expanded"]),
        ("run.name=" + "[" * 2000 + "]" * 2000, ["run.name", "nest"]),
        ("run.name=[", ["run.name=[: run.name: not readable as YAML"]),
        ("run.name=a\nb", ["one line of printable text"]),
        ("run.name=null", ["must be text; quotes make it text: run.name='\"null\"'"]),
        ("run.name==", ["not readable as YAML", "; quotes make it text: run.name='\"=\"'"]),
        ("run.name=<<", ["not readable as YAML", "; quotes make it text: run.name='\"<<\"'"]),
        ("run.dir=" + "y" * 300, ["run.dir", "no longer than a file system takes"]),
        ('run.dir="a\\0b"', ["run.dir", "printable"]),
        ('data.root="\\ud800"', ["data.root"]),
        ("control.cache=~nobody-of-this-name/x", ["control.cache", "must be a path"]),
        ("run.dir=/tmp/x #1", ["run.dir", "begins a comment"]),
        ("tracking.project=a/b", ["tracking.project", "none of them one of"]),
        ("data.name=../x", ["data.name", "must be the name of a folder"]),
        ("run.threads=100000000", ["run.threads", "1 to 1024"]),
        ("model.predictor.hidden=99999999999999999999", ["model.predictor.hidden", "less than 2**32"]),
        ("x" * 5000 + ".yaml", ["no such config file"]),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_strange_words_are_one_line(refused, word, parts):
    refused(["configs/smoke.yaml", word], *parts)


def test_a_file_that_cannot_be_read_is_reported(tmp_path, refused, monkeypatch, powerless):
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o755)
    Path("own.yaml").touch(0)
    with powerless():
        refused(["own.yaml"], "error: own.yaml: cannot be read (Permission denied)\n")


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tmp_path, refused):
    os.mkfifo(tmp_path / "pipe.yaml")
    refused([str(tmp_path / "pipe.yaml")], "no such config file")
