"""Questions, answers and texts from files: one on each line (.txt), or records."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

from lavis.common.utils import get_cache_path
from pydantic import Field

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.layouts import Answer
from lavis_uniadapter.datasets.preflight import as_list
from lavis_uniadapter.datasets.records import (
    FORMATS,
    Record,
    Text,
    load_json,
    problems,
    read_records,
)
from lavis_uniadapter.runners.launch import set_cache_root

R = TypeVar("R", bound=Record)


class Query(Record):
    """A text to look for."""

    text: Text


class Question(Record):
    """A question about every file."""

    question: Text


class QuestionOfFile(Question):
    """A question about a file, or about every file."""

    file: Annotated[str | None, Field(description="a file name, or nothing,")] = None


def read_texts(path: str) -> list[str]:
    """Different texts."""
    return list(dict.fromkeys(record.text for record in _read(path, Query)))


def read_answers(path: str) -> list[str]:
    """Different answers."""
    return list(dict.fromkeys(record.answer for record in _read(path, Answer)))


def read_questions(path: str) -> dict[str | None, list[str]]:
    """Questions by the file that they are about; None: every file."""
    has_files = Path(path).suffix.lower() != ".txt"
    questions: dict[str | None, list[str]] = {}
    for record in _read(path, QuestionOfFile if has_files else Question):
        questions.setdefault(getattr(record, "file", None) or None, []).append(record.question)
    return questions


def _read(path: str, schema: type[R]) -> list[R]:
    """The records of a file; ConfigError names the first that is wrong, and its line."""
    items: list[Any] = list(read_records(path, schema, (".txt", *FORMATS)))
    if wrong := problems(items):
        more = f" ({len(wrong) - 1} more records are wrong)" if len(wrong) > 1 else ""
        raise ConfigError(f"{wrong[0]}{more}")
    return [item.record for item in items]


def recipe_answers(config: Any) -> list[str] | None:
    """The candidate answers of a question-answering recipe; None if their file is not here.

    They are in LAVIS's ``ans2label`` or ``answer_list.json``, or in what ``custom_qa`` reads.
    """
    set_cache_root(config.run_cfg)
    for name, section in config.datasets_cfg.items():
        sources = section.build_info.get("annotations") or {}
        stored = {key: as_list(source.storage) for key, source in sources.items() if source}
        if name.startswith("custom_"):
            given = stored.get("answer_list") or stored.get("train") or []
            paths = list(given)
        else:
            every = itertools.chain.from_iterable(stored.values())
            lists = [path for path in every if os.path.basename(path) == "answer_list.json"]
            paths = [get_cache_path(path) for path in stored.get("ans2label") or lists[:1]]
        if paths and all(map(os.path.isfile, paths)):
            answers = itertools.chain.from_iterable(map(_labels, paths))
            return list(dict.fromkeys(answers))
    return None


def _labels(path: str) -> list[str]:
    """The answers of a file, which may be LAVIS's ``ans2label``."""
    content = load_json(path) if path.endswith(".json") else None
    return list(content) if isinstance(content, dict) else read_answers(path)
