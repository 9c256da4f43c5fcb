"""What `--help` prints of the config: every field with its doc, default and range, grouped by section."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .compose import CONFIGS, describe

__all__ = ["field_lines", "help_page"]

WIDTH = 110


def help_page(usage: str, schema: type[BaseModel]) -> str:
    """The help page of a command.

    Args:
        usage: how it is called.
        schema: model of its config, whose fields are the sections.
    """
    files = sorted(
        p.relative_to(CONFIGS.parent).as_posix() for p in CONFIGS.rglob("*.yaml") if p.parent.name != "accelerate"
    )
    lines = [usage, "", *textwrap.wrap("Configs: " + ", ".join(files), WIDTH, subsequent_indent=" " * 9)]
    for name, section in schema.model_fields.items():
        model: Any = section.annotation
        lines += ["", f"{name}: {' '.join(model.__doc__.split())}", *field_lines(name, model.model_fields)]
    return "\n".join(lines)


def field_lines(section: str, fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    """Lines on the fields of a section."""
    for key, field in fields.items():
        # as it would stand in a config
        default = {"None": "null", "True": "true", "False": "false"}.get(str(field.default), field.default)
        yield f"  {section}.{key} = {default}   [{describe(field)}]"
        yield from textwrap.wrap(field.description or "", WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6)
