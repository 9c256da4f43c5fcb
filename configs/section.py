"""The base of every section of the config. Imports no torch: `--help` must be instant."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .errors import InputError

__all__ = ["Operation", "Section", "leaves"]

PATHS = ("root", "dir", "resume", "compile_cache", "cache", "out")  # fields that name files and folders


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types, NaN and infinities are errors; docs stand under fields.

    Its values decide what is learnt: a run cannot be resumed with others, and each belongs to the identity of an
    experiment. Fields in `free` are exempt, because they only say how a run is carried out.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    free: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def is_free(cls, field: str) -> bool:
        """Whether a field, by its dotted name within this section, may change when a run is resumed."""
        name, _, inner = field.partition(".")
        if name in cls.free:
            return True
        kind = cls.model_fields[name].annotation if inner and name in cls.model_fields else None
        return isinstance(kind, type) and issubclass(kind, Section) and kind.is_free(inner)

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for field, value in self:
            if field in PATHS and value is not None:
                _check_path(value, field)
            if field == "name" and (not value or not value.isprintable() or "/" in value or value.startswith(".")):
                raise InputError("must be the name of a folder: a line without / that begins with no dot", field)
            if isinstance(value, int) and abs(value) >= 2**32:
                raise InputError("must be less than 2**32", field)
        return self


class Operation(Section):
    """A section that says how a run is carried out; only the fields in `fixed` decide what is learnt."""

    fixed: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def is_free(cls, field: str) -> bool:
        return field.partition(".")[0] not in cls.fixed


def leaves(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings by their dotted names; an empty mapping is a value too."""
    found = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _check_path(value: str, field: str) -> None:
    """Refuse what no file can be called."""
    try:
        parts = Path(value).expanduser().parts
        too_long = any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(value)) > 4000
    except (ValueError, RuntimeError) as error:  # a character without bytes, a user who is not there
        raise InputError(f"must be a path ({error})", field) from None
    if too_long or not value.isprintable():
        raise InputError("must be a path: printable, and no longer than a file system takes", field)
