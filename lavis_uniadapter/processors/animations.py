"""Read animated GIF and WebP images as videos. decord cannot."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_uniadapter.processors.images import MAX_PIXELS, opened_image
from lavis_uniadapter.processors.media_files import file_problem

ANIMATION_FORMATS = re.compile(rb"GIF8[79]a|RIFF.{4}WEBP", re.DOTALL)


def is_animation(path: str) -> bool:
    """Whether a file is a GIF or WebP image, by its content; one picture is a short animation."""
    return file_problem(path, ANIMATION_FORMATS) is None


def read_animation(path: str, choose: Callable[[int], Sequence[int]], image_size: int) -> Tensor:
    """Read chosen frames on white, like `decoding.decode_frames`. Their durations are ignored.

    Raises:
        ImageError: the file is damaged or too large.
    """
    with opened_image(path, MAX_PIXELS) as image:
        count = getattr(image, "n_frames", 1)  # not an attribute of Pillow's base class
        indices = choose(count)
        frames = {}
        # Up to the last frame, which is damaged if a GIF was cut. A step back would begin again.
        for index in sorted({*indices, count - 1}):
            image.seek(index)
            frames[index] = np.array(on_white(image, image_size))
    return torch.from_numpy(np.stack([frames[index] for index in indices]))


def on_white(image: Image.Image, size: int) -> Image.Image:
    """An RGB picture of ``size`` × ``size`` pixels, on white where it is transparent."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    picture = Image.alpha_composite(white, image).convert("RGB")
    if picture.size == (size, size):
        return picture
    return picture.resize((size, size), Image.Resampling.BICUBIC)
