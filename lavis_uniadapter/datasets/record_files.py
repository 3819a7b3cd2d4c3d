"""Read the records of a JSON, JSONL, CSV or TSV file, each with the line where it starts.

What is wrong with a file or with one of its records is read as a `Problem` in its place, so that
all problems of a file can be shown at once.
"""

from __future__ import annotations

import csv
import io
import json
import re
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lavis_uniadapter.common.errors import name_some, nearest

_JSON_WHITESPACE = re.compile(r"[ \t\n\r]*")


class Place(NamedTuple):
    """A line of a file, counted from 1; line 0 is the file as a whole."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path


class Problem(NamedTuple):
    """What is wrong at a place."""

    place: Place
    text: str

    def __str__(self) -> str:
        return f"{self.place}: {self.text}"


class Record(NamedTuple):
    """The fields of an object (JSON, JSONL) or row (CSV, TSV: all of them strings)."""

    place: Place
    fields: dict[str, Any]


# For names in messages; the first line of a table without a header may be a long text.
_SHORTENED = reprlib.Repr()
_SHORTENED.maxstring = 60

# What the json module raises: not JSONDecodeError alone, but ValueError for a number of thousands
# of digits and RecursionError for a thousand lists within each other.
JSON_ERRORS = (ValueError, RecursionError)

# A line, and the fields of the record that starts there or what is wrong there.
_Parsed = Iterator[tuple[int, dict[str, Any] | str]]


class _UnusableFile(Exception):
    """Nothing more can be read from a file."""

    def __init__(self, line: int, text: str):
        super().__init__(text)
        self.line = line


def read_records(path: str | Path, required: Sequence[str]) -> Iterator[Record | Problem]:
    """The records of a file, in a format that its ending names, and its problems, by line.

    ``.json`` is a list of objects, ``.jsonl`` an object a line, ``.csv`` and ``.tsv`` a table under
    a header (RFC 4180, quoted line breaks included; spaces after a separator are passed over).
    All are UTF-8, with or without a byte-order mark. Empty lines are passed over.

    Args:
        required: fields that every record must have, whatever their value; others are kept.

    A file that cannot be read or holds no record is a problem of its own.
    """
    return _read(
        str(path),
        {
            ".json": partial(_json_objects, required=required),
            ".jsonl": partial(_jsonl_objects, required=required),
            ".csv": partial(_rows, required=required, delimiter=","),
            ".tsv": partial(_rows, required=required, delimiter="\t"),
        },
    )


def read_strings(path: str | Path, field: str) -> Iterator[Record | Problem]:
    """The strings of a ``.json`` list or the lines of a ``.txt`` file, as records of one field.

    A JSON value that is no string is kept as it is.
    """

    def elements(text: str) -> _Parsed:
        return ((line, {field: value}) for line, value in _json_elements(text))

    def lines(text: str) -> _Parsed:
        return ((line, {field: value}) for line, value in _lines(text))

    return _read(str(path), {".json": elements, ".txt": lines})


def _read(path: str, parsers: Mapping[str, Callable[[str], _Parsed]]) -> Iterator[Record | Problem]:
    count = 0
    try:
        parse = parsers.get(Path(path).suffix.lower())
        if parse is None:
            raise _UnusableFile(0, f"the file's name must end in {' or '.join(parsers)}")
        for line, found in parse(_text(path)):
            count += 1
            place = Place(path, line)
            yield Problem(place, found) if isinstance(found, str) else Record(place, found)
        if not count:
            raise _UnusableFile(0, "holds no records")
    except _UnusableFile as error:
        yield Problem(Place(path, error.line), str(error))


def _text(path: str) -> str:
    try:
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _UnusableFile(0, f"cannot be read ({_in_short(error)})") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # error.object is what follows the byte-order mark
        before, byte = error.object[: error.start], error.object[error.start]
        raise _UnusableFile(
            before.count(b"\n") + 1, f"is not UTF-8 (byte 0x{byte:02x}); save the file as UTF-8"
        ) from error
    if not text.strip():
        raise _UnusableFile(0, "is empty")
    return text


def _in_short(error: Exception) -> str:
    """An error's message without the place, which is told beside it."""
    return getattr(error, "msg", None) or getattr(error, "strerror", None) or str(error)


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # not str.splitlines, for which some characters that JSON allows within a string end a line
    return enumerate(text.removesuffix("\n").split("\n"), start=1)


def _json_elements(text: str) -> Iterator[tuple[int, Any]]:
    """The elements of a list and the lines where they start."""
    decode = json.JSONDecoder().raw_decode
    position = _JSON_WHITESPACE.match(text, 0).end()
    line = 1 + text.count("\n", 0, position)
    if text[position] != "[":
        raise _UnusableFile(line, "must be a list, [...]; a file of one value a line is a .jsonl")

    def advance(end: int) -> str:
        """Go on to the first sign after `end`, which is returned."""
        nonlocal position, line
        end = _JSON_WHITESPACE.match(text, end).end()
        line += text.count("\n", position, end)
        position = end
        return text[position : position + 1]

    sign = advance(position + 1)
    while sign != "]":
        try:
            element, end = decode(text, position)
        except JSON_ERRORS as error:
            line = getattr(error, "lineno", line)
            raise _UnusableFile(line, f"is no valid JSON ({_in_short(error)})") from error
        yield line, element
        sign = advance(end)
        if sign == ",":
            # a "]" that follows is no value, and decoding says so
            advance(position + 1)
        elif sign != "]":
            raise _UnusableFile(line, "is no valid JSON (a ',' or the closing ']' is missing)")
    if advance(position + 1):
        raise _UnusableFile(line, "is no valid JSON (something follows the closing ']')")


def _json_objects(text: str, required: Sequence[str]) -> _Parsed:
    for line, element in _json_elements(text):
        yield line, _checked_object(element, required)


def _jsonl_objects(text: str, required: Sequence[str]) -> _Parsed:
    for line, content in _lines(text):
        if not content.strip():
            continue
        try:
            element = json.loads(content)
        except JSON_ERRORS as error:
            yield line, f"is no valid JSON ({_in_short(error)})"
        else:
            yield line, _checked_object(element, required)


def _checked_object(value: object, required: Sequence[str]) -> dict[str, Any] | str:
    if not isinstance(value, dict):
        return f"must be an object, {{...}}, and is {reprlib.repr(value)}"
    return _absence(value, required, "field") or value


def _rows(text: str, required: Sequence[str], delimiter: str) -> _Parsed:
    # newline="": line breaks within quotes stay as they are
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True
    )
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            problem = f"is no valid row ({error}); look for a quote that is not closed or doubled"
            if header is None:
                raise _UnusableFile(line, problem) from error
            yield line, problem
            continue
        if cells is None:
            return
        if not any(cells):
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            problem = _absence(header, required, "column") or _repetition(header)
            if problem:
                raise _UnusableFile(line, problem)
        elif len(cells) != len(header):
            name = {",": "comma", "\t": "tab"}[delimiter]
            yield (
                line,
                f"has {len(cells)} cells, and the header has {len(header)}; "
                f'put a cell that contains a {name} into "quotes"',
            )
        else:
            yield line, dict(zip(header, cells, strict=True))


def _absence(names: Sequence[str] | Mapping, required: Sequence[str], what: str) -> str | None:
    absent = [name for name in required if name not in names]
    if not absent:
        return None
    there = name_some(map(_SHORTENED.repr, names)) or "nothing"
    return f"has no {what} {name_some(map(repr, absent))}, but {there}.{nearest(absent[0], names)}"


def _repetition(header: Sequence[str]) -> str | None:
    for index, name in enumerate(header):
        # a table may have columns without a name, such as an index
        if name and name in header[:index]:
            return f"has the column {_SHORTENED.repr(name)} twice"
    return None
