"""What the stills and clips show, and the records that describe it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

SPLITS = ("train", "val", "test")

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "cyan", "pink")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring", "bar", "diamond")
SIZES = ("small", "large")
POSITIONS = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "centre": "in the centre",
    "top left": "at the top left",
    "top right": "at the top right",
    "bottom left": "at the bottom left",
    "bottom right": "at the bottom right",
}

# The first template of each list is the one of the evaluation splits.
STILL_TEMPLATES = (
    "{thing} {place}",
    "there is {thing} {place}",
    "{thing} can be seen {place}",
    "the picture shows {thing} {place}",
    "{place} there is {thing}",
)
CLIP_TEMPLATES = (
    "{thing} appears {place}",
    "for a moment {thing} comes up {place}",
    "{place} we watch {thing} come and go",
    "the clip briefly shows {thing} {place}",
    "someone holds up {thing} {place}",
)

# What is asked about each attribute of the coloured object; its value is the answer. No question
# names both colour and shape: training shows each such pair in some places only, which could be
# learnt instead of looking.
QUESTIONS = {
    "colour": "what colour is the {shape}?",
    "shape": "what {colour} shape can be seen?",
    "position": "where is the {colour} shape?",
    "size": "how big is the {colour} shape?",
}
ANSWERS = (*COLOURS, *SHAPES, *POSITIONS, *SIZES)

# Combinations of colour, shape and position (of 576) kept for evaluation, whatever the counts.
RESERVED_COMBINATIONS = {"val": 100, "test": 300}
# More items would give an evaluation split two with the same right answer.


class Kind(NamedTuple):
    """What stills and clips differ in.

    Attributes:
        visual_folder: subfolder of the files.
        visual_key: of the records, as LAVIS names it.
        suffix: of the files.
        templates: of captions.
        stream: keeps the random numbers apart.
    """

    visual_folder: str
    visual_key: str
    suffix: str
    templates: Sequence[str]
    stream: int

    def file_name(self, split: str, index: int) -> str:
        """Name of one item's file in the visual folder."""
        return f"{split}_{index:05d}{self.suffix}"

    def rng(self, seed: int, split: str, index: int, *use: int) -> np.random.Generator:
        """The random source of one use of one item; independent of all counts."""
        return np.random.default_rng([seed, self.stream, SPLITS.index(split), index, *use])


STILLS = Kind("images", "image", ".png", STILL_TEMPLATES, stream=0)
CLIPS = Kind("videos", "video", ".mp4", CLIP_TEMPLATES, stream=1)


class Content(NamedTuple):
    """What an item shows."""

    colour: str
    shape: str
    position: str
    size: str

    def caption(self, template: str) -> str:
        """A caption by one of the templates."""
        words = f"{self.size} {self.colour} {self.shape}"
        article = "an" if words[0] in "aeiou" else "a"
        return template.format(thing=f"{article} {words}", place=POSITIONS[self.position])


class Counts(Protocol):
    """The options that decide what is shown."""

    seed: int
    num_train: int
    num_val: int
    num_test: int
    questions_per_train_item: int


T = TypeVar("T")


def shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The items in random order."""
    return [items[i] for i in rng.permutation(len(items))]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options at random."""
    return options[rng.integers(len(options))]


def deal_contents(options: Counts) -> dict[str, list[Content]]:
    """What every still or clip shows, by split.

    No (colour, shape, position) is in two splits, not even in one of the stills and another of
    the clips of the same seed; the evaluation splits repeat nothing.
    """
    # The same for stills and clips: no training still shows what clips are tested on.
    rng = np.random.default_rng([options.seed, len(SPLITS)])
    # in the order of Content's fields
    rest = iter(shuffled(list(itertools.product(COLOURS, SHAPES, POSITIONS)), rng))
    reserved = {
        split: list(itertools.islice(rest, size)) for split, size in RESERVED_COMBINATIONS.items()
    }
    contents = {}
    for split, pool in {"train": list(rest), **reserved}.items():
        # Shuffled after the product, so that the first items differ in every attribute.
        sized = shuffled([Content(*kind, size) for kind in pool for size in SIZES], rng)
        count = getattr(options, f"num_{split}")
        contents[split] = list(itertools.islice(itertools.cycle(sized), count))
    return contents


def caption_records(
    kind: Kind, split: str, index: int, content: Content, retrieval: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """One item's records in the layout of LAVIS's `CaptionDataset` and `VideoCaptionDataset`.

    In training the captions of its `retrieval` records, one each; in evaluation one record with
    every wording, as a generated caption may use any.
    """
    if split == "train":
        captions = [record["caption"] for record in retrieval]
    else:
        captions = [[content.caption(template) for template in kind.templates]]
    name = kind.file_name(split, index)
    return [{kind.visual_key: name, "caption": caption, "image_id": index} for caption in captions]


def question_records(
    kind: Kind, split: str, index: int, content: Content, options: Counts
) -> list[dict[str, Any]]:
    """One item's records in the layout of LAVIS's `VideoQADataset`."""
    asked = list(QUESTIONS)
    if split == "train":
        # With numbers of their own: what is asked changes no picture.
        asked = shuffled(asked, kind.rng(options.seed, split, index, 1))
        asked = asked[: options.questions_per_train_item]
    attributes = content._asdict()
    return [
        {
            kind.visual_key: kind.file_name(split, index),
            "question": QUESTIONS[attribute].format(**attributes),
            "answer": attributes[attribute],
            "question_id": index * len(QUESTIONS) + list(QUESTIONS).index(attribute),
        }
        for attribute in asked
    ]
