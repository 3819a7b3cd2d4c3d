"""Read the files of an index in worker processes: hash, cut, decode."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lavis_uniadapter.common.schema.processors import VideoEval
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
    """A file, and the hash of what is known of it already."""

    path: Path
    known_hash: str | None = None


class MediaFiles(IterableDataset):
    """Reads files, each worker its share.

    Args:
        files: a file whose content has its known hash is not decoded.
        window, visual: see ``read_segments``.
        reading: (workers,) shared; the number of the file that each worker reads, or -1.
    """

    def __init__(
        self,
        files: Sequence[FileToRead],
        window: float,
        visual: VideoEval,
        reading: Tensor,
    ):
        self._files, self._window, self._visual = files, window, visual
        self._reading = reading

    def __iter__(self) -> Iterator[Part]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, len(self._files), step):
            self._reading[first] = number
            yield from self._read(number)
        self._reading[first] = -1

    def _read(self, number: int) -> Iterator[Part]:
        file, first = self._files[number], 0
        try:
            digest = hash_file(file.path)
            if digest != file.known_hash:
                for segments, clips in read_segments(file.path, self._window, self._visual):
                    yield Part(number, first, segments, clips)
                    first += len(segments)
            yield Part(number, first, hash=digest)
        except READ_ERRORS as error:
            yield Part(number, problem=getattr(error, "reason", "") or str(error))


def read_parts(
    files: Sequence[FileToRead], window: float, visual: VideoEval, workers: int, timeout: float
) -> Iterator[Part]:
    """Read files in worker processes; the parts of a file come in order.

    A file at which a worker dies, or hangs for ``timeout`` seconds, counts as unreadable. To find
    it, the files that were being read are read again, one at a time; a first part with ``first`` 0
    replaces what came before.
    """
    left = list(range(len(files)))
    while left:
        numbers = list(left)
        reading = torch.full((max(workers, 1),), -1).share_memory_()
        dataset = MediaFiles([files[n] for n in numbers], window, visual, reading)
        try:
            for part in _load(dataset, min(workers, len(numbers)), timeout):
                number = numbers[part.file]
                yield replace(part, file=number)
                if part.is_last:
                    left.remove(number)
            return
        except RuntimeError as error:
            suspects = [numbers[index] for index in reading.tolist() if index >= 0]
            if not suspects:
                raise
            if len(numbers) == 1:
                hangs = "timed out" in str(error)
                what = f"it takes over {timeout:g} s to decode" if hangs else "its decoder crashes"
                yield Part(suspects[0], problem=what)
                return
            left = [number for number in left if number not in suspects]
            for number in suspects:
                for part in read_parts([files[number]], window, visual, 1, timeout):
                    yield replace(part, file=number)


def _load(dataset: MediaFiles, workers: int, timeout: float) -> Iterator[Part]:
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        timeout=min(timeout, 1.0) if workers else 0,
        worker_init_fn=_silence,
    )
    handler = signal.getsignal(signal.SIGCHLD)
    parts = iter(loader)
    # PyTorch's handler would raise a worker's death wherever this process happens to be
    signal.signal(signal.SIGCHLD, handler)
    waiting_since = time.monotonic()
    while True:
        try:
            part = next(parts)
        except StopIteration:
            return
        except RuntimeError as error:
            timed_out = str(error).startswith("DataLoader timed out")
            if timed_out and time.monotonic() - waiting_since < timeout:
                continue
            raise
        yield part
        waiting_since = time.monotonic()


def _silence(_: int) -> None:
    # What decoders print would break the progress bar; what is wrong with a file is reported.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def hash_file(path: Path) -> str:
    """Hash of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
