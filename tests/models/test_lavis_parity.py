"""Adapters at rest, the model is LAVIS's own BLIP retrieval model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gallery import Gallery
from lavis.models.blip_models.blip_retrieval import BlipRetrieval
from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from lavis_uniadapter.backbone.build import build_text_encoder, build_visual_encoder
from lavis_uniadapter.checkpoints import blip_files
from lavis_uniadapter.checkpoints.blip_files import load_base_state_dict
from lavis_uniadapter.common.errors import CheckpointError


@pytest.fixture
def pair(build_model, small_med_config, monkeypatch):
    """LAVIS's model and ours, with the same weights."""
    ours = build_model(
        queue_size=8, max_txt_len=35, alpha_rampup_epochs=2, adapter={"frame_aware": False}
    )
    monkeypatch.setattr(
        BlipRetrieval, "init_tokenizer", classmethod(lambda cls: ours.tokenizer), raising=True
    )
    vit = {"width": 32, "depth": 2, "num_heads": 4, "patch_size": 16, "mlp_ratio": 2}
    torch.manual_seed(5)
    theirs = BlipRetrieval(
        build_visual_encoder("custom", 32, vit),
        build_text_encoder(small_med_config, 32),
        queue_size=8,
        embed_dim=16,
    )
    assert load_base_state_dict(ours, theirs.state_dict(), "LAVIS's model", ()) == []
    for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr"):
        getattr(ours, name).copy_(getattr(theirs, name))
    for head in ours.HEADS:
        ours.adapters["default"].heads[head].load_state_dict(getattr(theirs, head).state_dict())
    ours.reset_momentum()
    return ours, theirs


@pytest.fixture
def image_batch(video_batch):
    return {
        "image": video_batch["video"][:2, :, 0],
        "text_input": video_batch["text_input"][:2],
        "image_id": torch.arange(2),
        "epoch": 1,
        "iters": 0,
        "num_iters_per_epoch": 2,
    }


def test_losses_and_queue_equal_lavis(pair, image_batch):
    """Two items, so the hard negatives are certain."""
    outputs = [model.train()(image_batch) for model in pair]
    for name in ("loss", "loss_itc", "loss_itm"):
        torch.testing.assert_close(outputs[0][name], outputs[1][name], rtol=1e-5, atol=0)
    for name in ("image_queue", "text_queue", "idx_queue", "queue_ptr"):
        torch.testing.assert_close(getattr(pair[0], name), getattr(pair[1], name))


def test_gradients_of_full_tuning_equal_lavis(pair, image_batch, build_model):
    _, theirs = pair
    ours = build_model(queue_size=8, max_txt_len=35, alpha_rampup_epochs=2, tuning="full")
    load_base_state_dict(ours, theirs.state_dict(), "LAVIS's model", ())
    for name in ("image_queue", "text_queue", "idx_queue"):
        getattr(ours, name).copy_(getattr(theirs, name))
    ours.reset_momentum()
    for model in (ours, theirs):
        model.train()(image_batch).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}
    actual = ours.trainable_parameters()
    assert set(actual) == set(expected)
    largest = max(g.abs().max().item() for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name].grad, gradient, rtol=1e-4, atol=1e-6 * largest)


def test_two_stage_scores_equal_lavis(pair):
    """With LAVIS's ITC weight of 1; k_test equal to the gallery, so that nothing is left out."""
    ours, theirs = pair
    loader = DataLoader(Gallery(6, texts_each=2), batch_size=4)
    cfg = OmegaConf.create({"k_test": 6, "itc_weight": 1.0, "rerank_batch": 5})
    with torch.no_grad():
        expected = theirs.eval().compute_sim_matrix(loader, cfg)
        actual = ours.compute_sim_matrix(loader, cfg)
    chosen = expected[0] > -50  # the text side has 12 candidates, of which 6 are reranked
    assert chosen.sum() == 36
    np.testing.assert_array_equal(actual[0] > -50, chosen)
    np.testing.assert_allclose(actual[0][chosen], expected[0][chosen], atol=1e-4)
    np.testing.assert_allclose(actual[1], expected[1], atol=1e-4)


@pytest.mark.parametrize("harm", ["missing", "misshapen", "unexpected"])
def test_base_checkpoint_that_does_not_fit_is_refused_by_name(pair, harm, tmp_path):
    ours, theirs = pair
    state = dict(theirs.state_dict())
    name = "text_encoder.encoder.layer.0.intermediate.dense.weight"
    if harm == "missing":
        del state[name]
    elif harm == "misshapen":
        state[name] = state[name][1:].clone()
    else:
        name = "text_encoder.encoder.layer.9.intermediate.dense.weight"
        state[name] = torch.zeros(1)
    torch.save({"model": state}, tmp_path / "blip.pth")
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        ours.load_base(str(tmp_path / "blip.pth"))
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key])


def test_a_base_checkpoint_is_downloaded_or_the_url_is_named(pair, tmp_path, monkeypatch):
    ours, theirs = pair
    url = "https://weights.invalid/blip.pth"
    torch.save({"model": theirs.state_dict()}, tmp_path / "cached.pth")
    monkeypatch.setattr(
        blip_files,
        "download",
        lambda source: str(tmp_path / "cached.pth") if source == url else None,
    )
    ours.load_base(url)
    assert ours.base_name == "blip.pth"

    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=f"{url}' cannot be downloaded: "):
        ours.load_base(url)


def test_heads_missing_from_the_checkpoint_are_reported(pair, tmp_path):
    ours, theirs = pair
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("itm_head")}
    torch.save(state, tmp_path / "blip.pth")
    ours.load_base(str(tmp_path / "blip.pth"))
    assert ours.randomly_initialised == ["itm_head.weight", "itm_head.bias"]


def test_positional_embedding_is_interpolated_to_the_image_size(pair, build_model, tmp_path):
    _, theirs = pair
    torch.save({"model": theirs.state_dict()}, tmp_path / "blip.pth")
    larger = build_model(image_size=64, pretrained=str(tmp_path / "blip.pth"))
    assert larger.visual_encoder.pos_embed.shape == (1, 17, 32)
    assert torch.equal(larger.visual_encoder.pos_embed[:, 0], theirs.visual_encoder.pos_embed[:, 0])
    assert larger.randomly_initialised == []


def test_pickled_code_is_not_run(tmp_path, build_model):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    torch.save({"model": {"x": Evil()}}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match="evil.pth"):
        build_model(pretrained=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "touched").exists()


def test_attention_maps_for_gradcam_still_come_out(pair, image_batch):
    """LAVIS's gradcam sets ``save_attention`` and reads maps and their gradients."""
    for model in pair:
        model.eval()
    maps = []
    for model in pair:
        attention = model.text_encoder.base_model.base_model.encoder.layer[1].crossattention.self
        attention.save_attention = True
        tokens = model.tokenizer(image_batch["text_input"], padding=True, return_tensors="pt")
        embeds = model.visual_encoder.forward_features(image_batch["image"])
        out = model.text_encoder.forward_automask(tokens, embeds).last_hidden_state
        out[:, 0].sum().backward()
        maps.append((attention.get_attention_map(), attention.get_attn_gradients()))
    torch.testing.assert_close(maps[0][0], maps[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps[0][1], maps[1][1], rtol=1e-3, atol=1e-6)
