"""An index is built, kept up to date and searched."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil

import pytest
import torch
from lavis.common.registry import registry
from PIL import Image
from search_media import FILES, RECIPE, TINY, all_hits, segments_of, write_clip, write_image

from lavis_uniadapter.common.config import read_yaml
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.search import Index, building, indexing, reading
from lavis_uniadapter.search.answering import Answerer
from lavis_uniadapter.search.engine import Engine
from lavis_uniadapter.search.manifest import Manifest
from lavis_uniadapter.search.store import NumPyStore
from lavis_uniadapter.tools import recipes
from uniadapter_cli.main import main


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
    assert {h.probability for h in by_similarity} == {None}
    similarities = [h.similarity for h in by_similarity]
    assert similarities == sorted(similarities, reverse=True)


def test_what_was_not_reranked_comes_last(index):
    hits = index.query("a green star", top=9, rerank=2)
    judged = [hit.probability is not None for hit in hits]
    assert judged == sorted(judged, reverse=True) and 1 <= sum(judged) <= 2


def test_segments_that_an_indexer_adds_meanwhile_are_no_damage(built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "index")
    with contextlib.closing(Manifest(folder, {})) as manifest, contextlib.suppress(KeyError):
        with manifest.pending([1, 8, 9]):
            NumPyStore(folder, 256).delete([1])
            raise KeyError  # killed
    Index.open(folder).close()


def test_a_store_that_is_missing_or_cut_short_is_an_error_with_the_command(
    built, media, tmp_path, build
):
    folder = shutil.copytree(built, tmp_path / "index")
    ids = (folder / "ids.i64").read_bytes()
    (folder / "ids.i64").write_bytes(ids[:-16])
    with pytest.raises(ConfigError, match="7 segments, and the vectors of 5.*--rebuild"):
        Index.open(folder)
    with pytest.raises(ConfigError, match="--rebuild"):
        build(media, folder)
    (folder / "ids.i64").unlink()
    with pytest.raises(ConfigError, match="ids.i64.*is missing"):
        Index.open(folder)
    assert not (folder / "ids.i64").exists()
    assert len(build(media, folder, cfg=None, adapter=None, rebuild=True).new) == 5
    assert all_hits(folder) == all_hits(built)


def test_the_command_that_rebuilds_runs_as_printed(built, media, options, tmp_path):
    folder = shutil.copytree(built, tmp_path / "an index")
    with pytest.raises(ConfigError, match="another adapter") as refused:
        Index.build(folder, media, RECIPE, options)
    command = shlex.split(str(refused.value).split("run: ")[1])
    assert command[0] == "uniadapter" and main([*command[1:], "--workers", "0"]) == 0
    assert not (folder / "adapter").exists() and Manifest(folder).about["window"] == 3
    Index.open(folder).close()


@pytest.mark.parametrize("arguments", [{"rerank": 0}, {"image": Image.new("RGB", (8, 8))}])
def test_a_threshold_needs_probabilities(index, arguments):
    text = None if "image" in arguments else "a"
    with pytest.raises(ConfigError, match="min_probability needs a text"):
        index.query(text, min_probability=0.1, **arguments)
    with pytest.raises(ConfigError, match="must be from 0 to 1"):
        index.query("a", min_probability=50)


def test_an_adapter_may_be_given_by_options_and_have_any_path(media, options, trained, tmp_path):
    adapter = shutil.copytree(trained[1], tmp_path / "my #1 = adapter")
    arguments = {"window": 3.0, "workers": 0}
    Index.build(tmp_path / "one", media, RECIPE, options, adapter=adapter, **arguments)
    shutil.copytree(trained[1], tmp_path / "plain")
    more = [*options, f"model.adapter_ckpt={tmp_path / 'plain'}"]
    Index.build(tmp_path / "two", media, RECIPE, more, **arguments)
    shutil.rmtree(adapter)
    shutil.rmtree(tmp_path / "plain")
    assert all_hits(tmp_path / "one") == all_hits(tmp_path / "two")
    with pytest.raises(ConfigError, match="another frames"):
        Index.open(tmp_path / "one", ["datasets.shapes_retrieval.vis_processor.eval.n_frms=4"])


def test_a_rebuilt_index_leaves_no_old_collection_in_milvus(build, media, tmp_path):
    pytest.importorskip("milvus_lite")
    from pymilvus import MilvusClient

    folder, collections = tmp_path / "index", []
    for arguments in ({"store": "milvus"}, {"rebuild": True}):
        build(media, **arguments)
        with contextlib.closing(Manifest(folder)) as manifest:
            collections.append(manifest.about["collection"])
    with contextlib.closing(MilvusClient(str(folder / "milvus.db"))) as client:
        assert client.list_collections() == collections[1:] != collections[:1]


def test_an_update_keeps_window_and_store(build, media):
    build(media)
    assert build(media, cfg=None, window=None, store=None).unchanged == 5


def test_a_changed_file_is_not_judged(build, own_media, tmp_path):
    build(own_media)
    write_clip(own_media / "short.mp4", 3, seed=12)
    index = Index.open(tmp_path / "index")
    hits = index.query("a red circle", top=9, rerank=9)
    assert [hit.file for hit in hits if hit.probability is None] == ["short.mp4"]
    index.close()


def test_files_are_read_while_others_may_use_the_model(index, monkeypatch):
    free = []
    read = reading.read_segment

    def watched(*arguments):
        free.append(not index._lock.locked())
        return read(*arguments)

    monkeypatch.setattr("lavis_uniadapter.search.index.read_segment", watched)
    index.engine.batch_size = 1000
    monkeypatch.setattr("lavis_uniadapter.search.index._STEP", 2)
    stages = list(index.stages("yellow", rerank=5))
    assert free and all(free)
    assert [s.matched for s in stages[1:-1]] == [2, 4, 5]


def test_a_name_that_is_not_utf8_is_unreadable(build, own_media):
    name = os.fsdecode(b"caf\xe9.png")
    shutil.copy(own_media / "a.png", own_media / name)
    summary = build(own_media)
    assert "UTF-8" in summary.unreadable["caf\\xe9.png"] and len(summary.new) == 5


def test_an_index_in_a_folder_that_cannot_be_written_is_searched(built, tmp_path, monkeypatch):
    folder = shutil.copytree(built, tmp_path / "index")
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert len(all_hits(folder)) >= 5
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


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
    with pytest.raises(
        ConfigError, match="is 'blip_uniadapter_vqa'; it must be 'blip_uniadapter_retrieval'"
    ):
        Index.build(tmp_path / "index", media, "shapes_qa", ["run.device=cpu"])
    with pytest.raises(ConfigError, match="model.pretrained is null"):
        Answerer(recipes.runs()["shapes_qa"], ["run.device=cpu"])
    assert not (tmp_path / "index").exists()


def test_a_vocabulary_that_the_model_type_names_is_kept_by_its_full_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vocabulary = tmp_path / "emoji/start"
    vocabulary.mkdir(parents=True)
    recipe = recipes.find("emoji_retrieval", recipes.runs())
    (tmp_path / "weights.pth").touch()
    building.keep(tmp_path, Engine(recipe, ["model.pretrained=weights.pth"]))
    kept = read_yaml(tmp_path / building.RECIPE)["model"]
    assert (kept["tokenizer"], kept["pretrained"]) == (str(vocabulary), f"{tmp_path}/weights.pth")
