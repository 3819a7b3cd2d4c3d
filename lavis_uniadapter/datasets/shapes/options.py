"""Options of the generated data, the ``generate`` block of a dataset's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from lavis_uniadapter.common.errors import ConfigError, reject_unknown_keys
from lavis_uniadapter.datasets.shapes.contents import (
    CLIP_TEMPLATES,
    MAX_EVALUATION,
    QUESTIONS,
)


@dataclass(frozen=True)
class ShapesConfig:
    """What the stills and the clips have in common.

    Attributes:
        seed: every item is drawn from (seed, split, index), so that changing a count keeps the
            other items as they were.
        image_size: side of the square pictures in pixels; a multiple of 32, as decord 0.6 fails
            to decode some other small sizes, such as 48 and 72.
        num_train, num_val, num_test: stills or clips of each split.
        noise: standard deviation of the pixel noise, in grey levels of 0..255.
        questions_per_train_item: how many of the QUESTIONS a training still or clip gets; those of
            evaluation get all.

    Raises:
        ConfigError: a value has the wrong type or lies out of range.
    """

    seed: int = 0
    image_size: int = 64
    num_train: int = 1
    num_val: int = 1
    num_test: int = 1
    noise: float = 0.0
    questions_per_train_item: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            wanted = (int, float) if field.type == "float" else (int,)
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise ConfigError(
                    f"generate.{field.name} must be of type {field.type}, but is {value!r}."
                )
        self._require(self.seed >= 0, "seed", "at least 0")
        self._require(self.noise >= 0, "noise", "at least 0")
        self._require(
            self.image_size >= 32 and self.image_size % 32 == 0, "image_size", "a multiple of 32"
        )
        self._require(
            1 <= self.questions_per_train_item <= len(QUESTIONS),
            "questions_per_train_item",
            f"from 1 to {len(QUESTIONS)}",
        )
        self._require(self.num_train >= 1, "num_train", "at least 1")
        for split, most in MAX_EVALUATION.items():
            # More would put two items with the same right answer into one evaluation split.
            self._require(
                1 <= self.count(split) <= most, f"num_{split}", f"from 1 to {most}, all distinct"
            )

    def _require(self, holds: bool, name: str, demand: str) -> None:
        if not holds:
            raise ConfigError(f"generate.{name} must be {demand}, but is {getattr(self, name)}.")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> ShapesConfig:
        """The configuration with `options` in place of the defaults.

        Raises:
            ConfigError: an option is unknown, or its value is not allowed.
        """
        reject_unknown_keys(options, [field.name for field in fields(cls)], "generate")
        return cls(**options)

    def count(self, split: str) -> int:
        """Number of stills or clips in `split`."""
        return getattr(self, f"num_{split}")


@dataclass(frozen=True)
class StillsConfig(ShapesConfig):
    """Configuration of the stills; see ShapesConfig."""

    num_train: int = 3000
    num_val: int = 100
    num_test: int = 100
    noise: float = 4.0
    questions_per_train_item: int = 2


@dataclass(frozen=True)
class ClipsConfig(ShapesConfig):
    """Configuration of the clips; see ShapesConfig for the common part.

    Attributes:
        num_frames: frames of a clip.
        fps: frames per second.
        visible_frames: length in frames of the run in which the described object is visible.
        distractors: grey shapes of a clip, each shown for as many frames; none beside an object.
        captions_per_train_clip: training records of a clip, each with another wording.
    """

    num_train: int = 800
    num_val: int = 200
    num_test: int = 600
    noise: float = 8.0
    questions_per_train_item: int = 4
    num_frames: int = 16
    fps: int = 8
    visible_frames: int = 4
    distractors: int = 3
    captions_per_train_clip: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.fps >= 1, "fps", "at least 1")
        self._require(self.distractors >= 0, "distractors", "at least 0")
        self._require(
            1 <= self.visible_frames <= self.num_frames,
            "visible_frames",
            f"from 1 to num_frames = {self.num_frames}",
        )
        self._require(
            1 <= self.captions_per_train_clip <= len(CLIP_TEMPLATES),
            "captions_per_train_clip",
            f"from 1 to {len(CLIP_TEMPLATES)}",
        )
