"""The base of all sections, and the words for what a value must be."""

from __future__ import annotations

import reprlib
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types as limits
from omegaconf import OmegaConf
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from typing_extensions import Self

from lavis_uniadapter.common.errors import ConfigError, nearest, unknown_key

_UNIONS = (Union, types.UnionType)


@dataclass(frozen=True)
class Wanted:
    """Says in words what a value must be, where the type does not say it well."""

    text: str


def _number_as_text(value: object) -> object:
    # YAML reads a name such as 20240101 as a number
    return str(value) if type(value) is int else value


def option(default: Any, description: str) -> Any:
    """A key of a section, with its meaning; a default of ``...`` makes it required."""
    return Field(default, description=description)


Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, BeforeValidator(_number_as_text)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]
Numbers = Annotated[tuple[float, ...], Field(strict=False)]


class Section(BaseModel):
    """A section of a configuration. Unknown keys are refused; values are never converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @classmethod
    def read(cls, values: Any, where: str) -> Self:
        """Validate a section of a file.

        Args:
            values: a mapping, an OmegaConf section, or None for an empty one.
            where: the section's dotted path, for messages.

        Raises:
            ConfigError: naming the key, its value, and what it must be.
        """
        if OmegaConf.is_config(values):
            values = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
        values = {} if values is None else values
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where} is {shown(values)}; it must be a section.")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise ConfigError(_explain(error, cls, values, where)) from None

    @classmethod
    def pick(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate those keys of a larger section that this one has."""
        return cls.read({k: values[k] for k in cls.model_fields if k in values}, where)


def shown(value: object) -> str:
    """A value as a message shows it, cut if it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def wanted(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    """What a value of a type must be, in words."""
    for item in metadata:
        if isinstance(item, Wanted):
            return item.text
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return wanted(arguments[0], [*arguments[1:], *metadata])
    if origin in _UNIONS:
        *others, last = [wanted(argument) for argument in arguments]
        return f"{', '.join(others)} or {last}"
    if origin is Literal:
        return f"{'one of ' if len(arguments) > 1 else ''}{', '.join(map(str, arguments))}"
    if origin is tuple:
        item = wanted(arguments[0])
        if item.startswith("one of "):
            return f"a list of some of {item.removeprefix('one of ')}"
        return f"a list of {item.removeprefix('a ')}s"
    if origin is dict or _is_section(annotation):
        return "a section"
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return words.get(annotation, "null") + _range_of(metadata)


def _range_of(metadata: Sequence[Any]) -> str:
    flat = [part for item in metadata for part in getattr(item, "metadata", [item])]
    found = {type(part): part for part in flat}
    low = getattr(found.get(limits.Ge), "ge", None)
    above = getattr(found.get(limits.Gt), "gt", None)
    high = getattr(found.get(limits.Le), "le", None)
    below = getattr(found.get(limits.Lt), "lt", None)
    if low is not None and high is not None:
        text = f" from {low} to {high}"
    elif high is not None or below is not None:
        start, end = ("(", above) if low is None else ("[", low)
        text = f" in {start}{end}, " + (f"{below})" if high is None else f"{high}]")
    elif above is not None:
        text = f" > {above}"
    else:
        text = "" if low is None else f" >= {low}"
    step = found.get(limits.MultipleOf)
    return text if step is None else f"{text}, a multiple of {step.multiple_of}"


def _explain(error: ValidationError, section: type[Section], values: Any, where: str) -> str:
    """One error in one line; an unknown key first, as it may be why another is missing."""
    errors = error.errors(include_url=False)
    unknown = ("extra_forbidden", "invalid_key")
    first = next((e for e in errors if e["type"] in unknown), errors[0])
    path = [where] if where else []
    annotation: Any = section
    metadata: Sequence[Any] = ()
    for part in first["loc"]:
        if (inside := _inside(annotation, part)) is None:
            break
        annotation, metadata = inside
        path.append(str(part))
        values = values.get(part)
    key = ".".join(path)
    if first["type"] in unknown:
        (inner,) = filter(_is_section, _choices(annotation))
        return unknown_key(first["loc"][-1], inner.model_fields, key)
    if first["type"] == "missing" and get_origin(annotation) is not tuple:
        return f"{key} is missing."
    if first["type"] == "value_error":
        separator = "" if not key else "." if annotation is section else ": "
        return f"{key}{separator}{first['ctx']['error']}"
    if first["loc"][-1] == "[key]":
        return f"{key}: the name {path[-1]} is a number. Put it in quotes."
    must = wanted(annotation, metadata)
    known = [str(c) for choice in _choices(annotation) for c in get_args(choice)]
    hint = nearest(values, known) if isinstance(values, str) else ""
    return f"{key} is {shown(values)}; it must be {must}.{hint}"


def _choices(annotation: Any) -> list[Any]:
    """The types that a value may have, without their limits."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _choices(arguments[0])
    if origin in _UNIONS:
        return [choice for argument in arguments for choice in _choices(argument)]
    return [annotation]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _inside(annotation: Any, part: object) -> tuple[Any, Sequence[Any]] | None:
    """Type and limits of what a key names in a section or mapping of a type; None in others."""
    for choice in _choices(annotation):
        if _is_section(choice) and part in choice.model_fields:
            field = choice.model_fields[part]
            return field.annotation, field.metadata
        if get_origin(choice) is dict and part != "[key]":
            return get_args(choice)[1], ()
    return None
