"""Fast evaluation against the plain one."""

from __future__ import annotations

import logging

import pytest
import torch
from gallery import Gallery
from lavis.tasks.retrieval import RetrievalTask
from omegaconf import OmegaConf
from small_models import build_selective
from torch.utils.data import DataLoader

from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.evaluation.two_stage import OUTSIDE_SHORTLIST, score_gallery


def scores_of(model, loader, **settings):
    v2t, t2v, unreadable = score_gallery(model, loader, Evaluation(**settings))
    assert not unreadable
    return v2t, t2v


def slow_scores(model, gallery, k_test, itc_weight):
    """One pair at a time, padded as the released code pads, keys and values anew for each."""
    model.eval()
    with torch.no_grad():
        visuals = [model.encode_visual(x[None]) for x in gallery.visuals]
        texts = [model.encode_text(model.tokenize([t], "max_length")) for t in gallery.text]
        sims = (
            torch.stack([v.feat[0] for v in visuals]) @ torch.stack([t.feat[0] for t in texts]).t()
        )
        matching = torch.tensor([[model.match(t, v)[0, 1].item() for t in texts] for v in visuals])
    scores = []
    for s, m in ((sims, matching), (sims.t(), matching.t())):
        out = OUTSIDE_SHORTLIST + s
        for row in range(len(s)):
            for column in s[row].argsort(descending=True)[:k_test]:
                out[row, column] = m[row, column] + itc_weight * s[row, column]
        scores.append(out)
    return scores


@pytest.fixture
def model(build_model):
    return build_selective(build_model)


@pytest.mark.parametrize("frames, frame_aware", [(None, True), (3, True), (3, False)])
@pytest.mark.parametrize("k_test, rerank_batch", [(2, 3), (5, 1), (100, 64)])
def test_fast_equals_slow(build_model, frames, k_test, rerank_batch, frame_aware):
    model = build_selective(build_model, adapter={"frame_aware": frame_aware})
    gallery = Gallery(5, texts_each=2, frames=frames)
    gallery.text[3] = "red"  # one token
    expected = slow_scores(model, gallery, k_test, itc_weight=0.5)
    actual = scores_of(
        model,
        DataLoader(gallery, batch_size=2),
        k_test=k_test,
        itc_weight=0.5,
        rerank_batch=rerank_batch,
    )
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("k_test", [1, 3, 100])
def test_ties_are_scored_as_slowly(model, k_test):
    """Twice the same clip and text: which of two equals a shortlist takes does not matter."""
    gallery = Gallery(5, texts_each=1, frames=3)
    gallery.visuals[3] = gallery.visuals[1]
    gallery.text[4] = gallery.text[2]
    expected = slow_scores(model, gallery, k_test, itc_weight=0.0)
    loader = DataLoader(gallery, batch_size=2)
    actual = scores_of(model, loader, k_test=k_test, itc_weight=0.0, rerank_batch=3)
    for ours, theirs in zip(actual, expected, strict=True):
        ours, theirs = ours.sort(dim=1).values, theirs.sort(dim=1).values
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    if k_test == 100:
        v2t, t2v = actual
        torch.testing.assert_close(v2t[1], v2t[3], rtol=0, atol=1e-5)
        torch.testing.assert_close(t2v[2], t2v[4], rtol=0, atol=1e-5)


def test_frame_aware_attention_acts_in_evaluation(build_model):
    scores = {}
    for frame_aware in (True, False):
        model = build_selective(build_model, adapter={"frame_aware": frame_aware})
        loader = DataLoader(Gallery(4, frames=3), batch_size=2)
        scores[frame_aware] = scores_of(model, loader, k_test=9, itc_weight=0.0, rerank_batch=9)[0]
    assert (scores[True] - scores[False]).abs().max() > 1e-2


def test_gallery_of_one(model):
    loader = DataLoader(Gallery(1), batch_size=2)
    scores, _ = scores_of(model, loader, k_test=1, itc_weight=0.0, rerank_batch=2)
    assert scores.shape == (1, 1) and scores.item() > -50


def test_features_on_disk_give_the_same_scores(model, caplog):
    loader = DataLoader(Gallery(5, texts_each=2), batch_size=2)
    how = {"k_test": 3, "itc_weight": 0.0, "rerank_batch": 4}
    in_memory = scores_of(model, loader, **how)
    with caplog.at_level(logging.INFO):
        on_disk = scores_of(model, loader, **how, feature_memory=0)
    assert "kept on disk" in caplog.text
    for one, other in zip(in_memory, on_disk, strict=True):
        assert torch.equal(one, other)


def test_features_that_fit_nowhere_are_refused(model, monkeypatch):
    usage = type("usage", (), {"free": 10})
    monkeypatch.setattr("lavis_uniadapter.evaluation.two_stage.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match="TMPDIR"):
        scores_of(
            *(model, DataLoader(Gallery(5), batch_size=2)),
            **{"k_test": 3, "itc_weight": 0, "rerank_batch": 4, "feature_memory": 0},
        )


def test_contrastive_only(model):
    loader = DataLoader(Gallery(3), batch_size=2)
    v2t, t2v = scores_of(model, loader, k_test=0, itc_weight=0.0, rerank_batch=2)
    assert torch.equal(v2t, t2v.t()) and v2t.abs().max() <= 1.0001


@pytest.mark.parametrize("k_test", [0, 3, 100])
def test_bf16_makes_no_ties(model, k_test):
    """Neither of the similarities (k_test 0) nor of the matching scores of distinct pairs."""
    gallery = Gallery(8, texts_each=2, frames=2, seed=5)
    assert len(set(gallery.text)) == 16
    loader = DataLoader(gallery, batch_size=3)
    scores = {}
    for bf16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            scores[bf16] = scores_of(model, loader, k_test=k_test, itc_weight=0.5, rerank_batch=5)
    for exact, coarse in zip(scores[False], scores[True], strict=True):
        assert coarse.dtype == torch.float32 and not torch.equal(coarse, exact)
        for found in (exact, coarse):
            distinct = found[found > -50]  # others lose digits when -100 is added to them
            assert len(distinct.unique()) == len(distinct) >= 3 * 8


@pytest.mark.parametrize("k_test, rerank_batch", [(-1, 4), (2, 0)])
def test_impossible_settings_are_refused(model, k_test, rerank_batch):
    settings = OmegaConf.create({"k_test": k_test, "rerank_batch": rerank_batch})
    with pytest.raises(ConfigError, match="run.k_test is -1|run.rerank_batch is 0"):
        model.compute_sim_matrix(DataLoader(Gallery(2), batch_size=2), settings)


def test_loader_that_misses_part_of_the_gallery_is_refused(model):
    loader = DataLoader(Gallery(4), batch_size=2, sampler=[0, 1, 3])
    with pytest.raises(RuntimeError, match="index 2"):
        scores_of(model, loader, k_test=1, itc_weight=0, rerank_batch=2)


def test_training_mode_is_restored(model):
    model.train()
    scores_of(model, DataLoader(Gallery(2), batch_size=2), k_test=1, itc_weight=0, rerank_batch=2)
    assert model.training


def test_lavis_own_retrieval_task_works(model, tmp_path, monkeypatch):
    from lavis.common.registry import registry

    monkeypatch.setitem(registry.mapping["paths"], "output_dir", str(tmp_path))
    task = RetrievalTask(OmegaConf.create({"k_test": 4}))
    metrics = task.evaluation(model, DataLoader(Gallery(6, texts_each=2), batch_size=4))
    assert {"txt_r1", "img_r1", "agg_metrics"} <= set(metrics)
    assert 0 <= metrics["img_r1"] <= metrics["img_r5"] <= 100
