"""What LAVIS's dataset classes read from their annotation files, held to types as well.

A record that breaks these rules makes LAVIS fail in the middle of training, or go on wrongly: an
evaluation dataset iterates a caption that is a plain string letter by letter.
"""

from __future__ import annotations

import posixpath
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike

from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.coco_caption_datasets import (
    COCOCapEvalDataset,
    NoCapsEvalDataset,
)
from lavis.datasets.datasets.coco_vqa_datasets import COCOVQADataset, COCOVQAEvalDataset
from lavis.datasets.datasets.retrieval_datasets import (
    RetrievalDataset,
    RetrievalEvalDataset,
    VideoRetrievalDataset,
    VideoRetrievalEvalDataset,
)
from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavis.datasets.datasets.video_caption_datasets import (
    VideoCaptionDataset,
    VideoCaptionEvalDataset,
)
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset

from lavis_uniadapter.datasets.image_qa import ImageQADataset


def is_text(value: object) -> bool:
    """Whether a value is a string of more than white space."""
    return isinstance(value, str) and bool(value.strip())


def are_texts(value: object) -> bool:
    """Whether a value is a list of at least one text."""
    return isinstance(value, list) and bool(value) and all(map(is_text, value))


def leads_out(name: str) -> bool:
    """Whether a file name, joined to a folder, leads out of it, on this system or on Windows.

    By the name alone: a link below the folder may lead wherever its owner wants.
    """
    name = name.replace("\\", "/")
    is_absolute = name.startswith("/") or re.match(r"[A-Za-z]:/", name)
    return bool(is_absolute) or posixpath.normpath(name).split("/")[0] == ".."


def outside_problem(name: str, root: str | PathLike | None) -> str | None:
    """Say that a record's file name leads out of the visual folder `root`, or None."""
    if not leads_out(name):
        return None
    folder = "the visual folder" if root is None else root
    return f"names {name!r}, which is not below {folder}; name a file below it"


@dataclass(frozen=True)
class Field:
    """One entry of a record.

    Attributes:
        key: its name.
        accepts: whether a value will do; a missing entry is None.
        wanted: what will do, in words.
    """

    key: str
    accepts: Callable[[object], bool]
    wanted: str

    def problem(self, record: Mapping) -> str | None:
        value = record.get(self.key)
        if self.accepts(value):
            return None
        return f"needs {self.wanted} under '{self.key}', has {reprlib.repr(value)}"


def answer_list_problem(content: object) -> str | None:
    """Say what is wrong with the list of candidate answers of VQA, or None."""
    if not isinstance(content, list) or not content:
        return "must be a list of answers, one at least"
    wrong = [f"entry {i} is {reprlib.repr(a)}" for i, a in enumerate(content) if not is_text(a)]
    return f"must hold non-empty strings alone, but {'; '.join(wrong[:20])}" if wrong else None


def class_labels_problem(content: object) -> str | None:
    """Say what is wrong with VideoQA's mapping of answers to class indices, or None."""
    if not isinstance(content, Mapping) or not content:
        return "must be a mapping of answers to class indices, one at least"
    if wrong := [answer for answer in content if not is_text(answer)]:
        return f"must hold non-empty answers alone, but has {reprlib.repr(wrong[0])}"
    indices = list(content.values())
    if not all(isinstance(index, int) for index in indices):
        return "must map answers to whole numbers"
    if sorted(indices) != list(range(len(indices))):
        return f"must number the answers from 0 to {len(indices) - 1}, each number once"
    return None


def _coco_layout_problem(list_key: str) -> Callable[[object], str | None]:
    def problem(content: object) -> str | None:
        if isinstance(content, Mapping) and isinstance(content.get(list_key), list):
            return None
        return f"must be in COCO's layout: a mapping with a list under '{list_key}'"

    return problem


@dataclass(frozen=True)
class SideFile:
    """An annotation file that holds something else than records."""

    what: str
    problem: Callable[[object], str | None]


@dataclass(frozen=True)
class Layout:
    """What a dataset class reads.

    Attributes:
        visual_key: ``image`` or ``video``, the entry with the file name.
        fields: entries of every record.
        unique: an entry whose values differ from record to record.
        side_files: what the annotation files after the first are, where they hold no records.
    """

    visual_key: str
    fields: tuple[Field, ...]
    unique: str | None = None
    side_files: tuple[SideFile, ...] = ()

    def record_problem(self, record: object) -> str | None:
        """Say what is wrong with one record, or None."""
        if not isinstance(record, Mapping):
            return f"is no mapping but {reprlib.repr(record)}"
        return next(filter(None, (field.problem(record) for field in self.fields)), None)


def _layout(visual_key: str, *fields: Field, **options) -> Layout:
    return Layout(visual_key, (Field(visual_key, is_text, "a file name"), *fields), **options)


def _is_given(value: object) -> bool:
    return value is not None


_CAPTION = Field("caption", lambda value: isinstance(value, str), "a string")
_CAPTIONS = Field("caption", are_texts, "a list of non-empty strings")
_REFERENCES = Field(
    "caption",
    lambda value: value in (None, []) or is_text(value) or are_texts(value),
    "a non-empty string or a list of them (or nothing)",
)
_QUESTION = Field("question", is_text, "a non-empty string")
_ANSWER = Field("answer", is_text, "a non-empty string")
_ANSWERS = Field("answer", are_texts, "a list of non-empty strings")
_IMAGE_ID = Field("image_id", _is_given, "an identifier")
_QUESTION_ID = Field(
    "question_id",
    lambda value: isinstance(value, int | str) and value != "",
    "a whole number or a string",
)
_COCO_QUESTION_ID = Field("question_id", lambda value: isinstance(value, int), "a whole number")

LAYOUTS: dict[type, Layout] = {
    RetrievalDataset: _layout("image", _CAPTION, _IMAGE_ID),
    RetrievalEvalDataset: _layout("image", _CAPTIONS),
    VideoRetrievalDataset: _layout("video", _CAPTION),
    VideoRetrievalEvalDataset: _layout("video", _CAPTIONS),
    CaptionDataset: _layout("image", _CAPTION, _IMAGE_ID),
    CaptionEvalDataset: _layout("image", _REFERENCES, _IMAGE_ID),
    COCOCapEvalDataset: _layout("image", _REFERENCES),  # takes the id from the file's name
    NoCapsEvalDataset: _layout("image", _REFERENCES, Field("img_id", _is_given, "an identifier")),
    VideoCaptionDataset: _layout("video", _CAPTION, _IMAGE_ID),
    VideoCaptionEvalDataset: _layout("video", _REFERENCES, _IMAGE_ID),
    VideoQADataset: _layout("video", _QUESTION, _ANSWER, _QUESTION_ID, unique="question_id"),
    ImageQADataset: _layout("image", _QUESTION, _ANSWER, _QUESTION_ID, unique="question_id"),
    COCOVQADataset: _layout("image", _QUESTION, _ANSWERS),
    COCOVQAEvalDataset: _layout(
        "image",
        _QUESTION,
        _COCO_QUESTION_ID,
        unique="question_id",
        side_files=(
            SideFile("answer list", answer_list_problem),
            SideFile("question file", _coco_layout_problem("questions")),
            SideFile("annotation file in COCO's layout", _coco_layout_problem("annotations")),
        ),
    ),
    VGVQADataset: _layout("image", _QUESTION, _ANSWER),
}


def layout_of(dataset_cls: type) -> Layout | None:
    """The layout of a dataset class or of the nearest class that it derives from, if known."""
    return next((LAYOUTS[cls] for cls in dataset_cls.__mro__ if cls in LAYOUTS), None)
