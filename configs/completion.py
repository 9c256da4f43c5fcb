"""Completion of a command's words by the shell's tab key: files, settings, and the values of those that have few."""

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .compose import describe, run_configs
from .section import by_kind, kinds_of


def complete_words(parser: argparse.ArgumentParser, name: str, schema: type[BaseModel]) -> None:
    """Add positional words to a parser: files, and settings of a config.

    Args:
        parser: of the command.
        name: of the argument.
        schema: model of the config.
    """
    words: Any = parser.add_argument(name, nargs="*")
    words.completer = lambda prefix, **_: suggestions(prefix, schema)


def suggestions(prefix: str, schema: type[BaseModel]) -> list[str]:
    """How a word that begins with `prefix` may go on: a file, `section.key=`, or `section.key=value`."""
    from argcomplete.completers import FilesCompleter

    known = dict(_settings(schema.model_fields))
    setting, given, _ = prefix.partition("=")
    if given:
        values = known.get(setting, "").split("|")
        return [f"{setting}={value}" for value in values if len(values) > 1 and f"{setting}={value}".startswith(prefix)]
    files = {*FilesCompleter()(prefix), *(name for name in run_configs() if name.startswith(prefix))}
    return sorted(files) + [f"{name}=" for name in known if name.startswith(prefix)]


def _settings(fields: Mapping[str, FieldInfo], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every setting's dotted name, and what it allows."""
    for key, field in fields.items():
        sections = kinds_of(field.annotation)
        if kinds := by_kind(field.annotation):
            yield f"{prefix}{key}.kind", "|".join(kinds)
        if not sections:
            yield f"{prefix}{key}", "true|false" if field.annotation is bool else describe(field)
        for section in sections:
            inner = {name: field for name, field in section.model_fields.items() if not (kinds and name == "kind")}
            yield from _settings(inner, f"{prefix}{key}.")
