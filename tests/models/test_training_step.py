"""Odd batches in training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SMALL
from omegaconf import OmegaConf
from small_models import perturb

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


def test_negatives_from_other_ranks_equal_those_of_one_batch(
    build_model, video_batch, tmp_path, small_med_config
):
    """Two ranks with an item each: the hard negatives are certain, and come from the other rank.

    Loss and gradients, averaged over ranks, are those of one process with both items.
    """
    model = build_model(negative_all_rank=True).train()
    perturb(model.adapters)
    batch = {"video": video_batch["video"][:2], "text_input": video_batch["text_input"][:2]}
    visuals = model.encode_visual(batch)
    texts = model.encode_text(batch["text_input"])
    loss, _ = model._matching_loss(visuals, texts, torch.arange(2).view(2, 1))
    loss.backward()
    expected = {n: p.grad for n, p in model.trainable_parameters().items() if p.grad is not None}

    cls = type(model)
    config = OmegaConf.merge(
        OmegaConf.load(cls.default_config_path("shapes")).model,
        {"vit": None},
        {**SMALL, "med_config_path": small_med_config},
    )
    torch.save(
        {"config": OmegaConf.to_container(config), "state": model.state_dict(), **batch},
        tmp_path / "model.pth",
    )
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc_per_node=2", str(root / "tests/matching_loss_over_ranks.py")),
            *(str(tmp_path / "model.pth"), str(tmp_path / "result.pth")),
        ],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    result = torch.load(tmp_path / "result.pth", weights_only=True)
    torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-5, atol=1e-7)
    assert set(result["gradients"]) == set(expected)
    largest = max(g.abs().max().item() for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(
            result["gradients"][name], gradient, rtol=1e-4, atol=1e-6 * largest
        )


def test_key_value_adapter_keeps_bf16_and_its_scale(build_model, video_batch):
    model = build_model()
    perturb(model.adapters)
    adapter = model.adapters.active_set.key_value["text_encoder"]
    states = model.encode_visual(video_batch).embeds
    outputs = []
    for scale in (1.0, 1.003):  # which bfloat16 rounds to 1
        with torch.no_grad():
            adapter.key.scale.fill_(scale)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs += adapter(states.bfloat16())
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
