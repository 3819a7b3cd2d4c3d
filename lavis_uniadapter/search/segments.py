"""Find images and videos, and cut videos into segments, the units of an index."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lavis_uniadapter.processors.decoding import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS
from lavis_uniadapter.processors.media_files import link_problem
from lavis_uniadapter.processors.sampling import sample_frame_indices

MEDIA_EXTENSIONS = IMAGE_EXTENSIONS | VIDEO_EXTENSIONS
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """An image, or a stretch of a video.

    Attributes:
        start, end: seconds; both 0 for an image.
        frames: indices of the frames that are encoded; none for an image.
        times: seconds at which these frames are shown.
    """

    start: float = 0.0
    end: float = 0.0
    frames: tuple[int, ...] = ()
    times: tuple[float, ...] = (0.0,)


def is_video(path: str | os.PathLike) -> bool:
    """Whether a file is taken for a video, by its extension."""
    return Path(path).suffix.lower() in VIDEO_EXTENSIONS


def find_media(root: Path, scope: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Images and videos below a folder: path relative to the root (with ``/``), and file status.

    Hidden files and folders are skipped, and links to files outside of the root (`link_problem`),
    with a warning of how many. Links to folders are not followed.
    """
    skipped: list[str] = []
    for folder, subfolders, names in os.walk(scope):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(names):
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in MEDIA_EXTENSIONS:
                continue
            if path.is_symlink() and (problem := link_problem(path, root)):
                skipped.append(f"'{path}': {problem}")
            elif path.is_file():
                yield path.relative_to(root).as_posix(), path.stat()
    if skipped:
        logger.warning("%d links are skipped, such as %s.", len(skipped), skipped[0])


def take_unusable(found: dict[str, os.stat_result]) -> dict[str, str]:
    """Remove files whose names are not UTF-8; returns what is wrong, by escaped path."""
    odd = [path for path in found if path.encode("utf-8", "replace") != os.fsencode(path)]
    for path in odd:
        del found[path]
    escaped = (os.fsencode(path).decode("utf-8", "backslashreplace") for path in odd)
    return dict.fromkeys(escaped, "its name is not UTF-8; rename the file")


def cut(timestamps: np.ndarray, window: float, n_frms: int) -> list[Segment]:
    """Cut a video into windows of equal length, the last up to half a window longer or shorter.

    Args:
        timestamps: (frames, 2) seconds at which each frame begins and ends.
        window: length in seconds; ``math.inf``: the video is one segment.
        n_frms: frames that represent a segment, spread over it as ``sample_frame_indices`` does.

    Returns:
        Segments in order; none for a stretch in which no frame begins.
    """
    begins = np.maximum.accumulate(timestamps[:, 0] - timestamps[0, 0])
    duration = float(max(begins[-1], timestamps[-1, 1] - timestamps[0, 0]))
    window = min(window, max(duration, 1.0))
    number = max(1, round(duration / window))
    # the window in which each frame begins; a division alone may be off by rounding
    which = np.floor(begins / window)
    which += begins >= (which + 1) * window
    which -= begins < which * window
    which = np.minimum(which, number - 1).astype(np.int64)
    segments = []
    for i, first, count in zip(
        *(each.tolist() for each in np.unique(which, return_index=True, return_counts=True)),
        strict=True,
    ):
        end = duration if i == number - 1 else (i + 1) * window
        frames = tuple(first + j for j in sample_frame_indices(count, n_frms))
        times = tuple(round(float(begins[j]), 3) for j in frames)
        segments.append(Segment(round(i * window, 3), round(end, 3), frames, times))
    return segments
