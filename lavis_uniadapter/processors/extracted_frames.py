"""Frames of a video that were extracted once, in a form that is read faster than the video.

An uncompressed zip archive of JPEG pictures, called like the video plus ``.frames.zip``. It lies
beside the video or replaces it in a folder of its own: everything that reads a video reads it.
``uniadapter prepare frames`` writes them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import reprlib
import zipfile
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from torch import Tensor

from lavis_uniadapter.common.atomic import atomic
from lavis_uniadapter.processors.media_files import is_machine_fault

EXTRACTED_SUFFIX = ".frames.zip"
ABOUT = "about.json"
JPEG_QUALITY = 95
MAX_PIXELS = 20_000_000  # of a picture; a small file may hold any number
_END = 1 << 16  # bytes


def clip_file(path: str | os.PathLike) -> str:
    """The file that holds a clip: its extracted frames if there are any, or the video."""
    path = os.fspath(path)
    extracted = path + EXTRACTED_SUFFIX
    return extracted if os.path.isfile(extracted) else path


class About(BaseModel):
    """The metadata of an archive.

    Attributes:
        num_frames: in the archive.
        image_size: their height and width, in pixels.
        source_frames: frames of the video.
        video: `video_state` of the video before it was decoded.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    num_frames: PositiveInt
    image_size: PositiveInt
    source_frames: PositiveInt
    video: tuple[int, int, str]

    def is_of(self, path: str | os.PathLike) -> bool:
        """Whether a video is the one that the frames were extracted from, or a copy of it."""
        status = os.stat(path)
        unchanged = (status.st_size, status.st_mtime_ns) == self.video[:2]
        return unchanged or video_state(path)[::2] == self.video[::2]


def video_state(path: str | os.PathLike) -> tuple[int, int, str]:
    """Size of a video (bytes), time of its last change (ns), and a hash of its ends (64 kB)."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        ends = file.read(_END)
        file.seek(max(status.st_size - _END, 0))
        digest = hashlib.blake2b(ends + file.read(_END), digest_size=16)
    return status.st_size, status.st_mtime_ns, digest.hexdigest()


def read_extracted_frames(
    path: str, choose_indices: Callable[[int], Sequence[int]], image_size: int
) -> Tensor:
    """Read chosen frames, like `decoding.decode_frames`.

    Raises:
        ValueError: the file is no such archive or is damaged, the video beside it is another one,
            or its frames are smaller or fewer than those asked for.
    """
    with _opened(path) as archive:
        about = _about(archive)
        indices = choose_indices(about.num_frames)
        problem = _misfit(path, about, indices, image_size)
        names = [] if problem else map(_name, indices)
        pictures = [_read_picture(_content(archive, name), image_size) for name in names]
    if problem:
        raise ValueError(f"{problem}; extract its frames again, or delete the archive")
    return torch.from_numpy(np.stack(pictures))


def _misfit(path: str, about: About, indices: Sequence[int], image_size: int) -> str | None:
    video = path.removesuffix(EXTRACTED_SUFFIX)
    if os.path.isfile(video) and not about.is_of(video):
        return f"'{os.path.basename(video)}' has changed since its frames were extracted"
    if image_size > about.image_size:
        return f"its frames have {about.image_size} px, and {image_size} px are needed"
    # a sample repeats frames only if it needs more than there are
    if len(set(indices)) < len(indices) and about.num_frames < about.source_frames:
        return (
            f"it holds {about.num_frames} of {about.source_frames} frames, and {len(indices)} are "
            "needed"
        )
    return None


def read_about(path: str) -> About:
    """What `write_extracted_frames` recorded.

    Raises:
        ValueError: the file is no such archive or is damaged.
    """
    with _opened(path) as archive:
        return _about(archive)


def write_extracted_frames(
    path: str, frames: Tensor, source_frames: int, video: tuple[int, int, str]
) -> None:
    """Write frames, uint8 RGB (number, height, width, 3), as an archive, whole or not at all.

    Args:
        source_frames: how many frames the video has.
        video: `video_state` of it before it was decoded.
    """
    about = About(
        num_frames=len(frames),
        image_size=frames.shape[1],
        source_frames=source_frames,
        video=video,
    )
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for index, frame in enumerate(frames.numpy()):
            with archive.open(_name(index), "w") as member:
                Image.fromarray(frame).save(member, "JPEG", quality=JPEG_QUALITY)
        archive.writestr(ABOUT, about.model_dump_json())


@contextlib.contextmanager
def _opened(path: str) -> Iterator[zipfile.ZipFile]:
    """The archive; ValueError for the dozen kinds of errors that damaged ones raise."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except Exception as error:
        if is_machine_fault(error):
            raise
        said = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"it is not an archive of frames ({said})") from error


def _about(archive: zipfile.ZipFile) -> About:
    content = _content(archive, ABOUT)
    try:
        about = About.model_validate_json(content)
    except ValidationError as error:
        raise ValueError(f"{ABOUT} says {reprlib.repr(content.decode())}") from error
    archive.getinfo(_name(about.num_frames - 1))  # a KeyError if it has fewer
    return about


def _name(index: int) -> str:
    return f"{index:05d}.jpg"


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    # a small compressed member may unpack to any size, and a damaged one claim any
    member = archive.getinfo(name)
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, which frames are not")
    if member.compress_size > archive.start_dir:
        raise ValueError(f"{name} is larger than the archive")
    return archive.read(member)


def _read_picture(content: bytes, image_size: int) -> np.ndarray:
    with Image.open(io.BytesIO(content)) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"a picture has {file.width} x {file.height} pixels")
        picture = file.convert("RGB")
    if picture.size != (image_size, image_size):
        picture = picture.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(picture)
