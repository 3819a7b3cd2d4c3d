"""An index is built, kept up to date and searched."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
import torch
from lavis.common.registry import registry
from PIL import Image
from search_media import RECIPE, TINY, write_clip, write_image
from tiny_runs import ROOT

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.runners.run_folders import FolderInUse, sole_user
from lavis_uniadapter.search import Index, indexing, reading
from lavis_uniadapter.search.manifest import FILE, Manifest

FILES = {"short.mp4": 1, "long.mp4": 3, "sub/other.mp4": 1, "a.png": 1, "sub/b.jpg": 1}


def segments_of(folder) -> dict[str, int]:
    manifest = Manifest(folder)
    counts: dict[str, int] = {}
    for stored in manifest.segments(range(1, 2000)):
        counts[stored.file] = counts.get(stored.file, 0) + 1
    manifest.close()
    return counts


def all_hits(folder, rerank=50) -> list[tuple]:
    index = Index.open(folder)
    hits = index.query("a red circle", top=300, rerank=rerank)
    index.close()
    return sorted(
        (h.file, h.start, h.end, round(h.probability if rerank else h.similarity, 3)) for h in hits
    )


def test_every_file_is_indexed_and_the_unreadable_one_is_named(build, media, tmp_path):
    summary = build(media)
    assert sorted(summary.new) == sorted(FILES) and not summary.changed and not summary.gone
    assert list(summary.unreadable) == ["broken.mp4"]
    assert (summary.files, summary.segments) == (5, 7)
    assert "cannot read 'broken.mp4': " in str(summary)
    assert segments_of(tmp_path / "index") == FILES


def test_probabilities_are_those_of_the_model_for_the_frames_of_each_segment(
    index, media, options, trained
):
    """By the registered processor and the model's own methods, pair by pair."""
    text = "a blue square"
    vis = registry.get_processor_class("blip_video_eval")(image_size=64, n_frms=2)
    model = index.engine.model
    with torch.no_grad():
        texts = model.encode_text([text])
    hits = {hit.file: hit for hit in index.query(text, top=9, rerank=9)}
    for name in ("short.mp4", "sub/other.mp4"):
        clip = vis(str(media / name))[None]
        with torch.no_grad():
            visuals = model.encode_visual({"video": clip})
            expected = model.match(texts, visuals).softmax(dim=1)[0, 1]
        assert hits[name].probability == pytest.approx(float(expected), abs=2e-3)
        assert hits[name].similarity == pytest.approx(float(texts.feat @ visuals.feat[0]), abs=2e-3)
        cosines = [frame.similarity for frame in hits[name].frames]
        assert cosines == pytest.approx((visuals.frame_feat[0] @ texts.feat[0]).tolist(), abs=2e-3)


def test_the_adapter_decides_what_is_found(built, media, options, tmp_path, build):
    build(media, tmp_path / "plain", adapter=None)
    with_adapter, without = all_hits(built), all_hits(tmp_path / "plain")
    assert [hit[:3] for hit in with_adapter] == [hit[:3] for hit in without]
    assert with_adapter != without


def test_hits_are_ordered_by_the_matching_head_and_touching_segments_are_one(index):
    hits = index.query("a green star", top=9, rerank=9)
    assert [hit.rank for hit in hits] == list(range(1, len(hits) + 1))
    assert len(hits) == 5  # the three segments of long.mp4 are one moment
    (long,) = [hit for hit in hits if hit.file == "long.mp4"]
    assert (long.start, long.end, len(long.frames)) == (0, 9, 6)
    assert list(long.frames) == sorted(long.frames)
    assert long.path.is_file()
    # without the matching head: similarity alone
    by_similarity = index.query("a green star", top=9, rerank=0)
    assert [h.probability for h in by_similarity] == [None] * 5
    similarities = [h.similarity for h in by_similarity]
    assert similarities == sorted(similarities, reverse=True)


def test_what_was_not_reranked_comes_last(index):
    hits = index.query("a green star", top=9, rerank=2)
    judged = [hit.probability is not None for hit in hits]
    assert judged == sorted(judged, reverse=True) and 1 <= sum(judged) <= 2


def test_a_threshold_leaves_out_what_is_below(index):
    every = index.query("a green star", top=9, rerank=9)
    middle = sorted(hit.probability for hit in every)[2]
    some = index.query("a green star", top=9, rerank=9, min_probability=middle)
    assert {h.file for h in some} <= {h.file for h in every if h.probability >= middle}
    assert some and index.query("a green star", rerank=9, min_probability=1.0) == []


def test_stages_come_in_order(index):
    stages = list(index.stages("yellow", rerank=6))
    assert [s.name for s in stages] == ["shortlist", "matching", "matching", "done"]
    assert [(s.matched, s.total) for s in stages[1:]] == [(3, 6), (6, 6), (6, 6)]
    assert {h.probability for h in stages[0].hits} == {None}


def test_an_image_and_a_segment_find_themselves(index, media):
    found = index.query(image=Image.open(media / "sub/b.jpg").convert("RGB"), top=2)
    assert found[0].file == "sub/b.jpg" and found[0].similarity == pytest.approx(1, abs=2e-3)
    again = index.query(like=found[0].segment, top=2)
    assert [hit.file for hit in again] == [hit.file for hit in found]


def test_cached_tokens_change_nothing(index, monkeypatch):
    first = index.query("a red circle", rerank=9)
    monkeypatch.setattr("lavis_uniadapter.search.index.read_segment", None)  # would fail
    again = index.query("a red circle", rerank=9)
    for one, other in zip(first, again, strict=True):
        assert one.file == other.file
        assert one.probability == pytest.approx(other.probability, abs=2e-3)


def test_windows_are_those_of_the_index(built):
    manifest = Manifest(built)
    long = [s for s in manifest.segments(range(1, 20)) if s.file == "long.mp4"]
    assert [(s.segment.start, s.segment.end) for s in long] == [(0, 3), (3, 6), (6, 9)]
    manifest.close()


def test_a_bad_query_is_an_error_that_says_why(index):
    for arguments, named in (
        ({"text": "  "}, "empty"),
        ({"text": "x" * 10_000}, "10000 characters"),
        ({}, "one of"),
        ({"text": "a", "like": 1}, "one of"),
        ({"like": 10**6}, "no segment 1000000"),
        ({"text": "a", "top": 0}, "top is 0"),
    ):
        with pytest.raises(ConfigError, match=named):
            index.query(**arguments)


# --- bringing it up to date ----------------------------------------------------------------------


def test_only_what_differs_is_read_again(build, own_media, tmp_path, monkeypatch):
    build(own_media)
    before = segments_of(tmp_path / "index")
    (own_media / "a.png").unlink()
    write_clip(own_media / "short.mp4", 2, seed=9)
    write_image(own_media / "new.png", seed=8)
    os.utime(own_media / "long.mp4")  # another time, the same content
    encoded = []
    encode = indexing.Engine.encode
    monkeypatch.setattr(
        indexing.Engine,
        "encode",
        lambda self, clips: encoded.append(len(clips)) or encode(self, clips),
    )
    summary = build(own_media)
    assert (summary.new, summary.changed, summary.gone) == (["new.png"], ["short.mp4"], ["a.png"])
    assert summary.unchanged == 3 and sum(encoded) == 2
    after = segments_of(tmp_path / "index")
    assert after == {**{k: v for k, v in before.items() if k != "a.png"}, "new.png": 1}
    build(own_media, tmp_path / "anew")
    assert all_hits(tmp_path / "index") == all_hits(tmp_path / "anew")
    encoded.clear()
    assert build(own_media).unchanged == 5 and not encoded


def test_only_below_the_folder_that_is_looked_at_can_files_be_gone(build, own_media):
    build(own_media)
    (own_media / "a.png").unlink()
    (own_media / "sub/b.jpg").unlink()
    assert build(own_media / "sub", cfg=None).gone == ["sub/b.jpg"]
    assert build(own_media).gone == ["a.png"]


def test_an_empty_folder_deletes_nothing(build, own_media, tmp_path):
    build(own_media)
    shutil.rmtree(own_media)
    own_media.mkdir()  # as of a disk that is not mounted
    with pytest.raises(ConfigError, match="no images or videos.*has 6"):
        build(own_media)
    assert sum(segments_of(tmp_path / "index").values()) == 7


def test_another_folder_window_or_store_is_refused(build, media, tmp_path):
    build(media)
    (tmp_path / "elsewhere").mkdir()
    write_image(tmp_path / "elsewhere/x.png", seed=1)
    with pytest.raises(ConfigError, match="is of '.*media.*not inside"):
        build(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="window 3.0, not 5.0"):
        build(media, window=5.0)
    with pytest.raises(ConfigError, match="store numpy, not milvus"):
        build(media, store="milvus")


def test_another_adapter_base_or_processor_is_refused_with_the_command(
    build, media, options, trained, tmp_path
):
    build(media)
    with pytest.raises(ConfigError, match="another adapter.*uniadapter search index"):
        build(media, adapter=None)
    more = [*options, "datasets.shapes_retrieval.vis_processor.eval.n_frms=4"]
    with pytest.raises(ConfigError, match="another frames"):
        Index.build(tmp_path / "index", media, RECIPE, more, adapter=trained[1], window=3.0)
    content = torch.load(trained[0], weights_only=True)
    content["model"]["vision_proj.bias"] += 1e-3
    changed = tmp_path / "base.pth"
    torch.save(content, changed)
    with pytest.raises(ConfigError, match="another model"):
        Index.build(
            tmp_path / "index", media, RECIPE, [*TINY, f"model.pretrained={changed}"], window=3.0
        )


def test_a_base_that_was_replaced_since_is_noticed(build, media, trained, options, tmp_path):
    own = tmp_path / "own.pth"
    shutil.copy(trained[0], own)
    Index.build(
        tmp_path / "index", media, RECIPE, [*TINY, f"model.pretrained={own}"], window=3.0, workers=0
    )
    content = torch.load(own, weights_only=True)
    content["model"]["text_proj.weight"] *= 1.01
    torch.save(content, own)
    with pytest.raises(ConfigError, match="another model"):
        Index.open(tmp_path / "index")


def test_random_weights_and_other_tasks_are_refused(media, tmp_path, options):
    with pytest.raises(ConfigError, match="model.pretrained is null"):
        Index.build(tmp_path / "index", media, RECIPE, TINY)
    with pytest.raises(ConfigError, match="needs a retrieval model"):
        Index.build(tmp_path / "index", media, "shapes_qa", ["run.device=cpu"])
    assert not (tmp_path / "index").exists()


# --- faults --------------------------------------------------------------------------------------


def test_two_indexers_never_work_on_one_folder(build, media, tmp_path):
    build(media)
    with sole_user(tmp_path / "index"), pytest.raises(FolderInUse, match="index"):
        build(media)


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


@pytest.mark.parametrize("after", ["store", "record"])
def test_a_change_that_was_cut_short_is_undone(build, own_media, tmp_path, monkeypatch, after):
    """Killed between store and record: the index opens, and the next update completes it."""
    build(own_media)
    write_clip(own_media / "short.mp4", 2, seed=9)
    write_image(own_media / "new.png", seed=8)

    class Killed(BaseException):
        pass

    def killed(*arguments):
        raise Killed

    if after == "store":
        monkeypatch.setattr(indexing, "insert_file", killed)
    else:
        monkeypatch.setattr("lavis_uniadapter.search.store.NumPyStore.add", killed)
    with pytest.raises(Killed):
        build(own_media)
    monkeypatch.undo()
    all_hits(tmp_path / "index")  # it opens
    build(own_media)
    build(own_media, tmp_path / "anew")
    assert all_hits(tmp_path / "index") == all_hits(tmp_path / "anew")


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
        had = _number_of_segments(folder)
        while process.poll() is None and _number_of_segments(folder) <= had:
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert had < _number_of_segments(folder) < 168
    all_hits(folder, rerank=0)  # it opens
    summary = build(many, folder)
    assert summary.unchanged > 0 and summary.segments == 168
    build(many, tmp_path / "anew")
    assert segments_of(folder) == segments_of(tmp_path / "anew")
    assert all_hits(folder, rerank=0) == all_hits(tmp_path / "anew", rerank=0)


def _number_of_segments(folder) -> int:
    try:
        with contextlib.closing(sqlite3.connect(f"file:{folder / FILE}?mode=ro", uri=True)) as db:
            return db.execute("SELECT COUNT(*) FROM segments").fetchone()[0]
    except sqlite3.OperationalError:  # not there yet
        return 0


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
