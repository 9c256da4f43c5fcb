"""Five hundred wrong configs: each ends with 2 and one line that names the field and where it was set."""

import tempfile
from pathlib import Path

import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from seqjepa.engine.config import Config
from seqjepa.engine.train import main


def fields(model: type[BaseModel], prefix: str = ""):
    """Every leaf of the config: its dotted name and what it allows."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(fields(Config))
SECTIONS = sorted({name.rpartition(".")[0] for name in FIELDS})
scalars = st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats()
scalars |= st.text("abcxyz_-/ü0", min_size=1, max_size=12)
values = scalars | st.lists(scalars, max_size=3)
values |= st.dictionaries(st.sampled_from("abc"), scalars, min_size=1, max_size=2)


def refuses(wrong: tuple[str, object]) -> bool:
    """Whether the section by itself excludes a value of one of its fields."""
    section, _, key = wrong[0].partition(".")
    try:
        Config.model_fields[section].annotation.model_validate({key: wrong[1]})
    except ValidationError:
        return True
    return False


wrong_values = st.tuples(st.sampled_from(sorted(FIELDS)), values).filter(refuses)
names = st.tuples(st.sampled_from(SECTIONS), st.text("abcdefgh_", min_size=3, max_size=9)).map(".".join)
unknown_keys = st.tuples(names.filter(lambda name: name not in FIELDS), st.just(1))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(wrong=wrong_values | unknown_keys, in_a_file=st.booleans())
def test_a_wrong_config_is_one_line(capsys, wrong, in_a_file):
    name, value = wrong
    with tempfile.TemporaryDirectory() as folder:
        section, key = name.split(".", 1)
        if in_a_file:
            source = str(Path(folder) / "wrong.yaml")
            Path(source).write_text(yaml.safe_dump({section: {key: value}}, allow_unicode=True))
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
