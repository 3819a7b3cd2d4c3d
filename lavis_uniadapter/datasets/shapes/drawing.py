"""Draw stills and clips. Pictures are floats in 0..255 until they are rounded to bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from lavis_uniadapter.common.schema.shapes import Clips, Stills
from lavis_uniadapter.datasets.shapes.contents import POSITIONS, SHAPES, SIZES, Content, pick

RGB = {
    "red": (215, 30, 35),
    "green": (35, 165, 55),
    "blue": (35, 65, 220),
    "yellow": (245, 225, 35),
    "purple": (130, 35, 165),
    "orange": (245, 135, 15),
    "cyan": (35, 205, 220),
    "pink": (250, 130, 190),
}


def _regular_polygon(corners: int, radii: Sequence[float], first_angle: float) -> np.ndarray:
    """Corners at equal angles, their distances to the centre cycling through `radii`."""
    angles = first_angle + 2 * np.pi * np.arange(corners) / corners
    distances = np.resize(radii, corners)
    return np.stack([distances * np.cos(angles), distances * np.sin(angles)], axis=1)


_ARM = 0.34  # half the width of the cross's arms
_UP = -np.pi / 2

# Outlines in units of the object's radius, x to the right and y down. Several outlines of one
# shape are filled by the even-odd rule, which makes the hole of the ring.
OUTLINES = {
    "circle": [_regular_polygon(48, [1.0], 0.0)],
    "square": [_regular_polygon(4, [1.2], np.pi / 4)],
    "triangle": [_regular_polygon(3, [1.2], _UP)],
    "star": [_regular_polygon(10, [1.2, 0.5], _UP)],
    "cross": [
        np.array(
            [(-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)]
            + [(_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)]
        )
    ],
    "ring": [_regular_polygon(48, [1.05], 0.0), _regular_polygon(48, [0.6], 0.0)],
    "bar": [np.array([(-1.3, -0.4), (1.3, -0.4), (1.3, 0.4), (-1.3, 0.4)])],
    "diamond": [_regular_polygon(4, [1.35, 0.75], _UP)],
}

# Radii, centres and jitter are fractions of the image's side.
RADII = {"small": 0.1, "large": 0.19}
JITTER = 0.04


def draw_still(options: Stills, content: Content, rng: np.random.Generator) -> np.ndarray:
    """A coloured shape on a plain ground, uint8 (image_size, image_size, 3)."""
    side = options.image_size
    # dark to light
    tone = rng.uniform(40.0, 240.0) + rng.uniform(-8.0, 8.0, 3)
    ground = np.tile(tone, (side, side, 1))
    mask = _object_mask(rng, side, content.shape, content.position, content.size)
    picture = _paint(ground, mask, _jittered_colour(rng, content.colour))
    return _to_bytes(picture + rng.normal(0.0, options.noise, picture.shape))


def draw_clip(
    options: Clips, content: Content, visible: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """A coloured shape in the ``visible`` frames, grey ones in others.

    Returns:
        uint8 (num_frames, image_size, image_size, 3).
    """
    side = options.image_size
    tone = rng.uniform(40.0, 80.0) + rng.uniform(-8.0, 8.0, 3)
    blotches = cv2.resize(
        rng.normal(0.0, 22.0, (8, 8)), (side, side), interpolation=cv2.INTER_CUBIC
    )
    frames = np.repeat((tone + blotches[:, :, None])[None], options.num_frames, axis=0)
    for _ in range(options.distractors):
        shape, position, size = (pick(rng, tuple(kind)) for kind in (SHAPES, POSITIONS, SIZES))
        mask = _object_mask(rng, side, shape, position, size)
        grey = np.full(3, rng.uniform(140.0, 245.0))
        start = int(rng.integers(options.num_frames - options.visible_frames + 1))
        for frame in range(start, start + options.visible_frames):
            if frame not in visible:
                frames[frame] = _paint(frames[frame], mask, grey)
    mask = _object_mask(rng, side, content.shape, content.position, content.size)
    colour = _jittered_colour(rng, content.colour)
    for frame in visible:
        frames[frame] = _paint(frames[frame], mask, colour)
    # The same noise on all channels: the codec would smear noisy chroma into false colours.
    return _to_bytes(frames + rng.normal(0.0, options.noise, (*frames.shape[:3], 1)))


def _jittered_colour(rng: np.random.Generator, colour: str) -> np.ndarray:
    return np.array(RGB[colour]) + rng.uniform(-8.0, 8.0, 3)


def _object_mask(
    rng: np.random.Generator, side: int, shape: str, position: str, size: str
) -> np.ndarray:
    """How far an object, somewhere near its position, covers each pixel: 0..1, (side, side)."""
    x = 0.25 if "left" in position else 0.75 if "right" in position else 0.5
    y = 0.25 if "top" in position else 0.75 if "bottom" in position else 0.5
    centre = np.array([x, y]) + rng.uniform(-JITTER, JITTER, 2)
    scale = 4 * side  # drawn larger and averaged down for smooth edges
    outlines = [
        np.rint((centre + RADII[size] * outline) * scale).astype(np.int32)
        for outline in OUTLINES[shape]
    ]
    canvas = cv2.fillPoly(np.zeros((scale, scale), np.uint8), outlines, 255)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA) / 255.0


def _paint(picture: np.ndarray, mask: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return picture + mask[:, :, None] * (colour - picture)


def _to_bytes(picture: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray, fps: float) -> None:
    """Encode RGB frames, uint8 (frames, height, width, 3)."""
    height, width = frames.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (width, height))
    if not writer.isOpened():
        raise RuntimeError(f"OpenCV cannot write {path}: it needs FFmpeg's mpeg4 encoder.")
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
