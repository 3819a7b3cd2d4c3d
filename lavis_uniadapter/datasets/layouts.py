"""What LAVIS's dataset classes read from their annotation files: a schema for each class.

LAVIS itself checks nothing: a wrong record makes it fail in the middle of training, or gives wrong
results, as an evaluation dataset iterates over a caption that is a plain string letter by letter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, ClassVar

from lavis.datasets.datasets.caption_datasets import CaptionDataset, CaptionEvalDataset
from lavis.datasets.datasets.coco_caption_datasets import COCOCapEvalDataset, NoCapsEvalDataset
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
from pydantic import Field

from lavis_uniadapter.datasets.image_qa import ImageQADataset
from lavis_uniadapter.datasets.records import (
    FileName,
    Record,
    Text,
    Texts,
    check_records,
    is_text,
    listing,
    problems,
)

Identifier = Annotated[int | float | str, Field(description="an identifier")]


class VisualRecord(Record):
    """A record about an image or a video.

    Attributes:
        visual_key: the field with the file name.
        side_files: for the annotation files after the first, if they hold no records: what each
            is, and a function that says what is wrong with its content, or None.
    """

    visual_key: ClassVar[str]
    side_files: ClassVar[tuple[tuple[str, Callable[[object], str | None]], ...]] = ()

    @property
    def file(self) -> str:
        """The file's normalised name, below the visual folder."""
        return getattr(self, self.visual_key)


class Image(VisualRecord):
    """About an image."""

    visual_key = "image"
    image: FileName


class Video(VisualRecord):
    """About a video."""

    visual_key = "video"
    video: FileName


class Caption(Record):
    """A caption to train on; it may be empty."""

    caption: Annotated[str, Field(description="a string")]


class Captions(Record):
    """The captions of an evaluation dataset for retrieval."""

    caption: Texts


class References(Record):
    """The reference captions of an evaluation dataset for captioning."""

    caption: Annotated[
        Text | list[Text] | None,
        Field(description="a non-empty string or a list of them (or nothing)"),
    ] = None


class ImageId(Record):
    """What is shown, by number or name."""

    image_id: Identifier


class ImgId(Record):
    """What is shown, as in NoCaps."""

    img_id: Identifier


class Answer(Record):
    """One answer."""

    answer: Text


class Question(Answer):
    """A question and its answer."""

    question: Text


class NumberedQuestion(Question):
    """A question that results are reported for."""

    unique = ("question_id",)
    question_id: Annotated[int | Text, Field(description="a whole number or a string")]


class CocoQuestion(Record):
    """A question of VQAv2 and its annotators' answers."""

    question: Text
    answer: Texts


class CocoEvalQuestion(Record):
    """A question of VQAv2; its answers are in a file of their own."""

    unique = ("question_id",)
    question: Text
    question_id: Annotated[int, Field(description="a whole number")]


def answer_list_problem(content: object) -> str | None:
    """Say what is wrong with the list of candidate answers of VQA, or None."""
    if not isinstance(content, list):
        return "must be a list of answers"
    answers = [{"answer": answer} for answer in content]
    wrong = problems(check_records(answers, Answer, "the answers"))
    return f"must hold non-empty strings only:{listing(wrong)}" if wrong else None


def class_labels_problem(content: object) -> str | None:
    """Say what is wrong with VideoQA's mapping of answers to class indices, or None."""
    labels = content if isinstance(content, Mapping) else {}
    numbers = [n for n in labels.values() if isinstance(n, int) and not isinstance(n, bool)]
    if labels and all(map(is_text, labels)) and sorted(numbers) == list(range(len(labels))):
        return None
    return "must be a mapping of non-empty answers to the numbers from 0 on, each once"


def coco_problem(content: object, list_key: str) -> str | None:
    """Say what is wrong with a file in COCO's layout, or None."""
    if isinstance(content, Mapping) and isinstance(content.get(list_key), list):
        return None
    return f"must be in COCO's layout: a mapping with a list under '{list_key}'"


def combine(*parts: type[Record], **attributes) -> type[VisualRecord]:
    """A schema with the fields of all parts; pydantic puts those of the last base first."""
    name = "+".join(part.__name__ for part in parts)
    return type(parts[0])(name, parts[::-1], attributes)


LAYOUTS: dict[type, type[VisualRecord]] = {
    RetrievalDataset: combine(Image, Caption, ImageId),
    RetrievalEvalDataset: combine(Image, Captions),
    VideoRetrievalDataset: combine(Video, Caption),
    VideoRetrievalEvalDataset: combine(Video, Captions),
    CaptionDataset: combine(Image, Caption, ImageId),
    CaptionEvalDataset: combine(Image, References, ImageId),
    COCOCapEvalDataset: combine(Image, References),  # takes the id from the file's name
    NoCapsEvalDataset: combine(Image, References, ImgId),
    VideoCaptionDataset: combine(Video, Caption, ImageId),
    VideoCaptionEvalDataset: combine(Video, References, ImageId),
    VideoQADataset: combine(Video, NumberedQuestion),
    ImageQADataset: combine(Image, NumberedQuestion),
    COCOVQADataset: combine(Image, CocoQuestion),
    COCOVQAEvalDataset: combine(
        Image,
        CocoEvalQuestion,
        side_files=(
            ("answer list", answer_list_problem),
            ("question file", partial(coco_problem, list_key="questions")),
            ("annotation file in COCO's layout", partial(coco_problem, list_key="annotations")),
        ),
    ),
    VGVQADataset: combine(Image, Question),
}


def layout_of(dataset_cls: type) -> type[VisualRecord] | None:
    """The schema of a dataset class or of the nearest class that it derives from, if known."""
    return next((LAYOUTS[cls] for cls in dataset_cls.__mro__ if cls in LAYOUTS), None)
