"""Odd batches in training."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from small_models import perturb

from lavis_uniadapter.models import retrieval
from lavis_uniadapter.models.retrieval import _sample_negatives


def test_negatives_are_never_the_same_item_and_follow_the_softmax():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(4000, 1)
    same = torch.tensor([[False, False, False, True]]).repeat(4000, 1)
    torch.manual_seed(0)
    drawn, has_negative = _sample_negatives(logits, same)
    assert has_negative.all()
    share = torch.bincount(drawn, minlength=4) / 4000
    expected = torch.tensor([0.0, 1.0, 2.0]).softmax(dim=0)
    assert share[3] == 0
    assert (share[:3] - expected).abs().max() < 0.03


@pytest.mark.parametrize("hard_negatives", [True, False])
def test_negatives_are_drawn_by_similarity_or_evenly(
    build_model, video_batch, hard_negatives, monkeypatch
):
    """Scores of the draws are the contrastive similarities, or all equal."""
    drawn_by = []

    def draw(logits, same):
        drawn_by.append(logits)
        return _sample_negatives(logits, same)

    monkeypatch.setattr(retrieval, "_sample_negatives", draw)
    model = build_model(hard_negatives=hard_negatives).train()
    visuals = model.encode_visual(video_batch["video"])
    texts = model.encode_text(model.tokenize(video_batch["text_input"], "max_length"))
    model._matching_loss(visuals, texts, torch.arange(4).view(-1, 1))
    similarities = texts.feat @ visuals.feat.t() / model.temp
    for logits, expected in zip(drawn_by, (similarities, similarities.t()), strict=True):
        assert len(logits.unique()) == (16 if hard_negatives else 1)
        if hard_negatives:
            torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("negative_all_rank", [True, False])
def test_batch_of_one_video_has_no_negatives_and_still_trains(
    build_model, video_batch, negative_all_rank
):
    model = build_model(negative_all_rank=negative_all_rank).train()
    video_batch["image_id"] = torch.zeros(4, dtype=torch.long)
    output = model(video_batch)
    assert torch.isfinite(output.loss)
    matches = output.intermediate_output.itm_logits[:4]
    expected = torch.nn.functional.cross_entropy(matches, torch.ones(4, dtype=torch.long))
    torch.testing.assert_close(output.loss_itm, expected)
    output.loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters().values())


def test_item_without_negatives_beside_others(build_model, video_batch):
    model = build_model().train()
    video_batch["image_id"] = torch.tensor([0, 0, 0, 1])
    labels = model(video_batch).intermediate_output.itm_labels
    assert labels.sum() == 4 and len(labels) == 12


def test_queue_that_the_batch_does_not_divide_wraps_around(build_model, video_batch):
    model = build_model(queue_size=6).train()
    for step, expected in ((1, 4), (2, 2), (3, 0)):
        video_batch["image_id"] = torch.arange(4) + 10 * step
        model(video_batch)
        assert int(model.queue_ptr) == expected
    assert sorted(model.idx_queue[0].tolist()) == [22, 23, 30, 31, 32, 33]


def test_batch_larger_than_the_queue(build_model, video_batch):
    model = build_model(queue_size=3).train()
    model(video_batch)
    assert sorted(model.idx_queue[0].tolist()) == [1, 2, 3]


def test_queue_of_none(build_model, video_batch):
    assert torch.isfinite(build_model(queue_size=0).train()(video_batch).loss)


def test_images_and_one_frame_videos_are_the_same(build_model, video_batch):
    model = build_model().eval()
    frame = video_batch["video"][:, :, 0]
    image = model.encode_visual({"image": frame})
    video = model.encode_visual({"video": frame[:, :, None]})
    assert torch.equal(image.embeds, video.embeds) and torch.equal(image.feat, video.feat)


def test_alpha_ramps_up_over_two_epochs(build_model):
    model = build_model(alpha_rampup_epochs=2)
    steps = ((0, 0), (0, 5), (1, 0), (2, 0), (7, 1))
    assert [model._rampup_factor(e, i, 10) for e, i in steps] == [0, 0.25, 0.5, 1, 1]


class TwoRanks:
    """Threads in place of processes: each gathers the tensors of both."""

    def __init__(self, monkeypatch):
        self._own = threading.local()
        self._meet = threading.Barrier(2, timeout=60)
        self._given: dict[int, torch.Tensor] = {}
        monkeypatch.setattr(retrieval, "get_rank", lambda: self._own.rank)
        monkeypatch.setattr(retrieval, "get_world_size", lambda: 2)
        monkeypatch.setattr(retrieval, "all_gather_with_grad", self._gather)
        monkeypatch.setattr(retrieval, "concat_all_gather", lambda x: self._gather(x).detach())

    def _gather(self, x):
        self._given[self._own.rank] = x
        self._meet.wait()
        gathered = torch.cat([self._given[0], self._given[1]])
        self._meet.wait()
        return gathered

    def run(self, work):
        def of_rank(rank):
            self._own.rank = rank
            return work(rank)

        with ThreadPoolExecutor(2) as threads:
            return list(threads.map(of_rank, range(2)))


def test_negatives_from_other_ranks_equal_those_of_one_batch(build_model, video_batch, monkeypatch):
    """Two ranks with an item each: the hard negatives are certain, and come from the other rank.

    Loss and gradients, averaged over ranks, are those of one process with both items.
    """
    model = build_model(negative_all_rank=True).train()
    perturb(model.adapters)

    def matching_loss(items: slice):
        tokens = model.tokenize(video_batch["text_input"][items], "max_length")
        visuals = model.encode_visual(video_batch["video"][items])
        ids = torch.arange(4)[items].view(-1, 1)
        return model._matching_loss(visuals, model.encode_text(tokens), ids)[0]

    def loss_and_gradients(loss):
        loss.backward()
        trained = model.trainable_parameters().items()
        gradients = {name: p.grad.clone() for name, p in trained if p.grad is not None}
        model.zero_grad()
        return loss.detach(), gradients

    loss, expected = loss_and_gradients(matching_loss(slice(2)))
    losses = TwoRanks(monkeypatch).run(lambda rank: matching_loss(slice(rank, rank + 1)))
    averaged, gradients = loss_and_gradients((losses[0] + losses[1]) / 2)
    torch.testing.assert_close(averaged, loss, rtol=1e-5, atol=1e-7)
    assert set(gradients) == set(expected)
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest)


def test_key_value_adapter_keeps_bf16_and_its_scale(build_model, video_batch):
    model = build_model()
    perturb(model.adapters)
    adapter = model.adapters.active_set.key_value["text_encoder"]
    states = model.encode_visual(video_batch).embeds
    outputs = []
    for scale in (1.0, 1.003):  # which bfloat16 rounds to 1
        with torch.no_grad():
            adapter["key"].scale.fill_(scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs += [adapter[part](states.bfloat16()) for part in ("key", "value")]
            memory = model.text_encoder.encoder.project(states)
        for keys, values in memory.projected.values():
            assert keys.dtype == values.dtype == torch.bfloat16
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert not torch.equal(outputs[0], outputs[2])


def test_losses_are_in_full_precision_under_autocast(build_model, video_batch):
    model = build_model().train()
    computed_in = set()
    model.text_encoder.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, args, out: computed_in.add(out.dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(video_batch)
    assert computed_in == {torch.bfloat16}
    assert output.intermediate_output.itm_logits.dtype == torch.float32
    for name in ("loss", "loss_itc", "loss_itm"):
        assert output[name].dtype == torch.float32, name
    sims = output.sims
    assert sims.sim_i2t.dtype == sims.sim_t2i_targets.dtype == torch.float32
    # coarser than float32 would be: bfloat16 keeps eight bits
    assert (sims.sim_i2t - sims.sim_i2t.bfloat16().float()).abs().max() > 0
