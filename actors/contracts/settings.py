"""How a setting is declared: once, as an annotated field of a frozen dataclass.

    rank: Annotated[int, Ge(1), Doc("Rank of the low-rank update.")] = 32

The type, the bounds, the default and the description of a field are all there is to say of a setting: the
campaign file is read straight into these classes, and its JSON Schema, its reference page and the keys of
stages follow from them. Nothing here imports pydantic, which finds the methods that it calls by their names.
"""

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints


@dataclass(frozen=True)
class Doc:
    """What a setting means, for the JSON Schema and docs/configuration.md."""

    text: str

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the JSON Schema of the field with this description."""
        return {**handler(schema), "description": self.text}


@dataclass(frozen=True)
class Known:
    """Names that editors complete in a text, or in the texts of a list; any other is taken, too."""

    names: tuple[str, ...]

    def __get_pydantic_json_schema__(self, schema: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the JSON Schema of the field in which each text is a known name or any."""
        return self._offered(handler(schema))

    def _offered(self, schema: Any) -> Any:
        if isinstance(schema, list):
            return [self._offered(inner) for inner in schema]
        if not isinstance(schema, dict):
            return schema
        if schema.get("type") == "string":
            shown = {key: value for key, value in schema.items() if key != "type"}
            return {**shown, "anyOf": [{"enum": list(self.names)}, {"type": "string"}]}
        return {key: self._offered(value) for key, value in schema.items()}


@dataclass(frozen=True)
class Checked:
    """A check of a value as it is written, before its type is looked at; it raises ValueError."""

    check: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Return the schema of the field with the check in front."""
        check = {"type": "no-info", "function": self.check}
        return {"type": "function-before", "function": check, "schema": handler(source)}


@dataclass(frozen=True)
class LocalPath:
    """Mark a text that may name a file or directory of this machine; `names` are values that never do."""

    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class NotInKey:
    """Mark a field that changes how a result is computed, but not the result."""


@dataclass(frozen=True)
class AddedLater:
    """Mark a field that came after results were stored.

    `before` is the value that means what was done until then: at it, the field is
    not in the key, so that the older results are found.
    """

    before: Any


@dataclass(frozen=True)
class InKeyWhereUsed:
    """Mark a field that is in the key of those specs alone whose result it changes: see `planning.keys`."""


@dataclass(frozen=True)
class InKeyAs:
    """Mark a field that stands in the key in place of another, by whose name it is there."""

    name: str


@cache
def marks(cls: Any, name: str) -> tuple[Any, ...]:
    """Return the markers of a field; one that is declared anew keeps those of the classes above."""
    declared = (inspect.get_annotations(base).get(name) for base in cls.__mro__)
    return tuple(mark for kind in declared for mark in getattr(kind, "__metadata__", ()))


def unused_later(settings: Any) -> list[str]:
    """Return the fields that were added later and mean what was done before them."""
    cls: Any = type(settings)
    values = ((f.name, getattr(settings, f.name)) for f in fields(settings))
    return [name for name, value in values if AddedLater(value) in marks(cls, name)]


def removed_fields(cls: Any) -> Mapping[str, Any]:
    """Return the `REMOVED` of a dataclass: the fields that it no longer has.

    Each has the value at which results were the same as without it. At that value it stays in keys and in
    JSON, so that older results are found.
    """
    removed: Mapping[str, Any] = getattr(cls, "REMOVED", {})
    return removed


class Settings:
    """Base of what is read from a campaign file: unknown keys are refused, and no value is coerced.

    A file may still give a field of `REMOVED`, at its value.
    """

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "strict": True, "allow_inf_nan": False}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Return pydantic's schema, strict in all but that mappings and lists of the file are taken."""
        schema = handler(source)
        own = handler.resolve_ref_schema(schema)
        own["strict"] = False
        _take_lists(own["schema"])
        removed = removed_fields(cls)
        if not removed:
            return schema

        def without_removed(raw: Any) -> Any:
            if not isinstance(raw, dict):
                return raw
            return {k: v for k, v in raw.items() if k not in removed or v != removed[k]}

        check = {"type": "no-info", "function": without_removed}
        return {"type": "function-before", "function": check, "schema": schema}


def _take_lists(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "tuple":
            schema["strict"] = False
        schema = list(schema.values())
    if isinstance(schema, list):
        for inner in schema:
            _take_lists(inner)


SettingsT = TypeVar("SettingsT", bound=Settings)


def extend(cls: type[SettingsT], settings: Settings, **more: Any) -> SettingsT:
    """Return a `cls` with those of its fields that `settings` have, and `more`, which take precedence.

    Sections inside become what `cls` declares in their place: a `TextSettings` becomes a `TextSpec`.
    """
    declared = get_type_hints(cls)
    values = {
        f.name: _converted(declared[f.name], getattr(settings, f.name))
        for f in fields(settings)  # type: ignore[arg-type]
        if f.name in declared and f.name not in more
    }
    return cls(**values, **more)


def _converted(declared: Any, value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_converted(declared, item) for item in value)
    if not isinstance(value, Settings):
        return value
    section = section_in(declared, Settings)
    return value if section is None or isinstance(value, section) else extend(section, value)


def section_in(annotation: Any, *bases: type) -> Any:
    """Return the section inside an annotation such as `tuple[Section, ...]`, or None.

    A section is a class that derives from any of `bases`.
    """
    if isinstance(annotation, type) and issubclass(annotation, bases):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part, *bases))), None)


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")


def _safe_name(value: object) -> object:
    """Refuse what leads out of a directory, as names become parts of paths."""
    if isinstance(value, str) and not NAME.fullmatch(value):
        raise ValueError(f"{value!r} is no name: letters, digits, '.', '_' and '-' only, at most 60")
    return value


Name = Annotated[str, Checked(_safe_name)]
