"""Read the files that a benchmark is published in, and say what is wrong with them."""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.layouts import Field, is_text, is_whole_number, leads_out
from lavis_uniadapter.datasets.preflight import MAX_NAMED, DatasetError, listing
from lavis_uniadapter.datasets.record_files import JSON_ERRORS, Problem, read_records


def name_field(key: str) -> Field:
    """A field that names something."""
    return Field(key, is_text, "a non-empty string")


def file_field(key: str) -> Field:
    """A field that names something and becomes the name of a file in a folder."""
    return Field(key, _is_file_name, "the name of a file, without folders,")


def _is_file_name(value: object) -> bool:
    return is_text(value) and not leads_out(value) and not {"/", "\\"} & set(value)


def text_field(key: str) -> Field:
    """A field with a text, which may be empty."""
    return Field(key, lambda value: isinstance(value, str), "a string")


def id_field(key: str) -> Field:
    """A field that tells records apart."""
    return Field(
        key,
        lambda value: is_whole_number(value) or isinstance(value, str),
        "a whole number or a string",
    )


def read_list(path: Path, fields: Sequence[Field]) -> list[dict[str, Any]]:
    """The records of a CSV file with a header, or of a JSON list.

    Args:
        path: in UTF-8, with or without a byte-order mark.
        fields: what every record must have; a CSV may have other columns, too.

    Raises:
        DatasetError: listing what is wrong, by line.
    """
    records, wrong = [], []
    for item in read_records(path, [field.key for field in fields]):
        if isinstance(item, Problem):
            wrong.append(str(item))
        else:
            records.append(item.fields)
            wrong += [f"{item.place}: {text}" for text in _field_problems(item.fields, fields)]
    if wrong:
        raise DatasetError(f"{path} is not as it is published:{listing(wrong)}")
    return records


def read_mapping(path: Path) -> Mapping[str, Any]:
    """A JSON object in UTF-8, with or without a byte-order mark.

    Raises:
        DatasetError: there is no such file, or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read ({error}); correct its path.") from error
    except JSON_ERRORS as error:
        raise DatasetError(f"{path} is no valid JSON ({error}); download it anew.") from error
    if not isinstance(content, Mapping):
        raise DatasetError(f"{path} is not as it is published: it must be an object, {{...}}.")
    return content


def records_under(
    content: Mapping[str, Any], key: str, fields: Sequence[Field], path: Path
) -> list[Mapping[str, Any]]:
    """The list under `key` of what `path` holds, once its records are certain to have `fields`.

    Raises:
        DatasetError: listing what is wrong, by the record's index.
    """
    records = content.get(key)
    if not isinstance(records, list):
        raise DatasetError(f"{path} has no list under '{key}', but {reprlib.repr(records)}.")
    wrong = []
    for index, record in enumerate(records):
        if not isinstance(record, Mapping):
            wrong.append(f"record {index} is no mapping but {reprlib.repr(record)}")
        else:
            wrong += [f"record {index} {text}" for text in _field_problems(record, fields)]
    if wrong:
        raise DatasetError(f"'{key}' of {path} is not as it is published:{listing(wrong)}")
    return records


def _field_problems(record: Mapping[str, Any], fields: Sequence[Field]) -> Iterator[str]:
    return filter(None, (field.problem(record) for field in fields))


def repetition_problems(values: Iterable[Hashable], what: str) -> Iterator[str]:
    """One problem, if any of `values` occurs twice."""
    repeated = [str(value) for value, count in Counter(values).items() if count > 1]
    if repeated:
        yield f"{what} more than once: {name_some(repeated, MAX_NAMED)}; remove the repetitions."


def count_problems(counts: Mapping[str, tuple[int, int]]) -> Iterator[str]:
    """One problem, if any of `counts`, {what: (found, published)}, has two different numbers."""
    other = [
        f"{what}: found {found}, published {published}"
        for what, (found, published) in counts.items()
        if found != published
    ]
    if other:
        yield (
            "The numbers are not the published ones; take the published files, or accept yours "
            f"with --allow-other-counts:{listing(other)}"
        )
