"""What the stills and clips show, and the captions and questions about it."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from lavis_uniadapter.common.schema.shapes import Stills
from lavis_uniadapter.datasets.records import SPLITS

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

# About each attribute of the coloured object; its value is the answer. No question names both
# colour and shape: training shows each such pair in some places only, which could be learnt instead
# of looking.
QUESTIONS = {
    "colour": "what colour is the {shape}?",
    "shape": "what {colour} shape can be seen?",
    "position": "where is the {colour} shape?",
    "size": "how big is the {colour} shape?",
}
ANSWERS = (*COLOURS, *SHAPES, *POSITIONS, *SIZES)

# Combinations of colour, shape and position (of 576) kept for evaluation, whatever the counts.
RESERVED_COMBINATIONS = {"val": 100, "test": 300}

T = TypeVar("T")


class Content(NamedTuple):
    """What an item shows."""

    colour: str
    shape: str
    position: str
    size: str

    def caption(self, template: str) -> str:
        """A caption by one of the templates."""
        thing = f"a {self.size} {self.colour} {self.shape}"
        return template.format(thing=thing, place=POSITIONS[self.position])


def shuffled(items: Sequence[T], rng: np.random.Generator) -> list[T]:
    """The items in random order."""
    return [items[i] for i in rng.permutation(len(items))]


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """One of the options at random."""
    return options[rng.integers(len(options))]


def deal_contents(options: Stills) -> dict[str, list[Content]]:
    """What every still or clip shows, by split.

    No (colour, shape, position) is in two splits, not even in one of the stills and another of
    the clips of the same seed; the evaluation splits repeat nothing.
    """
    rng = np.random.default_rng([options.seed, len(SPLITS)])  # the same for stills and clips
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
