"""Read the files of an index in worker processes: hash, cut, decode."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.common.signals import leave_to_main_process
from lavis_uniadapter.datasets.loading import POLL, from_workers
from lavis_uniadapter.datasets.reading import READ_ERRORS
from lavis_uniadapter.processors.decoding import decode_errors, open_video, read_frames
from lavis_uniadapter.processors.images import read_image
from lavis_uniadapter.search.segments import Segment, cut, is_video

# Segments of a long video that are decoded at a time, so that its length does not matter to memory.
_AT_ONCE = 8


@dataclass(frozen=True)
class Part:
    """Some segments of a file.

    Attributes:
        file: position of the file among those to read.
        first: number of the first of these segments in the file.
        segments: in order.
        clips: uint8 (segments, frames, image_size, image_size, 3); None without segments.
        hash: of the file's content, in its last part alone.
        problem: why the file cannot be read, in its last part.
    """

    file: int
    first: int = 0
    segments: Sequence[Segment] = ()
    clips: Tensor | None = None
    hash: str | None = None
    problem: str | None = None

    @property
    def is_last(self) -> bool:
        return self.hash is not None or self.problem is not None


def read_segments(
    path: str | os.PathLike, window: float, visual: VideoEval
) -> Iterator[tuple[list[Segment], Tensor]]:
    """Segments of an image or a video with their frames, a few at a time.

    Args:
        path: of the file.
        window: seconds of a segment.
        visual: size and number of frames.

    Yields:
        Segments, and uint8 RGB (segments, frames, image_size, image_size, 3).

    Raises:
        VideoDecodeError, ImageError: naming what is wrong with the file.
    """
    path, size = str(path), visual.image_size
    if not is_video(path):
        yield [Segment()], image_clip(read_image(path), size)
        return
    with decode_errors(path):
        reader = open_video(path, size)
        timestamps = reader.get_frame_timestamp(np.arange(len(reader)))
    segments = cut(timestamps, window, visual.n_frms)
    for start in range(0, len(segments), _AT_ONCE):
        some = segments[start : start + _AT_ONCE]
        with decode_errors(path):
            frames = read_frames(reader, [index for segment in some for index in segment.frames])
        yield some, frames.unflatten(0, (len(some), -1))


def read_segment(path: str | os.PathLike, segment: Segment, visual: VideoEval) -> Tensor:
    """The frames of one segment, uint8 RGB (1, frames, image_size, image_size, 3).

    Raises:
        VideoDecodeError, ImageError: naming what is wrong with the file.
    """
    path = str(path)
    if not segment.frames:
        return image_clip(read_image(path), visual.image_size)
    with decode_errors(path):
        return read_frames(open_video(path, visual.image_size), segment.frames)[None]


def image_clip(image, size: int) -> Tensor:
    """An image as a clip of one frame, uint8 (1, 1, size, size, 3); LAVIS's ``blip_image_eval``."""
    resized = image.resize((size, size), resample=3)  # bicubic
    return torch.from_numpy(np.array(resized))[None, None]


@dataclass(frozen=True)
class FileToRead:
    """A file, its position in the work, and the hash that is known of its content."""

    number: int
    path: Path
    known_hash: str | None = None


class MediaFiles(IterableDataset):
    """Reads files, each worker its share.

    Args:
        files: a file whose content has its known hash is not decoded.
        window, visual: see ``read_segments``.
        reading: (workers,) shared; the position in ``files`` of what each worker reads, or -1.
    """

    def __init__(
        self, files: Sequence[FileToRead], window: float, visual: VideoEval, reading: Tensor
    ):
        self._files, self._window, self._visual = files, window, visual
        self._reading = reading

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for position in range(first, len(self._files), step):
            self._reading[first] = position
            yield from self._read(self._files[position])
        self._reading[first] = -1

    def _read(self, file: FileToRead) -> Iterator[Part]:
        first = 0
        try:
            digest = hash_file(file.path)
            if digest != file.known_hash:
                for segments, clips in read_segments(file.path, self._window, self._visual):
                    yield Part(file.number, first, segments, clips)
                    first += len(segments)
            yield Part(file.number, first, hash=digest)
        except READ_ERRORS as error:
            yield Part(file.number, problem=getattr(error, "reason", "") or str(error))


def read_parts(
    files: Sequence[FileToRead], window: float, visual: VideoEval, workers: int, timeout: float
) -> Iterator[Part]:
    """Read files in worker processes; the parts of a file come in order.

    A file at which a worker dies, or hangs for ``timeout`` seconds, counts as unreadable. To find
    it, the files that were being read are read again, one at a time; a first part with ``first`` 0
    replaces what came before.
    """
    left = {file.number: file for file in files}
    while left:
        some = list(left.values())
        reading = torch.full((max(workers, 1),), -1).share_memory_()
        loader = DataLoader(
            MediaFiles(some, window, visual, reading),
            batch_size=None,
            num_workers=min(workers, len(some)),
            timeout=min(timeout, POLL) if workers else 0,
            worker_init_fn=_silence,
        )
        try:
            for part in from_workers(loader, timeout):
                yield part
                if part.is_last:
                    del left[part.file]
        except RuntimeError as error:
            being_read = (some[position] for position in reading.tolist() if position >= 0)
            suspects = [file for file in being_read if file.number in left]
            if not suspects:
                raise
            if len(some) == 1:
                hangs = "timed out" in str(error)
                what = f"it takes over {timeout:g} s to decode" if hangs else "its decoder crashes"
                yield Part(some[0].number, problem=what)
                return
            for file in suspects:
                yield from read_parts([file], window, visual, 1, timeout)
                del left[file.number]


def _silence(worker: int) -> None:
    leave_to_main_process(worker)
    # What decoders print would break the progress bar; what is wrong with a file is reported.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def hash_file(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
