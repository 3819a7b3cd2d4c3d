"""Several files are written together or not at all."""

import os
import signal

import pytest

from lavis_uniadapter.common.atomic import write_together

CONTENTS = {"a.json": b"new", "b.json": b"neu", "c.json": b"3"}


@pytest.fixture
def folder(tmp_path):
    """An output folder with a foreign file and an old version of one file."""
    (tmp_path / "a.json").write_text("old")
    (tmp_path / "foreign.txt").write_text("keep")
    return tmp_path


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_contents(folder):
    write_together({folder / name: content for name, content in CONTENTS.items()})


@pytest.mark.parametrize("error", [OSError("the disk is full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(("function", "call"), [("fsync", 1), ("fsync", 3), ("replace", 1)])
def test_an_error_while_writing_leaves_all_as_it_was(folder, monkeypatch, function, call, error):
    before = contents_of(folder)
    original, calls = getattr(os, function), []

    def fail_once(*args):
        calls.append(args)
        if len(calls) == call:
            raise error
        return original(*args)

    monkeypatch.setattr(os, function, fail_once)
    with pytest.raises(type(error)):
        write_contents(folder)
    assert len(calls) == call
    assert contents_of(folder) == before


@pytest.mark.parametrize("call", [1, 2])
def test_a_killed_process_leaves_no_annotations(tmp_path, call):
    child = os.fork()
    if child == 0:
        calls = []

        def kill(_):
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)

        os.fsync = kill
        write_contents(tmp_path)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not list(tmp_path.glob("*.json"))


def test_written_files_are_synchronised_before_they_take_their_place(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    write_contents(tmp_path)
    assert events[:3] == ["fsync"] * 3 and events.count("replace") == 3
    assert contents_of(tmp_path) == {"a.json": b"new", "b.json": b"neu", "c.json": b"3"}
