"""From a command line to a validated config: YAML files left to right, then `section.key=value` overrides.

The schema is a pydantic model whose fields are the sections. Nothing is expanded or read from the environment. Every
error is one line: where the value was set, the field, the value, what is allowed. `--help` must be instant: no torch.
"""

import contextlib
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import yaml
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from .errors import InputError, first_line, shown
from .migration import NEW_NAMES, migrated
from .section import Schema, Section, by_kind, kinds_of, leaves

CONFIGS = Path(__file__).resolve().parent  # in a checkout and in site-packages alike
NOT_RUNS = ("accelerate", "launch")  # folders of what starts a run

# errors of the parser, and of its constructors (dates, numbers of thousands of digits)
UNREADABLE = (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError)
LARGEST_CONFIG, MOST_ALIASES = 2**15, 16
FLOAT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # YAML 1.1 wants a point and a sign: 3e-4 would be text


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # pyright: ignore[reportGeneralTypeIssues]
    """PyYAML's safe loader, but 3e-4 is a number, dates and all keys are text, and a repeated key is an error."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value] if isinstance(node, yaml.MappingNode) else []
        if twice := next((key for number, key in enumerate(keys) if key in keys[:number]), None):
            raise yaml.constructor.ConstructorError(None, None, f"{twice!r} is given twice", node.start_mark)
        if keys:
            self.flatten_mapping(node)  # `<<` is not a name
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = "tag:yaml.org,2002:str"  # a task named 4711, or on
        return super().construct_mapping(node, deep)


class Dumper(yaml.SafeDumper):
    """PyYAML's safe dumper; it quotes texts that `Loader` would take for numbers."""


Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}
for _yaml in (Loader, Dumper):
    _yaml.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^(?:{FLOAT.pattern})$"), list("-+.0123456789"))


Config = TypeVar("Config", bound=Schema)


class Composed(NamedTuple, Generic[Config]):
    """A validated config and where each of its values was set."""

    config: Config
    origins: dict[str, str]  # dotted field -> file or override
    notes: list[str]  # a line for each file of an earlier version

    def origin(self, field: str) -> str | None:
        """The file or override that set `field` or, failing that, something inside it."""
        if field in self.origins:
            return self.origins[field]
        inside = [origin for name, origin in self.origins.items() if name.startswith(field + ".")]
        return inside[-1] if inside else None

    def located(self, error: InputError) -> str:
        """The line of an error that came up while running, with the field and the place that set it."""
        if error.field is None:
            return str(error)
        origin = self.origin(error.field)
        return f"{f'{origin}: ' if origin else ''}{error.field}: {error}"


def compose(words: list[str], schema: type[Config], base: tuple[str, dict[str, Any]] | None = None) -> Composed[Config]:
    """Merge the layers that `words` names and validate the result once.

    Args:
        words: paths of YAML files, and overrides `section.key=value`, in any order; files merge first.
        schema: model of the whole config, every section of which has a default.
        base: name and values of a layer below them, such as a checkpoint's config.

    Raises:
        InputError: a line for each thing that is wrong.
    """
    if strange := next((word for word in words if not word.isprintable()), None):
        raise InputError(f"{shown(strange)}: an argument must be one line of printable text")
    try:
        return _compose(words, schema, base)
    except RecursionError:
        given = ", ".join([*([base[0]] if base else []), *(word[-100:] for word in words)])
        raise InputError(f"{given}: nested too deeply") from None


def _compose(words: list[str], schema: type[Config], base: tuple[str, dict[str, Any]] | None) -> Composed[Config]:
    merged, origins, notes = {}, {}, []
    for label, layer in [*([base] if base else []), *_files(words, schema, notes), *_overrides(words, schema)]:
        if found := next(_unexpanded(layer), None):
            raise InputError(f"{label}: {found}; write the value itself")
        for field in leaves(layer):
            # a later layer's scalar replaces a section, and a section a scalar
            origins = {n: o for n, o in origins.items() if not f"{n}.".startswith(f"{field}.")}
            origins = {n: o for n, o in origins.items() if not field.startswith(f"{n}.")} | {field: label}
        merged = _merge(merged, layer, label, schema)
    try:
        return Composed(schema.model_validate(merged, context=origins), origins, notes)
    except ValidationError as errors:
        draft = Composed(schema(), origins, notes)
        lines = dict.fromkeys(_explain(error, draft, merged) for error in errors.errors())
        raise InputError("\n".join(lines)) from None


def dump(config: BaseModel) -> str:
    """The whole config as YAML."""
    return yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True)


def read(text: str, schema: type[BaseModel], place: list[str] | None = None) -> Any:
    """The values in a YAML text of the whole config, or of one place in it.

    Where a field holds text, a value that YAML would read as a number or a boolean stays the text that was written.

    Args:
        text: YAML.
        schema: model of the whole config.
        place: names of the sections and of the field, from the outermost in; None for the whole.

    Raises:
        ValueError: it would take minutes, or gigabytes, to read.
        yaml.YAMLError: it is not valid YAML. Invalid values may raise any of the errors in `UNREADABLE`.
    """
    values, texts = _read_plain(text), yaml.load(text, getattr(yaml, "CBaseLoader", yaml.BaseLoader))
    for key in reversed(place or []):
        values, texts = {key: values}, {key: texts}
    return _in_words(values, texts, schema)


def _read_plain(text: str) -> Any:
    if len(text) > LARGEST_CONFIG:  # the parser takes minutes for a hundred thousand brackets
        raise ValueError(f"{len(text)} characters, at most {LARGEST_CONFIG} are read")
    if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader)) > MOST_ALIASES:
        raise ValueError(f"more than {MOST_ALIASES} aliases")  # a few lines of them unfold to gigabytes
    return yaml.load(text, Loader)


def _unexpanded(section: Any, name: str = "") -> Iterator[str]:
    """A message for each field with syntax that Hydra or OmegaConf would expand, which is refused here."""
    if isinstance(section, (dict, list)):
        items = section.items() if isinstance(section, dict) else enumerate(section)
        for key, value in items:
            place = f"{name}.{key}" if name else str(key)
            yield from _unexpanded(str(key) if "${" in str(key) else value, place)
    elif isinstance(section, str) and "${" in section:
        yield f"{shown(name)}: '${{' is not expanded"
    elif section == "???":
        yield f"{shown(name)} = '???': a value is missing"


def _files(words: list[str], schema: type[Schema], notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The files as nested mappings, each with its name; those of an earlier version add a line to `notes`."""
    for name in (word for word in words if "=" not in word):
        try:
            layer = read(_find(name).read_text(encoding="utf-8"), schema)
        except InputError:
            raise
        except OSError as error:
            raise InputError(f"{name}: cannot be read ({error.strerror})") from None
        except UNREADABLE as error:
            mark = getattr(error, "problem_mark", None)
            line = f" line {mark.line + 1}:" if mark else ""
            raise InputError(f"{name}:{line} not readable as YAML ({_reason(error)})") from None
        if not isinstance(layer, dict):
            raise InputError(f"{name}: must be a mapping of sections, such as `optim: {{lr: 3e-4}}`")
        if (now := migrated(layer)) != layer:
            renamed = [f"{old} is {new}" for old in leaves(layer) if (new := NEW_NAMES.get(old))]
            notes.append(f"{name}: settings of an earlier version, read by their new names: {', '.join(renamed)}")
        yield name, now


def _overrides(words: list[str], schema: type[Schema]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The overrides as nested mappings, each with its name; kinds first, because they decide what fields there are."""
    overrides = (word for word in words if "=" in word)
    renamed = []
    for word in sorted(overrides, key=lambda word: not word.partition("=")[0].endswith(".kind")):
        name, _, value = word.partition("=")
        if not all(name.split(".")):
            raise InputError(f"override {word}: not of the form section.key=value")
        if " #" in value and value.lstrip()[0] not in "'\"":
            raise InputError(f"override {word}: {name}: ' #' begins a comment; quotes keep it: {name}='\"...\"'")
        try:
            layer = read(value, schema, name.split("."))
        except UNREADABLE as error:
            problem = f"override {word}: {name}: not readable as YAML ({_reason(error)})"
            tagged = isinstance(error, yaml.constructor.ConstructorError) and "tag:" in problem  # as = and << are
            raise InputError(problem + (_quoted(name, value) if tagged else "")) from None
        renamed += [f"override {word}: {old} is {new} now" for old in leaves(layer) if (new := NEW_NAMES.get(old))]
        yield f"override {word}", layer
    if renamed:
        raise InputError("\n".join(renamed))


def _quoted(name: str, value: str) -> str:
    """A hint how to quote a value, for the shell and for YAML, so that it is read as text."""
    return f"; quotes make it text: {name}='\"{value}\"'"


def _reason(error: Exception) -> str:
    return getattr(error, "problem", None) or first_line(error)


def _in_words(values: Any, texts: Any, kind: Any) -> Any:
    """The values of a field of type `kind`, with what was written in place of numbers and booleans where it is str."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType) and len(rest := [arg for arg in args if arg is not type(None)]) == 1:
        return _in_words(values, texts, rest[0])
    if isinstance(values, dict) and isinstance(texts, dict):
        inner = dict.fromkeys(values, args[1]) if origin is dict else {}
        for section in kinds_of(kind):
            inner |= {name: field.annotation for name, field in section.model_fields.items()}
        return {key: _in_words(value, texts.get(key), inner.get(key)) for key, value in values.items()}
    if isinstance(values, list) and isinstance(texts, list) and origin is list:
        return [_in_words(*pair, args[0]) for pair in zip(values, texts, strict=True)]
    return texts if kind is str and isinstance(values, (bool, int, float)) and isinstance(texts, str) else values


def _merge(
    below: dict[str, Any], layer: dict[str, Any], label: str, section: type[Section] | None, prefix: str = ""
) -> dict[str, Any]:
    """Merge a layer over those below: mappings merge, other values replace; a new kind drops fields that it lacks."""
    merged = dict(below)
    for key, value in layer.items():
        old = below.get(key)
        if {type(old), type(value)} == {dict, list}:
            raise InputError(f"{label}: {prefix}{key}: a list and a mapping do not merge")
        if isinstance(old, dict) and isinstance(value, dict):
            field = section.model_fields.get(key) if section else None
            kinds = kinds_of(field.annotation) if field else []
            inner = kinds[0] if kinds else None
            if field and len(kinds) > 1:
                before = old.get("kind", field.default.kind)
                inner = by_kind(field.annotation).get(str(value.get("kind", before)))
                if inner and value.get("kind", before) != before:
                    old = {name: kept for name, kept in old.items() if name in inner.model_fields}
            value = _merge(old, value, label, inner, f"{prefix}{key}.")
        merged[key] = value
    return merged


def run_configs() -> list[str]:
    """Names of the files shipped with the package that a run can be composed of."""
    files = (path for path in CONFIGS.rglob("*.yaml") if path.parent.name not in NOT_RUNS)
    return sorted(f"configs/{path.relative_to(CONFIGS).as_posix()}" for path in files)


def _find(name: str) -> Path:
    """Path of a config file: as given, or else among those shipped with the package."""
    parts = Path(name).parts
    packaged = CONFIGS.joinpath(*parts[1:] if parts[:1] == ("configs",) else parts)
    for path in (Path(name), packaged):
        with contextlib.suppress(OSError, ValueError):  # a name that no file can have
            if path.is_file():
                return path
    shipped = run_configs()
    if close := difflib.get_close_matches(name, shipped, 1, 0.5):
        raise InputError(f"{name}: no such config file; did you mean {close[0]}?")
    nearest = " and ".join(difflib.get_close_matches(name, shipped, 2, 0))
    hint = f"nearest are {nearest} (`seqjepa train --help` lists all); a setting is section.key=value"
    raise InputError(f"{name}: no such config file; {hint}")


def _explain(error: Mapping[str, Any], draft: Composed, merged: dict[str, Any]) -> str:
    """One line for one of pydantic's errors."""
    raised = error.get("ctx", {}).get("error")
    schema = type(draft.config)
    place = _place(schema, [str(part) for part in error["loc"]])
    location = [*place.location, *place.below]
    value = error["input"]
    if isinstance(raised, InputError):
        location += raised.field.split(".") if raised.field else []
        value = _lookup(error["input"], raised.field)
        value = _lookup(draft.config, ".".join(location)) if value is None else value
        problem = str(raised)
    elif error["type"] == "extra_forbidden":
        problem = _unknown(place)
    elif error["type"] == "missing":
        problem = "is required"
    elif error["type"] == "union_tag_invalid":
        location, value = [*location, "kind"], value["kind"]
        problem = f"must be {'|'.join(kind.model_fields['kind'].default for kind in place.kinds)}"
    elif place.kinds or not place.field:
        problem = "must be a section, a mapping of keys to values"
    else:
        location = place.location
        value = _lookup(merged, ".".join(location))
        problem = f"must be {describe(place.field)}"
        if value is None and place.field.annotation is str:
            problem += _quoted(".".join(location), "null")
    dotted = shown(".".join(location))
    given = "" if error["type"] == "missing" else f" = {_short(value)}"
    origin = next((o for n in range(len(location), 0, -1) if (o := draft.origin(".".join(location[:n])))), None)
    return f"{origin + ': ' if origin else ''}{dotted}{given}: {problem}"


class _Place(NamedTuple):
    """Where an error lies in the config."""

    location: list[str]  # names down to the deepest field that is known
    below: list[str]  # further names, of no field
    section: type[BaseModel]  # holds the deepest field, or is its value
    field: FieldInfo | None  # the deepest field
    kinds: list[type[Section]]  # sections that the field may hold; none if it holds no section
    others: dict[str, type[Section]]  # sections allowed in place of `section`, by kind


def _place(schema: type[BaseModel], location: list[str]) -> _Place:
    """Resolve pydantic's location of an error, which contains kinds of sections besides names of fields."""
    here: Any = schema
    section, field, kinds, others = schema, None, [], {}
    names, depth, rest = [], 0, list(location)
    while rest:
        if isinstance(here, type) and issubclass(here, BaseModel):
            section = here
            if rest[0] not in section.model_fields:
                break
            names.append(rest.pop(0))
            field, depth = section.model_fields[names[-1]], len(names)
            here, kinds, others = field.annotation, kinds_of(field.annotation), {}
            if len(kinds) > 1 and rest:
                others = by_kind(field.annotation)
                section = here = others[rest.pop(0)]
        elif typing.get_origin(here) in (dict, list):
            names.append(rest.pop(0))
            here = typing.get_args(here)[-1]
        else:  # members of a union of types
            break
    return _Place(names[:depth], names[depth:] + rest, section, field, kinds, others)


def _unknown(place: _Place) -> str:
    """Message for a key that is not a field: the kinds that have it, or the keys that are allowed."""
    *section, key = [*place.location, *place.below]
    at = ".".join(section)
    if having := [kind for kind, section in place.others.items() if key in section.model_fields]:
        is_now = place.section.model_fields["kind"].default
        return f"only applies with {at}.kind={' or '.join(having)} (it is {is_now})"
    allowed = list(place.section.model_fields)
    close = difflib.get_close_matches(key, allowed, 1)
    has = f"{at} has" if at else "the sections are"
    return f"unknown key{f', did you mean {close[0]}?' if close else ''}; {has} {', '.join(allowed)}"


def _lookup(section: Any, field: str | None) -> Any:
    for part in field.split(".") if field else ():
        section = section.get(part) if isinstance(section, dict) else getattr(section, part, None)
    return section


def _short(value: Any) -> str:
    text = repr(value) if not isinstance(value, BaseModel) else "..."
    return text if len(text) <= 80 else text[:77] + "..."


TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
}


def describe(field: FieldInfo) -> str:
    """What a field allows, in words: its type or choices, and its range."""
    bounds = []
    for rule in field.metadata:
        match rule:
            case Ge(ge=bound):
                bounds.append(f">= {_plain(bound)}")
            case Gt(gt=bound):
                bounds.append(f"> {_plain(bound)}")
            case Le(le=bound):
                bounds.append(f"<= {_plain(bound)}")
            case Lt(lt=bound):
                bounds.append(f"< {_plain(bound)}")
    return " ".join([_type_name(field.annotation, field.metadata), *bounds])


def _plain(bound: Any) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _type_name(annotation: Any, metadata: Any = ()) -> str:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(args[0], args[1].metadata)
    if origin is Literal:
        return "|".join(str(choice) for choice in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(arg) for arg in args)
    if origin is list:
        lengths = {type(rule): rule for rule in metadata}
        low, high = lengths.get(MinLen), lengths.get(MaxLen)
        count = f"{low.min_length} " if low and high and low.min_length == high.max_length else ""
        item = _type_name(args[0])
        return f"a list of {count}{item.removeprefix('a ') + 's' if item.startswith('a ') else item}"
    if origin is dict:
        return f"a mapping of names to {_type_name(args[1])}"
    if sections := kinds_of(annotation):
        return f"{{{', '.join(sections[0].model_fields)}}}"
    return TYPE_NAMES.get(annotation, str(annotation))
