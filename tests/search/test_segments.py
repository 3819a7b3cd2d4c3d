"""Which files are indexed, and how videos are cut."""

from __future__ import annotations

import math
import os
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lavis_uniadapter.processors.media_files import FOLLOW_LINKS
from lavis_uniadapter.processors.sampling import sample_frame_indices
from lavis_uniadapter.search.segments import Segment, cut, find_media


def regular(frames: int, fps: float) -> np.ndarray:
    begins = np.arange(frames) / fps
    return np.stack([begins, begins + 1 / fps], axis=1)


def test_windows_have_equal_length_and_the_last_takes_what_is_left():
    segments = cut(regular(frames=240, fps=10), window=10, n_frms=2)
    assert [(s.start, s.end) for s in segments] == [(0, 10), (10, 24)]
    assert segments[0].frames == (25, 75)
    assert segments[0].times == (2.5, 7.5)


def test_a_short_clip_is_one_segment_sampled_as_in_evaluation():
    (segment,) = cut(regular(frames=12, fps=6), window=10, n_frms=4)
    assert segment == Segment(0, 2, (1, 4, 7, 10), (0.167, 0.667, 1.167, 1.667))


@pytest.mark.parametrize("frames", [1, 240])
def test_without_a_window_a_video_is_one_segment(frames):
    (segment,) = cut(regular(frames=frames, fps=10), window=math.inf, n_frms=2)
    assert (segment.start, segment.end) == (0, frames / 10)
    assert segment.frames == tuple(sample_frame_indices(frames, 2))


def test_times_come_from_the_frames_and_not_from_a_rate():
    # a frame a second, then ten a second: by index / rate the second window would begin elsewhere
    begins = np.concatenate([np.arange(10.0), 10 + np.arange(100) / 10])
    segments = cut(np.stack([begins, begins + 0.1], axis=1), window=10, n_frms=1)
    assert [(s.start, s.end) for s in segments] == [(0, 10), (10, 20)]
    assert segments[0].frames == (5,) and segments[0].times == (5,)
    assert segments[1].frames == (60,) and segments[1].times == (15,)


def test_a_window_without_frames_is_no_segment():
    begins = np.array([0.0, 1, 2, 30, 31, 32])
    segments = cut(np.stack([begins, begins + 1], axis=1), window=10, n_frms=1)
    assert [(s.start, s.end) for s in segments] == [(0, 10), (20, 33)]


def test_one_frame_far_away_costs_no_time():
    begins = np.array([0.0, 1e9])
    started = time.perf_counter()
    segments = cut(np.stack([begins, begins + 1], axis=1), window=0.5, n_frms=1)
    assert len(segments) == 2 and time.perf_counter() - started < 1


@given(
    gaps=st.lists(st.floats(0, 5), min_size=1, max_size=60),
    window=st.floats(0.5, 20),
    n_frms=st.integers(1, 4),
)
def test_segments_cover_each_frame_once_and_in_order(gaps, window, n_frms):
    begins = np.cumsum(gaps)
    segments = cut(np.stack([begins, begins + 0.04], axis=1), window, n_frms)
    frames = [frame for segment in segments for frame in segment.frames]
    assert frames == sorted(frames) and 0 <= frames[0] and frames[-1] < len(gaps)
    for one, other in zip(segments, segments[1:], strict=False):
        assert one.start < one.end <= other.start
    for segment in segments:
        assert all(segment.start - 2e-3 <= time <= segment.end + 2e-3 for time in segment.times)


def test_links_that_leave_the_folder_and_hidden_files_are_skipped(tmp_path, monkeypatch, caplog):
    outside, root = tmp_path / "outside", tmp_path / "root"
    for folder in (outside, root / "sub", root / ".hidden"):
        folder.mkdir(parents=True)
    for path in (
        outside / "secret.mp4",
        root / "sub/a.mp4",
        root / ".b.mp4",
        root / ".hidden/c.mp4",
    ):
        path.write_bytes(b"x")
    os.symlink(outside / "secret.mp4", root / "leaves.mp4")
    os.symlink(outside / "secret.mp4", root / "also.mp4")
    os.symlink(outside, root / "folder")
    os.symlink(root / "sub/a.mp4", root / "stays.mp4")
    os.symlink(root / "nothing", root / "dangling.mp4")
    assert [path for path, _ in find_media(root, root)] == ["stays.mp4", "sub/a.mp4"]
    (line,) = caplog.messages  # one for all
    link = f"'{root / 'also.mp4'}': it is reached by a link that leaves"
    assert line.startswith(f"2 links are skipped, such as {link}")
    assert [path for path, _ in find_media(root, root / "sub")] == ["sub/a.mp4"]
    monkeypatch.setenv(FOLLOW_LINKS, "1")
    assert [path for path, _ in find_media(root, root)][:2] == ["also.mp4", "leaves.mp4"]
