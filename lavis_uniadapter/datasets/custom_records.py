"""Records of a user's own data: what they hold, checks across records, and LAVIS's records."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from lavis_uniadapter.datasets.layouts import Question
from lavis_uniadapter.datasets.records import (
    Found,
    Place,
    Problem,
    Record,
    Text,
    read_records,
)
from lavis_uniadapter.processors.extracted_frames import clip_file


def _whole_number(value: object) -> object:
    if not isinstance(value, str):
        return value
    value = value.strip()
    return int(value) if re.fullmatch(r"[0-9]{1,19}", value) else value or None


def _name(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return (value.strip() or None) if isinstance(value, str) else value


Captions = Annotated[
    list[Text],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
    Field(min_length=1, description="a non-empty string (or a list)"),
]
# Identifiers are collated to tensors of 64 bits.
Number = Annotated[
    Annotated[int, Field(ge=0, lt=2**63)] | None,
    BeforeValidator(_whole_number),
    Field(description="a whole number, or nothing,"),
]
Name = Annotated[
    str | None,
    BeforeValidator(_name),
    Field(description="a string or a whole number, or nothing,"),
]


class RetrievalRecord(Record):
    """Captions of a file, for retrieval."""

    caption: Captions
    image_id: Name = None


class CaptionRecord(Record):
    """Captions of a file. LAVIS's captioning task reports its number beside what it generates."""

    caption: Captions
    image_id: Number = None


class QARecord(Question):
    """A question about a file."""

    unique = ("question_id",)
    question_id: Number = None


def read_all(
    paths: Sequence[str], schema: type[Record], formats: Sequence[str] | None = None
) -> list[Found | Problem]:
    """Read files of records one after the other."""
    return [item for path in paths for item in read_records(path, schema, formats)]


def found_in(items: Iterable[Found | Problem]) -> list[Found]:
    """The sound records among the items that were read."""
    return [item for item in items if isinstance(item, Found)]


def partly_given_problems(found: Sequence[Found], key: str) -> Iterator[Problem]:
    """Identifiers are given in every record or in none: one of ours could equal a given one."""
    given = [getattr(item.record, key) is not None for item in found]
    for item, has_one in zip(found, given, strict=True):
        if has_one != given[0]:
            has, other_has = ("a", "has none") if has_one else ("no", "has one")
            yield Problem(
                item.place,
                f"has {has} '{key}', and {found[0].place} {other_has}; give one in every record or "
                "in none",
            )


def image_id_problems(found: Sequence[Found], training: bool) -> Iterator[Problem]:
    """A file has one image_id; in evaluation no other file has the same."""
    of_file: dict[str, Found] = {}
    of_id: dict[int | str, Found] = {}
    for item in found:
        file, image_id = item.record.file, item.record.image_id
        if image_id is None:
            continue
        other = of_file.setdefault(file, item)
        if other.record.image_id != image_id:
            yield Problem(
                item.place,
                f"gives '{file}' the image_id {image_id!r}, and {other.place} gives it "
                f"{other.record.image_id!r}; give a file one image_id",
            )
        other = of_id.setdefault(image_id, item)
        if not training and other.record.file != file:
            yield Problem(
                item.place,
                f"gives '{file}' the image_id {image_id!r}, which {other.place} gives to "
                f"'{other.record.file}'; give each file its own in evaluation",
            )


def missing_file_problems(found: Sequence[Found], folder: str) -> Iterator[Problem]:
    """A problem for each file that does not exist, where it is named first."""
    places: dict[str, Place] = {}
    for item in found:
        places.setdefault(item.record.file, item.place)
    is_video = bool(found) and found[0].record.visual_key == "video"
    file_of: Callable[[str], str] = clip_file if is_video else str
    for name, place in places.items():
        if not os.path.isfile(file_of(os.path.join(folder, name))):
            yield Problem(place, f"names {name!r}, and there is no such file below {folder}")


def repetitions(found: Sequence[Found], id_key: str) -> list[Found]:
    """Those that repeat an earlier one, file and words alike.

    No error: people do describe a video twice in the same words (MSR-VTT's do).
    """
    contents = [str(item.record.model_dump(exclude={id_key})) for item in found]
    first = {content: item for item, content in zip(found[::-1], contents[::-1], strict=True)}
    return [i for i, content in zip(found, contents, strict=True) if first[content] is not i]


def lavis_captions(
    records: Sequence[Any], training: bool, default_id: Callable[[str, int], int | str]
) -> list[dict[str, Any]]:
    """Records for LAVIS: one per caption in training, one per file in evaluation.

    Args:
        default_id: gives the image_id of a file without one, from its name and number.
    """
    captions: dict[str, list[str]] = {}
    ids: dict[str, int | str] = {}
    for record in records:
        captions.setdefault(record.file, []).extend(record.caption)
        default = default_id(record.file, len(ids))
        ids.setdefault(record.file, default if record.image_id is None else record.image_id)
    if training:
        said = [(record.file, caption) for record in records for caption in record.caption]
    else:
        said = list(captions.items())
    key = records[0].visual_key
    return [{key: name, "caption": caption, "image_id": ids[name]} for name, caption in said]


def lavis_questions(records: Sequence[Any]) -> list[dict[str, Any]]:
    """Records for LAVIS's ``VideoQADataset``, numbered unless they have numbers."""
    return [
        {
            record.visual_key: record.file,
            "question": record.question,
            "answer": record.answer,
            "question_id": number if record.question_id is None else record.question_id,
        }
        for number, record in enumerate(records)
    ]
