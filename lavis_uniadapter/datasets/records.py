"""Read the records of a JSON, JSONL, CSV or TSV file and check each against a pydantic schema.

Problems are returned with their places, so that a message can list all of them.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import os
import posixpath
import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from lavis_uniadapter.common.errors import name_some, nearest

SPLITS = ("train", "val", "test")
FORMATS = (".json", ".jsonl", ".csv", ".tsv")
MAX_NAMED = 20


class DatasetError(ValueError):
    """A dataset that cannot be used. The message lists problems and fixes."""


def is_split(key: str) -> bool:
    """Whether a key of custom data's ``build_info.annotations`` names a split."""
    return key in SPLITS or key.startswith("test_")


class Place(NamedTuple):
    """A ``line`` (from 1) or ``record`` of a JSON list (from 0); without a unit, the whole file."""

    path: str
    unit: str = ""
    number: int = 0

    def __str__(self) -> str:
        if self.unit == "line":
            return f"{self.path}:{self.number}"
        return f"{self.path}, record {self.number}" if self.unit else self.path


class Problem(NamedTuple):
    """What is wrong at a place."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class UnusableFile(DatasetError):
    """A file that cannot be read any further; ``problem`` says where and why."""

    def __init__(self, path: str, text: str, line: int | None = None):
        self.problem = Problem(Place(path, "line", line) if line else Place(path), text)
        super().__init__(str(self.problem))


class Record(BaseModel):
    """Base of the schemas. Messages use the descriptions of fields. Other keys are allowed.

    Attributes:
        unique: a field whose value may not repeat, unless it is None.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    unique: ClassVar[str | None] = None


R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class Found(Generic[R]):
    """A record that fits its schema, and its place."""

    place: Place
    record: R


def escapes_root(name: str) -> bool:
    """Whether a file name, joined to a folder, leaves it, on this system or on Windows.

    Only the name counts: a link in the folder may point anywhere.
    """
    name = name.replace("\\", "/")
    is_absolute = name.startswith("/") or re.match(r"[A-Za-z]:/", name)
    return bool(is_absolute) or posixpath.normpath(name).split("/")[0] == ".."


def _stripped(value: str) -> str:
    if not value.strip():
        raise ValueError("is blank")
    return value.strip()


def _below_root(value: str) -> str:
    if not value.strip() or escapes_root(value):
        raise ValueError("is not below the folder")
    return os.path.normpath(value)


Text = Annotated[str, AfterValidator(_stripped), Field(description="a non-empty string")]
Texts = Annotated[list[Text], Field(min_length=1, description="a list of non-empty strings")]
FileName = Annotated[
    str, AfterValidator(_below_root), Field(description="a file name below the visual folder")
]


def read_records(
    path: str | os.PathLike, schema: type[R], formats: Sequence[str] = FORMATS
) -> Iterator[Found[R] | Problem]:
    """Read a UTF-8 file in the format that its ending names: records and problems, in order.

    ``.json`` is a list, ``.jsonl`` has a value on each line, ``.csv`` and ``.tsv`` are tables with
    a header (RFC 4180; spaces after a separator are skipped), ``.txt`` has a string on each line.
    If the schema has a single field, a value may stand alone, without an object around it. Empty
    lines are skipped, except in ``.txt``. An unreadable or empty file is one problem.
    """
    path = os.fspath(path)
    ending = Path(path).suffix.lower()
    try:
        if ending not in formats:
            raise UnusableFile(path, f"the file's name must end in {' or '.join(formats)}")
        if ending == ".json":
            yield from check_records(load_json(path), schema, path)
        else:
            yield from check_placed(_PARSERS[ending](path, schema), schema, path)
    except UnusableFile as error:
        yield error.problem


def check_records(values: object, schema: type[R], source: str) -> Iterator[Found[R] | Problem]:
    """Check the records of a parsed JSON file, or of a part of it: they must be a list."""
    if not isinstance(values, list):
        yield Problem(Place(source), f"must be a list, [...], not {reprlib.repr(values)}")
        return
    places = (Place(source, "record", index) for index in range(len(values)))
    yield from check_placed(zip(places, values, strict=True), schema, source)


def check_placed(
    values: Iterable[tuple[Place, object]], schema: type[R], source: str
) -> Iterator[Found[R] | Problem]:
    """Check values at their places; a `Problem` among them is passed on."""
    first: dict[object, Place] = {}
    place = None
    for place, value in values:
        if isinstance(value, Problem):
            yield value
            continue
        if len(schema.model_fields) == 1 and not isinstance(value, Mapping):
            value = dict.fromkeys(schema.model_fields, value)
        try:
            record = schema.model_validate(value)
        except ValidationError as error:
            yield from (Problem(place, text) for text in _faults(error, schema, value))
            continue
        key = getattr(record, schema.unique) if schema.unique else None
        if key is not None and first.setdefault(key, place) is not place:
            yield Problem(place, f"repeats the {schema.unique} {key!r} of {first[key]}")
        else:
            yield Found(place, record)
    if place is None:
        yield Problem(Place(source), "has no records")


def problems(items: Iterable[Found | Problem]) -> list[Problem]:
    """The problems among what was read."""
    return [item for item in items if isinstance(item, Problem)]


def listing(items: Sequence[object]) -> str:
    """The first items, one per line, and how many more there are."""
    lines = [str(item) for item in items[:MAX_NAMED]]
    if len(items) > MAX_NAMED:
        lines.append(f"and {len(items) - MAX_NAMED} more")
    return "".join(f"\n    {line}" for line in lines)


def raise_if_any(faults: Iterable[str], title: str) -> None:
    """Raise DatasetError that lists the faults under a title, if there are any."""
    lines = [f"\n- {fault}" for fault in faults]
    if lines:
        raise DatasetError(f"{title}:{''.join(lines)}")


def load_json(path: str, encoding: str = "utf-8-sig") -> Any:
    """Parse a JSON file.

    Raises:
        UnusableFile: it cannot be read or is not JSON.
    """
    text = _read_text(path, encoding)
    try:
        return json.loads(text)
    # ValueError also for a number of thousands of digits, RecursionError for deeply nested lists
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        text = f"is not valid JSON ({_in_short(error)})"
        if str(error).startswith("Extra data"):
            text += "; name the file .jsonl if each line is a record"
        raise UnusableFile(path, text, line) from error


def _faults(error: ValidationError, schema: type[Record], value: object) -> Iterator[str]:
    if not isinstance(value, Mapping):
        yield f"must be an object, {{...}}, not {reprlib.repr(value)}"
        return
    details = error.errors(include_url=False, include_context=False, include_input=False)
    for key in dict.fromkeys(detail["loc"][:1] for detail in details):
        if not key:  # the record as a whole
            yield details[0]["msg"].removeprefix("Value error, ")
            continue
        name = str(key[0])
        text = f"needs {schema.model_fields[name].description} under '{name}', has "
        hint = "" if name in value else nearest(name, value)
        yield text + reprlib.repr(value.get(name)) + (f".{hint}" if hint else "")


def _read_text(path: str, encoding: str = "utf-8-sig") -> str:
    try:
        content = Path(path).read_bytes()
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        # error.object is what follows the byte-order mark
        line, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        reason = f"is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
        raise UnusableFile(path, reason, line) from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UnusableFile(path, f"cannot be read ({_in_short(error)})") from error
    if not text.strip():
        raise UnusableFile(path, "is empty")
    return text


def _in_short(error: Exception) -> str:
    """An error's message without the place in the file."""
    return getattr(error, "msg", None) or getattr(error, "strerror", None) or str(error)


_Parsed = Iterator[tuple[Place, object]]


def _parse_txt(path: str, schema: type[Record]) -> Iterator[tuple[Place, str]]:
    # not str.splitlines, which also splits at characters that JSON allows within a string
    lines = _read_text(path).removesuffix("\n").split("\n")
    return ((Place(path, "line", number), line) for number, line in enumerate(lines, start=1))


def _parse_jsonl(path: str, schema: type[Record]) -> _Parsed:
    for place, line in _parse_txt(path, schema):
        if not line.strip():
            continue
        try:
            yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield place, Problem(place, f"is not valid JSON ({_in_short(error)})")


def _parse_table(path: str, schema: type[Record]) -> _Parsed:
    delimiter, name = ("\t", "tab") if path.lower().endswith(".tsv") else (",", "comma")
    # newline="": line breaks within quotes stay as they are
    text = io.StringIO(_read_text(path), newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True, skipinitialspace=True)
    header: list[str] = []
    while True:
        place = Place(path, "line", reader.line_num + 1)
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"is not a valid row ({error}); look for a quote that is not closed or doubled"
            if not header:
                raise UnusableFile(path, reason, place.number) from error
            yield place, Problem(place, reason)
            continue
        if not any(cells):
            continue
        if not header:
            header = _header(cells, schema, place, name)
        elif len(cells) == len(header):
            yield place, dict(zip(header, cells, strict=True))
        else:
            reason = f"has {len(cells)} cells, but the header has {len(header)}"
            advice = f'put a cell that contains a {name} into "quotes"'
            yield place, Problem(place, f"{reason}; {advice}")


def _header(cells: Sequence[str], schema: type[Record], place: Place, delimiter: str) -> list[str]:
    header = [cell.strip() for cell in cells]
    required = [name for name, field in schema.model_fields.items() if field.is_required()]
    absent = [name for name in required if name not in header]
    # a column may have no name, such as an index
    twice = [name for name in header if name and header.count(name) > 1]
    if absent:
        there = name_some(map(reprlib.repr, header))
        similar = {cell.lower(): cell for cell in header}
        close = difflib.get_close_matches(absent[0], similar, n=1)
        hint = f" Rename {similar[close[0]]!r} to {absent[0]!r}." if close else ""
        if len(header) == 1 and (other := re.search(r"[;,|\t]", header[0])):
            hint = f" Separate them by a {delimiter}, not by {other[0]!r}."
        text = f"has no column {name_some(map(repr, absent))}; its columns are {there}.{hint}"
    elif twice:
        text = f"has the column {reprlib.repr(twice[0])} twice"
    else:
        return header
    raise UnusableFile(place.path, text, place.number)


_PARSERS: dict[str, Callable[[str, type[Record]], _Parsed]] = {
    ".jsonl": _parse_jsonl,
    ".csv": _parse_table,
    ".tsv": _parse_table,
    ".txt": _parse_txt,
}
