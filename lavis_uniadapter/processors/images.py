"""Read a user's own images: upright, RGB, with 8 bits per channel.

LAVIS's benchmark data sets are read by LAVIS's own processors, without any of this.
"""

from __future__ import annotations

import os
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageOps

from lavis_uniadapter.processors.decoding import MAX_PIXELS, images_read_whole
from lavis_uniadapter.processors.media_files import IMAGE_FORMATS, file_problem, is_machine_fault

# Pillow's modes with more than 8 bits per channel, and the value of white.
_DEEP = {"I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I": 65535, "F": 1}


class ImageError(ValueError):
    """An image that cannot be read. The message says why."""


def read_image(
    source: str | os.PathLike | IO[bytes],
    max_pixels: int = MAX_PIXELS,
    formats: tuple[str, ...] | None = None,
) -> Image.Image:
    """Read an image, turned as its EXIF orientation says.

    Args:
        source: path or file.
        max_pixels: refuse an image with more.
        formats: Pillow's names of those to read; None: all.

    Raises:
        ImageError: for a file that is no whole image, too large, or has floating-point pixels
            outside [0, 1].
        PermissionError: the file may not be read.
    """
    if isinstance(source, (str, os.PathLike)):
        source = os.fspath(source)
        if problem := file_problem(source, IMAGE_FORMATS):
            raise ImageError(problem)
    try:
        with Image.open(source, formats=formats) as image, images_read_whole():
            if image.width * image.height > max_pixels:
                raise ImageError(f"it has {image.width} x {image.height} pixels, too many to read")
            upright = ImageOps.exif_transpose(image)
            return _with_8_bits(upright).convert("RGB")
    except Exception as error:  # each of Pillow's many decoders raises its own
        if isinstance(error, ImageError) or is_machine_fault(error):
            raise
        raise ImageError(f"it cannot be read as an image ({error})") from error


def ignored_by_lavis(path: str) -> str | None:
    """Say what of an image LAVIS's own data sets ignore, which `read_image` does not, or None."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        deep = image.mode in _DEEP
    ignored = ["is turned by its EXIF orientation"] * turned
    ignored += [f"has more than 8 bits per channel (mode {image.mode})"] * deep
    return f"it {' and '.join(ignored)}" if ignored else None


def _with_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit and floating-point grey to 8 bits; Pillow would cut them at 255."""
    if image.mode not in _DEEP:
        return image
    values = np.asarray(image)
    white = _DEEP[image.mode]
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise ImageError(f"its pixels (mode {image.mode}) are outside 0 to {white:g}")
    scaled = values.astype(np.float32)  # exact for 16 bits
    scaled *= 255 / white
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8))
