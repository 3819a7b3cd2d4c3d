"""Miniature benchmarks in an empty folder."""

import multiprocessing

import pytest
from clips import write_clip
from published import MSRVTT, DiDeMo

from lavis_uniadapter.tools.prepare import videos


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_clip(path, num_frames=4)
    return path


@pytest.fixture
def leaves_no_workers():
    """Check that no process that the test has started is left."""
    before = set(multiprocessing.active_children())
    yield
    assert set(multiprocessing.active_children()) <= before


@pytest.fixture
def msr(tmp_path, clip, capsys):
    return MSRVTT(tmp_path, clip, capsys)


@pytest.fixture
def did(tmp_path, clip, capsys):
    return DiDeMo(tmp_path, clip, capsys)


@pytest.fixture
def undecoded(monkeypatch):
    """Skip decoding, which takes minutes for as many videos as a benchmark has."""
    monkeypatch.setattr(videos, "frames_problem", lambda *_: None)
