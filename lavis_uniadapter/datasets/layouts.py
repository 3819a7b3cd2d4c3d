"""The annotation files of LAVIS's dataset classes: a schema for each class.

LAVIS checks nothing. A wrong record stops it in the middle of training or gives wrong results: an
evaluation dataset takes each letter of a plain string as a caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, ClassVar

from lavis.datasets.datasets import caption_datasets as caption
from lavis.datasets.datasets import coco_caption_datasets as coco_caption
from lavis.datasets.datasets import coco_vqa_datasets as coco_vqa
from lavis.datasets.datasets import retrieval_datasets as retrieval
from lavis.datasets.datasets import video_caption_datasets as video_caption
from lavis.datasets.datasets.vg_vqa_datasets import VGVQADataset
from lavis.datasets.datasets.video_vqa_datasets import VideoQADataset
from pydantic import Field, create_model

from lavis_uniadapter.datasets.own_images import (
    ImageQADataset,
    OwnCaptionDataset,
    OwnCaptionEvalDataset,
    OwnRetrievalDataset,
    OwnRetrievalEvalDataset,
)
from lavis_uniadapter.datasets.records import (
    FileName,
    Place,
    Problem,
    Record,
    Text,
    Texts,
    check_records,
    problems,
)

# Takes the content of an annotation file and its path; returns what is wrong.
CheckContent = Callable[[object, str], list[Problem]]

Identifier = Annotated[int | float | str, Field(description="an identifier")]
Number = Annotated[int, Field(description="a whole number")]
NumberOrName = Annotated[int | Text, Field(description="a whole number or a string")]
Caption = Annotated[str, Field(description="a string")]
References = (
    Annotated[
        Text | list[Text] | None,
        Field(description="a non-empty string or a list of them (or nothing)"),
    ],
    None,
)


class VisualRecord(Record):
    """A record about an image or a video.

    Attributes:
        visual_key: the field with the file name.
        side_files: checks of the annotation files after the first, if they hold no records.
    """

    visual_key: ClassVar[str]
    side_files: ClassVar[tuple[CheckContent, ...]] = ()

    @property
    def file(self) -> str:
        """The file's normalised name, below the visual folder."""
        return getattr(self, self.visual_key)


class Answer(Record):
    """A candidate answer."""

    answer: Text


def layout(
    visual_key: str,
    unique: str | None = None,
    side_files: tuple[CheckContent, ...] = (),
    **fields: Any,
) -> type[VisualRecord]:
    """A schema with the file name under ``visual_key`` and the given fields.

    Args:
        visual_key, unique, side_files: see `VisualRecord`.
        fields: the type of each, with a default if it may be absent: ``(type, default)``.
    """
    required = {visual_key: FileName, **fields}
    defined: dict[str, Any] = {
        name: field if isinstance(field, tuple) else (field, ...)
        for name, field in required.items()
    }
    schema = create_model("VisualRecord", __base__=VisualRecord, **defined)
    schema.visual_key, schema.unique, schema.side_files = visual_key, unique, side_files
    return schema


def record_problems(content: object, path: str, schema: type[Record]) -> list[Problem]:
    """What is wrong with a list of records."""
    return problems(check_records(content, schema, path))


def answer_problems(content: object, path: str) -> list[Problem]:
    """What is wrong with VQA's list of candidate answers."""
    if isinstance(content, list):
        content = [{"answer": answer} for answer in content]
    return record_problems(content, path, Answer)


def label_problems(content: object, path: str) -> list[Problem]:
    """What is wrong with VideoQA's mapping of answers to class indices."""
    labels = content if isinstance(content, Mapping) else {}
    numbers = sorted(number for number in labels.values() if type(number) is int)
    if labels and all(map(str.strip, labels)) and numbers == list(range(len(labels))):
        return []
    text = "must be a mapping of non-empty answers to different numbers, counted from 0"
    return [Problem(Place(path), text)]


def coco_problems(content: object, path: str, list_key: str) -> list[Problem]:
    """What is wrong with a file in COCO's layout."""
    if isinstance(content, Mapping) and isinstance(content.get(list_key), list):
        return []
    text = f"must be in COCO's layout: a mapping with a list under '{list_key}'"
    return [Problem(Place(path), text)]


_QUESTION: dict[str, Any] = {"question": Text, "answer": Text, "question_id": NumberOrName}
LAYOUTS: dict[type, type[VisualRecord]] = {
    retrieval.RetrievalDataset: layout("image", caption=Caption, image_id=Identifier),
    retrieval.RetrievalEvalDataset: layout("image", caption=Texts),
    retrieval.VideoRetrievalDataset: layout("video", caption=Caption),
    retrieval.VideoRetrievalEvalDataset: layout("video", caption=Texts),
    caption.CaptionDataset: layout("image", caption=Caption, image_id=Identifier),
    caption.CaptionEvalDataset: layout("image", caption=References, image_id=Identifier),
    # takes the identifier from the file's name
    coco_caption.COCOCapEvalDataset: layout("image", caption=References),
    coco_caption.NoCapsEvalDataset: layout("image", caption=References, img_id=Identifier),
    video_caption.VideoCaptionDataset: layout("video", caption=Caption, image_id=Identifier),
    video_caption.VideoCaptionEvalDataset: layout("video", caption=References, image_id=Identifier),
    VideoQADataset: layout("video", unique="question_id", **_QUESTION),
    ImageQADataset: layout("image", unique="question_id", **_QUESTION),
    coco_vqa.COCOVQADataset: layout("image", question=Text, answer=Texts),
    coco_vqa.COCOVQAEvalDataset: layout(
        "image",
        unique="question_id",
        side_files=(
            answer_problems,
            partial(coco_problems, list_key="questions"),
            partial(coco_problems, list_key="annotations"),
        ),
        question=Text,
        question_id=Number,
    ),
    VGVQADataset: layout("image", question=Text, answer=Text),
}

# For training and evaluation, of this package's own datasets, by task and data_type.
DATASET_CLASSES: dict[tuple[str, str], tuple[type, type]] = {
    ("retrieval", "images"): (OwnRetrievalDataset, OwnRetrievalEvalDataset),
    ("retrieval", "videos"): (retrieval.VideoRetrievalDataset, retrieval.VideoRetrievalEvalDataset),
    ("caption", "images"): (OwnCaptionDataset, OwnCaptionEvalDataset),
    ("caption", "videos"): (
        video_caption.VideoCaptionDataset,
        video_caption.VideoCaptionEvalDataset,
    ),
    ("qa", "images"): (ImageQADataset, ImageQADataset),
    ("qa", "videos"): (VideoQADataset, VideoQADataset),
}


def layout_of(dataset_cls: type) -> type[VisualRecord] | None:
    """The schema of a dataset class or of the nearest class that it derives from, if known."""
    return next((LAYOUTS[cls] for cls in dataset_cls.__mro__ if cls in LAYOUTS), None)
