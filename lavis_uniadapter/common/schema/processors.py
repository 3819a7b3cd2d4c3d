"""Options of this package's processors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from lavis_uniadapter.common.schema.section import Positive, Section, Share, Size, option

Area = Annotated[float, Field(gt=0, le=1)]
Colour = Annotated[tuple[float, float, float], Field(strict=False)]
Deviation = Annotated[tuple[Positive, Positive, Positive], Field(strict=False)]


class VideoEval(Section):
    """``blip_video_eval``: the middle frame of each of ``n_frms`` equal segments."""

    name: Literal["blip_video_eval"] = option("blip_video_eval", "Name of the processor.")
    image_size: Size = option(224, "Height and width of the frames in pixels.")
    n_frms: Size = option(8, "Frames of a clip.")
    mean: Colour = option((0.48145466, 0.4578275, 0.40821073), "RGB mean on the scale [0, 1].")
    std: Deviation = option((0.26862954, 0.26130258, 0.27577711), "RGB deviation.")


class VideoTrain(VideoEval):
    """``blip_video_train``: a random frame of each segment; all are cropped and changed alike."""

    name: Literal["blip_video_train"] = option(  # type: ignore[assignment]
        "blip_video_train", "Name of the processor."
    )
    min_scale: Area = option(0.5, "Smallest area of the random crop, as a share of the frame's.")
    max_scale: Area = option(1.0, "Largest area of the crop.")
    flip_prob: Share = option(0.5, "Probability of a horizontal flip.")
    randaug_ops: Annotated[int, Field(ge=0, le=10)] = option(2, "Number of RandAugment operations.")
    randaug_magnitude: Annotated[float, Field(ge=0, le=10)] = option(5.0, "Their strength.")

    @model_validator(mode="after")
    def _check_scales(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} exceeds max_scale {self.max_scale}.")
        return self


PROCESSORS: dict[str, type[VideoEval]] = {
    "blip_video_train": VideoTrain,
    "blip_video_eval": VideoEval,
}
