"""Decode frames of a video or of an archive of extracted frames; find files that cannot be read."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO

import decord.logging
import torch
from decord import DECORDError, VideoReader
from torch import Tensor

from lavis_uniadapter.processors.animations import is_animation, read_animation
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    clip_file,
    read_extracted_frames,
)
from lavis_uniadapter.processors.media_files import (
    IMAGE_FORMATS,
    VIDEO_FORMATS,
    file_problem,
    is_machine_fault,
)

VIDEO_EXTENSIONS = frozenset(
    ".3g2 .3gp .asf .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split()
)
IMAGE_EXTENSIONS = frozenset(
    ".bmp .gif .jfif .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tif .tiff .webp".split()
)

# Frames of a check are discarded, so small ones will do; decord fails at some sizes below 30.
_PROBE_SIZE = 32
# How many of them are in memory at a time: 31 MB.
_PROBED_AT_ONCE = 10_000

# The FFmpeg inside decord builds a codec's tables when it is first opened, and ends the process if
# two threads do so at once.
_OPENING = threading.Lock()

# Given the number of frames in a clip, the indices to decode.
ChooseFrames = Callable[[int], Sequence[int]]


class VideoDecodeError(RuntimeError):
    """A video that yields no frames, and why. The message names the file and the fix too."""

    # One argument will do, as PyTorch raises a data worker's errors anew from their message.
    def __init__(self, message: str, reason: str = ""):
        super().__init__(message)
        self.reason = reason


def decode_frames(path: str | os.PathLike, choose: ChooseFrames, image_size: int) -> Tensor:
    """Decode chosen frames of a video, scaled while decoding (decord's bicubic).

    If frames were extracted from the video, they are read instead (`clip_file`). decord fills in a
    frame without output, if it is not damaged, from a neighbour. That stays enabled (`fault_tol`):
    a clip cut without re-encoding begins with such hidden frames.

    Args:
        choose: given the number of frames in the clip, returns the indices to decode.
        image_size: height and width of the decoded frames, in pixels.

    Returns:
        uint8 RGB tensor (number of indices, image_size, image_size, 3).

    Raises:
        VideoDecodeError: a frame cannot be decoded.
        PermissionError, MemoryError: the machine is at fault, not the file.
    """
    return decode_file(clip_file(path), choose, image_size)


def decode_file(path: str, choose: ChooseFrames, image_size: int) -> Tensor:
    """Like `decode_frames`, from exactly this file: video, animation or extracted frames."""
    with decode_errors(path):
        if path.endswith(EXTRACTED_SUFFIX) and not file_problem(path):
            return read_extracted_frames(path, choose, image_size)
        if is_animation(path):
            return read_animation(path, choose, image_size)
        reader = open_video(path, image_size)
        return read_frames(reader, choose(len(reader)))


def open_video(path: str, image_size: int) -> VideoReader:
    """Open a video whose frames are scaled to a square while they are decoded; -1: not scaled."""
    if reason := file_problem(path, VIDEO_FORMATS):
        raise ValueError(reason)
    if "%" in path and os.path.splitext(path)[1].lower() not in VIDEO_EXTENSIONS:
        raise ValueError("FFmpeg may take its name for a pattern of image files; remove the %")
    with _OPENING, _messages_logged():
        # FFmpeg prints a line for each damaged block; OpenCV's, which is the same library to the
        # linker, resets this
        decord.logging.set_level(decord.logging.QUIET)
        # an absolute path, as FFmpeg takes `name:` at the beginning for a protocol
        path = os.path.abspath(path)
        return VideoReader(path, width=image_size, height=image_size, num_threads=1)


@contextlib.contextmanager
def _messages_logged() -> Iterator[None]:
    """Log what decord prints when it fails to open a file; it has no option for that."""
    console = os.dup(2)
    with _file_in_memory() as printed:
        os.dup2(printed.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(console, 2)
            printed.seek(0)
            for line in printed:
                if b"/src/video/" in line:
                    # the root logger's messages go to a run's log file, not to the console
                    logging.getLogger().info(line.decode(errors="replace").strip())
                else:  # another thread's
                    os.write(console, line)
            os.close(console)


def _file_in_memory() -> IO[bytes]:
    # a full disk must not matter
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("printed"), "w+b")
    return tempfile.TemporaryFile()  # on other systems than Linux


def read_frames(reader: VideoReader, indices: Sequence[int]) -> Tensor:
    """Frames of an open video, uint8 RGB (number of indices, height, width, 3)."""
    frames = reader.get_batch(indices)
    # LAVIS sets decord's bridge to torch, but the bridge holds for the importing thread only.
    return frames if isinstance(frames, Tensor) else torch.from_numpy(frames.asnumpy())


@contextlib.contextmanager
def decode_errors(path: str) -> Iterator[None]:
    """Turn what reading a file raises into a VideoDecodeError."""
    try:
        yield
    # decord asserts that there are frames; a DECORDError is no RuntimeError
    except (OSError, ValueError, RuntimeError, AssertionError, DECORDError) as error:
        if is_machine_fault(error):
            raise
        by_decord = isinstance(error, (RuntimeError, AssertionError, DECORDError))
        reason = f"decord says: {str(error).strip()}" if by_decord else str(error)
        raise VideoDecodeError(
            f"Cannot decode video '{path}': {reason}. Download or re-encode the file, or remove "
            "its records from the annotations.",
            reason,
        ) from error


def visual_problem(path: str, is_video: bool) -> str | None:
    """Say why the file of a record must not be opened, or the frames in its place, or None."""
    if is_video and clip_file(path) != path and not os.path.lexists(path):
        return None
    return file_problem(path, VIDEO_FORMATS if is_video else IMAGE_FORMATS)


def frames_problem(path: str, choose: ChooseFrames, image_size: int = _PROBE_SIZE) -> str | None:
    """Say why the chosen frames of exactly this video or archive cannot be decoded, or None."""
    indices: list[int] = []

    def choose_first(num_frames: int) -> Sequence[int]:
        indices[:] = choose(num_frames)
        return indices[:_PROBED_AT_ONCE]

    try:
        decode_file(path, choose_first, image_size)
        while len(indices) > _PROBED_AT_ONCE:
            del indices[:_PROBED_AT_ONCE]
            decode_file(path, lambda num_frames: indices[:_PROBED_AT_ONCE], image_size)
    except (VideoDecodeError, PermissionError) as error:
        return getattr(error, "reason", str(error))
    return None
