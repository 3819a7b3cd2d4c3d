"""Frames of a video that were extracted once, in a form that is read faster than the video.

An uncompressed zip archive of JPEG pictures, called like the video plus ``.frames.zip``. It lies
beside the video or replaces it in a folder of its own: everything that reads a video reads it.
``uniadapter prepare frames`` writes them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import reprlib
import zipfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lavis_uniadapter.common.atomic import atomic

EXTRACTED_SUFFIX = ".frames.zip"
ABOUT = "about.json"
JPEG_QUALITY = 95
MAX_PIXELS = 20_000_000  # of a picture; a small file may hold any number


def clip_file(path: str | os.PathLike) -> str:
    """The file that holds a clip: its extracted frames if there are any, or the video."""
    path = os.fspath(path)
    extracted = path + EXTRACTED_SUFFIX
    return extracted if os.path.isfile(extracted) else path


def read_extracted_frames(
    path: str, choose_indices: Callable[[int], Sequence[int]], image_size: int
) -> Tensor:
    """Read chosen frames, like `decoding.decode_frames`.

    Raises:
        ValueError: the file is no such archive or is damaged.
    """
    with _opened(path) as archive:
        indices = choose_indices(_about(archive)["num_frames"])
        pictures = [_read_picture(_content(archive, _name(i)), image_size) for i in indices]
    return torch.from_numpy(np.stack(pictures))


def read_about(path: str) -> dict[str, int]:
    """What `write_extracted_frames` recorded: num_frames, image_size, source_frames, quality.

    Raises:
        ValueError: the file is no such archive or is damaged.
    """
    with _opened(path) as archive:
        return _about(archive)


def write_extracted_frames(path: str, frames: Tensor, source_frames: int) -> None:
    """Write frames, uint8 RGB (number, height, width, 3), as an archive, whole or not at all.

    ``source_frames`` is how many frames the video has.
    """
    about = {
        "num_frames": len(frames),
        "image_size": frames.shape[1],
        "source_frames": source_frames,
        "quality": JPEG_QUALITY,
    }
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for index, frame in enumerate(frames.numpy()):
            with archive.open(_name(index), "w") as member:
                Image.fromarray(frame).save(member, "JPEG", quality=JPEG_QUALITY)
        archive.writestr(ABOUT, json.dumps(about))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """The archive; ValueError for the dozen kinds of errors that damaged ones raise."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"it is no archive of frames ({said})") from error


def _about(archive: zipfile.ZipFile) -> dict[str, int]:
    about = json.loads(_content(archive, ABOUT))
    numbers = [about[key] for key in ("num_frames", "image_size", "source_frames")]
    if not all(type(number) is int and number > 0 for number in numbers):
        raise ValueError(f"{ABOUT} says {reprlib.repr(about)}")
    archive.getinfo(_name(numbers[0] - 1))  # a KeyError if it has fewer
    return about


def _name(index: int) -> str:
    return f"{index:05d}.jpg"


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    # a small compressed member may unpack to any size
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which frames are not")
    return archive.read(name)


def _read_picture(content: bytes, image_size: int) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"a picture has {file.width} x {file.height} pixels")
        picture = file.convert("RGB")
    if picture.size != (image_size, image_size):
        picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(picture)
