"""``generate:`` of the embedded example: what its stills and clips are drawn from."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator
from typing_extensions import Self

from lavis_uniadapter.common.schema.section import Amount, Count, Section, Size, option

# Two more items would have the same right answer in one evaluation split.
ValCount = Annotated[int, Field(ge=1, le=200)]
TestCount = Annotated[int, Field(ge=1, le=600)]
Questions = Annotated[int, Field(ge=1, le=4)]


class Stills(Section):
    """Stills."""

    seed: Count = option(0, "Of all items; a changed count leaves other items as they were.")
    image_size: Annotated[int, Field(ge=32, multiple_of=32)] = option(64, "Side in pixels.")
    num_train: Size = option(3000, "Training items.")
    num_val: ValCount = option(100, "Validation items.")
    num_test: TestCount = option(100, "Test items.")
    noise: Amount = option(4.0, "Standard deviation of the pixel noise, in grey levels of 0..255.")
    questions_per_train_item: Questions = option(2, "Evaluation asks all four.")


class Clips(Stills):
    """Clips."""

    num_train: Size = option(800, "Training items.")
    num_val: ValCount = option(200, "Validation items.")
    num_test: TestCount = option(600, "Test items.")
    noise: Amount = option(8.0, "Standard deviation of the pixel noise, in grey levels of 0..255.")
    questions_per_train_item: Questions = option(4, "Evaluation asks all four.")
    num_frames: Size = option(16, "Frames of a clip.")
    fps: Size = option(8, "Frames per second.")
    visible_frames: Size = option(4, "Frames in which the described object is visible.")
    distractors: Count = option(3, "Grey shapes, shown as long, none beside the object.")
    captions_per_train_clip: Annotated[int, Field(ge=1, le=5)] = option(2, "In different words.")

    @model_validator(mode="after")
    def _check_frames(self) -> Self:
        if self.visible_frames > self.num_frames:
            raise ValueError(
                f"visible_frames {self.visible_frames} exceeds num_frames {self.num_frames}."
            )
        return self


TASKS = ("retrieval", "qa", "caption")
GENERATED: dict[str, type[Stills]] = {
    **{f"shapes_image_{task}": Stills for task in TASKS},
    **{f"shapes_{task}": Clips for task in TASKS},
}
