"""Damage, interruptions and harmful files."""

from __future__ import annotations

import json
import operator
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from search_media import (
    FILES,
    RECIPE,
    all_hits,
    number_of_segments,
    segments_of,
    write_clip,
    write_image,
)
from tiny_runs import ROOT

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema.processors import VideoEval
from lavis_uniadapter.runners.run_folders import FolderInUse, sole_user
from lavis_uniadapter.search import Index, indexing, reading, store
from lavis_uniadapter.search.manifest import FILE, Manifest


def test_two_indexers_never_work_on_one_folder(build, media, tmp_path):
    build(media)
    with sole_user(tmp_path / "index"), pytest.raises(FolderInUse, match="index"):
        build(media)


def test_what_cannot_be_opened_is_not_called_damaged(built, tmp_path, monkeypatch):
    folder = shutil.copytree(built, tmp_path / "index")
    (folder / FILE).unlink()
    (folder / FILE).touch()
    with pytest.raises(ConfigError, match="not finished.*index' again"):
        Index.open(folder)

    def full(*arguments, **more):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(Manifest, "_connect", full)
    with pytest.raises(ConfigError, match="cannot be opened: database or disk is full") as error:
        Index.open(folder)
    assert "elete" not in str(error.value)


def test_a_damaged_or_foreign_index_is_one_line(build, media, tmp_path):
    folder = tmp_path / "index"
    with pytest.raises(ConfigError, match="holds no index.*uniadapter search index"):
        Index.open(folder)
    build(media)
    whole = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(whole[:100] + b"\x00" * 5000)
    for name in ("-wal", "-shm"):
        (folder / f"{FILE}{name}").unlink(missing_ok=True)
    with pytest.raises(ConfigError, match="damaged.*build the index again"):
        Index.open(folder)
    (folder / FILE).write_bytes(whole)
    database = sqlite3.connect(folder / FILE)
    database.execute("UPDATE about SET value = '99' WHERE key = 'format'")
    database.commit()
    database.close()
    with pytest.raises(ConfigError, match="format 99"):
        Index.open(folder)


@pytest.mark.parametrize("reverted", [False, True])
@pytest.mark.parametrize("before", ["NumPyStore.add", "insert_file"])
def test_a_change_that_was_cut_short_is_undone(
    build, own_media, tmp_path, monkeypatch, before, reverted
):
    """Killed between store and record: the index opens, and the next update completes it.

    ``reverted``: by then the files are again as the record has them, and their vectors are gone.
    """
    build(own_media)
    copy = shutil.copytree(own_media, tmp_path / "copy")
    write_clip(own_media / "short.mp4", 2, seed=9)
    write_image(own_media / "new.png", seed=8)

    class Killed(BaseException):
        pass

    module = store if before == "NumPyStore.add" else indexing
    change = operator.attrgetter(before)(module)

    def killed(*arguments):
        if not len(arguments[-1]):  # the file that cannot be read has no segments
            return change(*arguments)
        raise Killed

    monkeypatch.setattr(f"{module.__name__}.{before}", killed)
    with pytest.raises(Killed):
        build(own_media)
    monkeypatch.undo()
    all_hits(tmp_path / "index", rerank=0)  # it opens
    if reverted:
        (own_media / "new.png").unlink()
        shutil.copy2(copy / "short.mp4", own_media)
    build(own_media)
    build(own_media, tmp_path / "anew")
    for rerank in (0, 50):
        assert all_hits(tmp_path / "index", rerank) == all_hits(tmp_path / "anew", rerank)
    index = Index.open(tmp_path / "index")
    assert len(index.store) == len(index)
    index.close()


def test_a_file_that_vanished_since_is_not_judged(build, own_media, tmp_path):
    build(own_media)
    (own_media / "short.mp4").unlink()
    index = Index.open(tmp_path / "index")
    hits = index.query("a red circle", top=9, rerank=9)
    assert [hit.file for hit in hits if hit.probability is None] == ["short.mp4"]
    assert hits[-1].file == "short.mp4"
    index.close()


def test_recall_is_that_of_the_retrieval_task(run, options, trained, tmp_path):
    """One segment per clip, all candidates reranked, on the clips of the test split."""
    more = [o for o in options if not o.startswith("datasets.")]
    more += [f"run.cache_root={tmp_path}", "datasets.shapes_retrieval.generate.num_test=24"]
    more += ["run.k_test=24", f"model.adapter_ckpt={trained[1]}"]
    task = run("shapes_retrieval", *more, evaluate=True)
    records = json.loads((tmp_path / "shapes/clips/annotations/test.json").read_text())
    clips = tmp_path / "test_clips"
    clips.mkdir()
    for record in records:
        shutil.copy(tmp_path / "shapes/clips/videos" / record["video"], clips)
    Index.build(tmp_path / "index", clips, RECIPE, options, adapter=trained[1], workers=0)
    index = Index.open(tmp_path / "index")
    places = []
    for record in records:
        hits = index.query(record["caption"][0], top=24, rerank=24)
        places.append([hit.file for hit in hits].index(record["video"]))
    index.close()
    for k in (1, 5, 10):
        recall = 100 * sum(place < k for place in places) / 24
        assert recall == pytest.approx(task.metrics["test"][f"t2v_r{k}"], abs=1e-6)


# --- processes -----------------------------------------------------------------------------------


def command(*arguments, processes=1):
    """The command line that indexes; the window is that of ``build``."""
    start = [sys.executable, "-m", "uniadapter_cli"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc_per_node={processes}", "-m", "uniadapter_cli"]
    return [*start, "search", "index", *map(str, arguments), "--window", "3"]


def environment():
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.mark.processes
def test_two_processes_index_as_one(built, media, options, trained, tmp_path):
    arguments = [media, "--cfg", RECIPE, "--adapter", trained[1], "--index", tmp_path / "index"]
    done = subprocess.run(
        command(*arguments, "--options", *options, processes=2),
        **{"env": environment(), "capture_output": True, "text": True, "timeout": 300},
    )
    assert done.returncode == 0, done.stderr
    assert "5 new, 0 changed, 0 gone, 0 unchanged, 1 unreadable" in done.stdout
    assert segments_of(tmp_path / "index") == FILES
    assert all_hits(tmp_path / "index") == all_hits(built)


@pytest.mark.processes
def test_a_killed_indexer_leaves_an_index_that_a_second_run_completes(
    build, media, options, trained, tmp_path
):
    """Killed as soon as the record exists, and again as soon as it has grown."""
    many = tmp_path / "many"
    many.mkdir()
    for i in range(24):
        shutil.copytree(media, many / str(i))
    folder = tmp_path / "index"
    arguments = [many, "--cfg", RECIPE, "--adapter", trained[1], "--index", folder]
    for _ in range(2):
        process = subprocess.Popen(
            command(*arguments, "--options", *options),
            **{"env": environment(), "stderr": subprocess.DEVNULL, "start_new_session": True},
        )
        had = number_of_segments(folder)
        while process.poll() is None and number_of_segments(folder) <= had:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert had < number_of_segments(folder) < 168
    all_hits(folder, rerank=0)  # it opens
    summary = build(many, folder)
    assert summary.unchanged > 0 and summary.segments == 168
    build(many, tmp_path / "anew")
    assert segments_of(folder) == segments_of(tmp_path / "anew")
    assert all_hits(folder, rerank=0) == all_hits(tmp_path / "anew", rerank=0)


def test_a_slow_file_beside_one_that_kills_its_reader_is_not_lost(build, media, monkeypatch):
    read = reading.read_segments
    parent = os.getpid()

    def harmful(path, window, visual):
        name = os.path.basename(path)
        if name == "a.png" and os.getpid() != parent:
            if not (slow := media.parent / "read_twice").exists():
                slow.touch()
                time.sleep(1000)  # until the other one ends this attempt
        if name == "short.mp4":
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, window, visual)

    monkeypatch.setattr(reading, "read_segments", harmful)
    visual = VideoEval(image_size=64, n_frms=2)
    names = ("a.png", "short.mp4")
    files = [reading.FileToRead(number, media / name) for number, name in enumerate(names)]
    parts = [part for part in reading.read_parts(files, 3.0, visual, 2, 60) if part.is_last]
    assert {part.file: part.problem for part in parts} == {0: None, 1: "its decoder crashes"}


@pytest.mark.parametrize(("harm", "what"), [("crash", "crashes"), ("hang", "takes over 3 s")])
def test_a_file_that_harms_its_reader_is_named_and_the_others_are_indexed(
    build, media, monkeypatch, harm, what
):
    read = reading.read_segments

    def harmful(path, window, visual):
        if os.path.basename(path) == "short.mp4":
            if harm == "hang":
                time.sleep(1000)
            os.kill(os.getpid(), signal.SIGKILL)
        return read(path, window, visual)

    monkeypatch.setattr(reading, "read_segments", harmful)  # workers are forks of this process
    summary = build(media, workers=2, timeout=3)
    assert sorted(summary.unreadable) == ["broken.mp4", "short.mp4"]
    assert what in summary.unreadable["short.mp4"]
    assert sorted(summary.new) == ["a.png", "long.mp4", "sub/b.jpg", "sub/other.mp4"]
