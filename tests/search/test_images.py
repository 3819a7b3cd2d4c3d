"""Images with deep pixels, and formats that are refused."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from lavis_uniadapter.processors.images import ImageError, read_image


def reread(image: Image.Image, kind: str, **arguments) -> np.ndarray:
    content = io.BytesIO()
    image.save(content, kind)
    content.seek(0)
    return np.asarray(read_image(content, **arguments))[..., 0]


def test_all_values_of_16_bits_are_scaled():
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(values.astype(np.float64) / 257)
    assert (reread(Image.fromarray(values), "PNG") == expected).all()


def test_floating_point_grey_is_scaled_and_checked():
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    assert (reread(Image.fromarray(values), "TIFF") == np.rint(values * 255)).all()
    with pytest.raises(ImageError, match="outside 0 to 1"):
        reread(Image.fromarray(values + 1), "TIFF")


def test_another_format_than_those_asked_for_is_refused():
    image = Image.new("RGB", (4, 4))
    assert reread(image, "PNG", formats=["PNG"]).shape == (4, 4)
    with pytest.raises(ImageError, match="cannot be read as an image"):
        reread(image, "BMP", formats=["PNG"])
