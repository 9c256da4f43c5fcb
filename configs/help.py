"""What `--help` prints of the config: every field with its doc, default and range, grouped by section."""

import textwrap
from collections.abc import Iterator, Mapping

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .compose import describe, run_configs
from .section import by_kind, kinds_of

WIDTH = 110


def help_page(usage: str, schema: type[BaseModel]) -> str:
    """The help page of a command.

    Args:
        usage: text at the top of the page.
        schema: model of its config, whose fields are the sections.
    """
    lines = [usage, "", *textwrap.wrap("Configs: " + ", ".join(run_configs()), WIDTH, subsequent_indent=" " * 9)]
    for name, field in schema.model_fields.items():
        lines += ["", f"{name}: {about(field)}", *section_lines(name, field)]
    return "\n".join(lines)


def field_lines(section: str, fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Lines on the fields of a section, and of the sections in it."""
    for key, field in fields.items():
        yield from _field_lines(f"{section}.{key}", field)


def section_lines(name: str, field: FieldInfo) -> Iterator[str]:
    """Lines on a field that holds a section, of one kind or of several."""
    kinds = by_kind(field.annotation)
    if not kinds:
        yield from field_lines(name, kinds_of(field.annotation)[0].model_fields)
        return
    yield f"  {name}.kind = {field.default.kind}   [{'|'.join(kinds)}]"
    for kind, section in kinds.items():
        yield from _wrapped(f"{kind}: {section.__doc__}", 6)
    for key in dict.fromkeys(key for section in kinds.values() for key in section.model_fields if key != "kind"):
        having = {kind: section for kind, section in kinds.items() if key in section.model_fields}
        only = "" if len(having) == len(kinds) else f"  with {name}.kind={' or '.join(having)}"
        yield from _field_lines(f"{name}.{key}", next(iter(having.values())).model_fields[key], only)


def _field_lines(name: str, field: FieldInfo, only: str = "") -> Iterator[str]:
    """Lines on a field: its default and what it allows, then what it means; or on the sections in it."""
    if kinds_of(field.annotation):
        yield from _wrapped(f"{name}: {about(field)}", 2)
        yield from section_lines(name, field)
        return
    # as it would be written in a config
    default = {"None": "null", "True": "true", "False": "false"}.get(str(field.default), field.default)
    yield f"  {name} = {default}   [{describe(field)}]{only}"
    yield from _wrapped(field.description or "", 6)


def about(field: FieldInfo) -> str:
    """The description of a field that holds a section: its own, or else that of the section or of its kinds' base."""
    section = kinds_of(field.annotation)[0]
    kinds = tuple(by_kind(field.annotation).values())
    common = (
        next(base for base in section.__mro__[1:] if all(issubclass(kind, base) for kind in kinds))
        if kinds
        else section
    )
    return " ".join((field.description or common.__doc__ or "").partition("\n\n")[0].split())


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)
