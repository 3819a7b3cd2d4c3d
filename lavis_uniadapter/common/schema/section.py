"""The base of all sections, and the message about a value that does not fit."""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping
from typing import Annotated, Any

from omegaconf import OmegaConf
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from lavis_uniadapter.common.errors import ConfigError, nearest, unknown_key

# What a value must be, by pydantic's type of error, where its own words are not those of YAML.
MUST = {
    "bool_type": "be True or False",
    "dict_type": "be a section",
    "finite_number": "be a finite number",
    "float_type": "be a number",
    "int_type": "be a whole number",
    "model_type": "be a section",
    "string_pattern_mismatch": "be a name without / or \\",
    "string_type": "be a text",
    "too_short": "not be empty",
    "tuple_type": "be a list, as in [val]",
}


def _number_as_text(value: object) -> object:
    # YAML reads a name such as 20240101 as a number
    return str(value) if type(value) is int else value


def option(default: Any, description: str) -> Any:
    """A key of a section, with its meaning; a default of ``...`` makes it required."""
    return Field(default, description=description)


Count = Annotated[int, Field(ge=0)]
Size = Annotated[int, Field(ge=1)]
# No amount makes sense beyond 1e6. Of seconds, operating systems take few more.
Amount = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e6)]
Share = Annotated[float, Field(ge=0, le=1)]
Dropout = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, BeforeValidator(_number_as_text)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]
# A file, folder, URL or hub name; ``~`` is the home folder.
Location = Annotated[
    str,
    BeforeValidator(_number_as_text),
    AfterValidator(os.path.expanduser),
    WithJsonSchema({"type": "path"}),
]
Locations = Annotated[tuple[Location, ...], Field(strict=False)]
# AdamW changes a weight by about the learning rate in each step.
LearningRates = Annotated[tuple[Share, ...], Field(strict=False)]


class Section(BaseModel):
    """A section of a configuration. Unknown keys are refused; values are never converted."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    @model_validator(mode="before")
    @classmethod
    def _reject_unknown_keys(cls, values: Any) -> Any:
        # before anything else, as a misspelt key may be why another is missing
        if isinstance(values, Mapping) and cls.model_config["extra"] == "forbid":
            for key in values:
                if key not in cls.model_fields:
                    context = {"key": str(key), "known": list(cls.model_fields)}
                    raise PydanticCustomError("unknown_key", "Unknown key '{key}'", context)
        return values

    @classmethod
    def read(cls, values: Any, where: str) -> Self:
        """Validate a mapping, an OmegaConf section, or None for an empty one.

        Raises:
            ConfigError: naming the key, with the dotted path ``where`` before it, and its value.
        """
        if OmegaConf.is_config(values):
            values = OmegaConf.to_container(values, resolve=True, throw_on_missing=True)
        try:
            return cls.model_validate({} if values is None else values)
        except ValidationError as error:
            raise ConfigError(_explain(error, values, where)) from None

    @classmethod
    def pick(cls, values: Mapping[str, Any], where: str) -> Self:
        """Validate those keys of a larger section that this one has."""
        return cls.read({k: values[k] for k in cls.model_fields if k in values}, where)


def shown(value: object) -> str:
    """A value as a message shows it, cut if it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = 80
    return short.repr(value)


def _explain(error: ValidationError, values: Any, where: str) -> str:
    """The first error in one line."""
    first = error.errors(include_url=False)[0]
    location, kind, context = first["loc"], first["type"], first.get("ctx", {})
    path = [where] if where else []
    for part in location:  # beyond the values there are names of a union's types
        try:
            values = values[part]
        except (LookupError, TypeError):
            break
        path.append(str(part))
    key = ".".join(path)
    if kind == "unknown_key":
        return unknown_key(context["key"], context["known"], key)
    if kind == "missing":
        return f"{'.'.join([*path, str(location[-1])])} is missing."
    if kind == "value_error":
        separator = "" if not key else "." if isinstance(values, Mapping) else ": "
        return f"{key}{separator}{context['error']}"
    if location and location[-1] == "[key]":
        return f"{key}: the name {path[-1]} is a number. Put it in quotes."
    known = re.findall(r"'([^']*)'", context.get("expected", ""))
    must = f"be one of {', '.join(known)}" if known else MUST.get(kind)
    must = must or first["msg"].removeprefix("Input should ")
    return f"{key} is {shown(values)}; it must {must}.{nearest(str(values), known)}"
