"""Read a user's own images: upright, RGB, with 8 bits per channel; find those that cannot be read.

LAVIS's benchmark data sets are read by LAVIS's own code, without any of this.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import IO

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps

from lavis_uniadapter.processors.media_files import IMAGE_FORMATS, file_problem, is_machine_fault

MAX_PIXELS = 100_000_000  # of an image; a small file may hold any number
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
    with opened_image(source, max_pixels, formats) as image:
        return _upright_rgb(image)


def image_problem(path: str, whole: bool, own: bool = False) -> str | None:
    """Say why an image cannot be read, or None.

    Args:
        whole: read its pixels too, which takes a hundred times as long as its header.
        own: as `read_image` does, not as LAVIS does.
    """
    try:
        with opened_image(path, MAX_PIXELS) as image:
            if whole:
                _upright_rgb(image) if own else image.convert("RGB")
    except (ImageError, PermissionError) as error:
        return str(error)
    return None


@contextlib.contextmanager
def opened_image(
    source: str | os.PathLike | IO[bytes],
    max_pixels: int,
    formats: tuple[str, ...] | None = None,
) -> Iterator[Image.Image]:
    """Open an image; ImageError for whatever is wrong with it, in the block too."""
    if isinstance(source, (str, os.PathLike)):
        source = os.fspath(source)
        if problem := file_problem(source, IMAGE_FORMATS):
            raise ImageError(problem)
    try:
        with images_read_whole(), Image.open(source, formats=formats) as image:
            if image.width * image.height > max_pixels:
                raise ImageError(f"it has {image.width} x {image.height} pixels, too many to read")
            yield image
    except Exception as error:  # each of Pillow's many decoders raises its own
        if isinstance(error, ImageError) or is_machine_fault(error):
            raise
        raise ImageError(f"it cannot be read as an image ({error})") from error


@contextlib.contextmanager
def images_read_whole() -> Iterator[None]:
    """Make truncated images an error; LAVIS lets Pillow fill them with grey."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def ignored_by_lavis(path: str) -> str | None:
    """Say what of an image LAVIS's own data sets ignore, which `read_image` does not, or None."""
    with Image.open(path) as image:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        deep = image.mode in _DEEP
    ignored = ["is turned by its EXIF orientation"] * turned
    ignored += [f"has more than 8 bits per channel (mode {image.mode})"] * deep
    return f"it {' and '.join(ignored)}" if ignored else None


def _upright_rgb(image: Image.Image) -> Image.Image:
    """16-bit and floating-point grey is scaled to 8 bits; Pillow would cut it at 255."""
    image = ImageOps.exif_transpose(image)
    if image.mode not in _DEEP:
        return image.convert("RGB")
    values = np.asarray(image)
    white = _DEEP[image.mode]
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= white):
        raise ImageError(f"its pixels (mode {image.mode}) are outside 0 to {white:g}")
    scaled = values.astype(np.float32)  # exact for 16 bits
    scaled *= 255 / white
    return Image.fromarray(np.rint(scaled, out=scaled).astype(np.uint8)).convert("RGB")
