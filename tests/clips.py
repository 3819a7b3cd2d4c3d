"""Small clips, and damage to them."""

import cv2
import numpy as np


def write_frames(path, frames_bgr):
    """An mp4 of frames, uint8 (height, width, 3); returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames_bgr[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (width, height))
    assert writer.isOpened()
    for frame in frames_bgr:
        writer.write(frame)
    writer.release()
    return str(path)


def noise_frames(num_frames):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (num_frames, 48, 64, 3), dtype=np.uint8)


def write_clip(path, num_frames=12):
    return write_frames(path, noise_frames(num_frames))


def frame_starts(mp4):
    """Where the frames of an mp4 of OpenCV's begin."""
    return [i for i in range(len(mp4)) if mp4[i : i + 4] == b"\0\0\x01\xb6"]


def spoil_from_frame(path, first):
    """Make the frames from `first` on undecodable."""
    mp4 = bytearray(path.read_bytes())
    start = frame_starts(mp4)[first]
    end = mp4.index(b"moov") - 4
    mp4[start:end] = bytes(end - start)
    path.write_bytes(mp4)
