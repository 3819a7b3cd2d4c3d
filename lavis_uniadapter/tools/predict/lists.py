"""Questions, answers and texts from files."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lavis.common.utils import get_cache_path
from pydantic import Field

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.layouts import Answer
from lavis_uniadapter.datasets.preflight import as_list
from lavis_uniadapter.datasets.records import FORMATS, Record, Text, problems, read_records
from lavis_uniadapter.runners.launch import set_cache_root

R = TypeVar("R", bound=Record)


class Question(Record):
    """A question about every file."""

    question: Text


class QuestionOfFile(Record):
    """A question about a file, or about every file."""

    question: Text
    file: Annotated[str | None, Field(description="a file name, or nothing,")] = None


class Query(Record):
    """A text to look for."""

    text: Text


def read_questions(path: str) -> list[tuple[str | None, str]]:
    """(file, question) pairs: a question on each line (.txt), or records; see ``_read``."""
    if Path(path).suffix.lower() == ".txt":
        return [(None, record.question) for record in _read(path, Question)]
    return [(record.file or None, record.question) for record in _read(path, QuestionOfFile)]


def read_answers(path: str) -> list[str]:
    """Different answers: one on each line (.txt), or records; see ``_read``."""
    return list(dict.fromkeys(record.answer for record in _read(path, Answer)))


def read_texts(path: str) -> list[str]:
    """Different texts: one on each line (.txt), or records; see ``_read``."""
    return list(dict.fromkeys(record.text for record in _read(path, Query)))


def _read(path: str, schema: type[R]) -> list[R]:
    """The records of a file; ConfigError names the first that is wrong, and its line."""
    items: list[Any] = list(read_records(path, schema, (".txt", *FORMATS)))
    if wrong := problems(items):
        more = f" {len(wrong) - 1} more records are wrong." if len(wrong) > 1 else ""
        raise ConfigError(f"{wrong[0]}.{more}")
    return [item.record for item in items]


def recipe_answers(config: Any) -> list[str] | None:
    """The candidate answers of a question-answering recipe; None if it has none here.

    They are in LAVIS's ``ans2label`` or ``answer_list.json``, or in what ``custom_qa`` reads.
    """
    set_cache_root(config.run_cfg)
    for name, section in config.datasets_cfg.items():
        is_custom = name.startswith("custom_")
        annotations = section.build_info.get("annotations") or {}
        paths = [
            os.path.expanduser(path) if is_custom else get_cache_path(path)
            for path in _answer_files(annotations, is_custom)
        ]
        if paths and all(map(os.path.isfile, paths)):
            found = [_labels(path) or read_answers(path) for path in paths]
            return list(dict.fromkeys(answer for each in found for answer in each))
    return None


def _answer_files(annotations: Any, is_custom: bool) -> Sequence[str]:
    keys = ("answer_list", "train") if is_custom else ("ans2label",)
    for key in keys:
        if annotations.get(key):
            return as_list(annotations[key].storage)
    every = (path for source in annotations.values() if source for path in as_list(source.storage))
    return [path for path in every if os.path.basename(path) == "answer_list.json"][:1]


def _labels(path: str) -> list[str]:
    """The answers of an ``ans2label`` file."""
    if not path.endswith(".json"):
        return []
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    return list(content) if isinstance(content, dict) else []
