"""The bases of every section of the config. Imports no torch: `--help` must be instant."""

import importlib
import os
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

from .errors import InputError

PATHS = ("root", "dir", "resume", "compile_cache", "cache", "out")  # fields that name files and folders


class Section(BaseModel):
    """A section of the config. Unknown keys, wrong types, NaN and infinities are errors.

    Its values decide what is learnt: a run cannot be resumed with others, and each belongs to the identity of an
    experiment. Fields in `free` are exempt, because they only say how a run is carried out.

    A field may hold one of several kinds of sections; without `kind`, it holds the kind of its default.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    free: ClassVar[frozenset[str]] = frozenset()
    of_training: ClassVar[bool] = False  # whether it says nothing about a network that is never trained

    @classmethod
    def is_free(cls, field: str) -> bool:
        """Whether a field, by its dotted name within this section, may change when a run is resumed."""
        name, _, inner = field.partition(".")
        if name in cls.free:
            return True
        kinds = kinds_of(cls.model_fields[name].annotation) if inner and name in cls.model_fields else []
        return bool(kinds) and all(kind.is_free(inner) for kind in kinds)

    def untrained(self) -> Self:
        """This section, with defaults in all fields on which a network that is never trained does not depend.

        Two runs whose configs are equal in this form share an untrained control. By default every field counts, or none
        if the section is `of_training`.
        """
        if self.of_training:
            return type(self)()
        inner = {name: value.untrained() for name, value in self if isinstance(value, Section)}
        return self.model_copy(update=inner)

    @model_validator(mode="before")
    @classmethod
    def _fill_kinds(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kinds = {name: field.default.kind for name, field in cls.model_fields.items() if field.discriminator}
        return values | {
            name: {"kind": kind, **values[name]} for name, kind in kinds.items() if isinstance(values.get(name), dict)
        }

    @model_validator(mode="after")
    def _check_values(self) -> Self:
        for field, value in self:
            if field in PATHS and value is not None:
                _check_path(value, field)
            if field == "name" and (not value or not value.isprintable() or "/" in value or value.startswith(".")):
                raise InputError("must be the name of a folder: one line, without /, not beginning with a dot", field)
            if isinstance(value, int) and abs(value) >= 2**32:
                raise InputError("must be less than 2**32", field)
        return self


class Built(Section):
    """A section that configures a class, and builds it.

    Attributes:
        made_by: the class, as `.module:Class` relative to the section's package. It is imported on use, so that a
            config does not import torch.
    """

    made_by: ClassVar[str]

    @classmethod
    def implementation(cls) -> Any:
        """The class that `made_by` names."""
        module, _, name = cls.made_by.partition(":")
        return getattr(importlib.import_module(module, cls.__module__.rpartition(".")[0]), name)

    def build(self, *args: Any, **kwargs: Any) -> Any:
        """Call the class with this section and further arguments."""
        return self.implementation()(self, *args, **kwargs)


class Kind(Built):
    """One of several sections that a field may hold; `kind` is its name in a config."""

    kind: Any  # the Literal of each; declared here, so that it stands before the other fields


class Schema(Section):
    """The whole config of a command; its fields are the sections."""


class Operation(Section):
    """A section that says how a run is carried out; only the fields in `fixed` decide what is learnt."""

    fixed: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def is_free(cls, field: str) -> bool:
        return field.partition(".")[0] not in cls.fixed


def kinds_of(annotation: Any) -> list[type[Section]]:
    """The sections that a field of this type may hold; none if it holds something else."""
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    options = typing.get_args(annotation) or (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, Section)]


def by_kind(annotation: Any) -> dict[str, type[Section]]:
    """The sections that a field of this type may hold, by `kind`; empty if they have none."""
    return {kind.model_fields["kind"].default: kind for kind in kinds_of(annotation) if issubclass(kind, Kind)}


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
    """Refuse text that cannot be a path."""
    try:
        parts = Path(value).expanduser().parts
        too_long = any(len(os.fsencode(part)) > 255 for part in parts) or len(os.fsencode(value)) > 4000
    except (ValueError, RuntimeError) as error:  # a character that cannot be encoded, an unknown user after ~
        raise InputError(f"must be a path ({error})", field) from None
    if too_long or not value.isprintable():
        raise InputError("must be a path: printable, and no longer than a file system takes", field)
