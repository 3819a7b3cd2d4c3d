"""Several adapters on one backbone, and the momentum average of the one that trains."""

from __future__ import annotations

import pytest
import torch
from small_models import (
    RETRIEVAL,
    WORDS,
    assert_differ,
    assert_same,
    behaviour,
    outputs,
    perturb,
)


def test_random_switches(build_small, tmp_path):
    model = build_small(RETRIEVAL).eval()
    expected = {}
    for seed, name in enumerate(("coco", "flickr")):
        perturb(model.adapters["default"], seed)
        model.save_adapter(tmp_path / name)
        model.load_adapter(tmp_path / name, name=name)
        expected[name] = behaviour(model)
        model.set_adapter("default")
    assert_differ(expected["coco"], expected["flickr"])
    texts = model.tokenize(WORDS)
    features = {}
    with torch.no_grad():
        for name in expected:
            model.set_adapter(name)
            features[name] = model.encode_text(texts).feat
        generator = torch.Generator().manual_seed(0)
        for _ in range(200):
            name = ("coco", "flickr")[int(torch.randint(2, (1,), generator=generator))]
            model.set_adapter(name)
            if torch.rand(1, generator=generator) < 0.1:
                with pytest.raises(ZeroDivisionError), model.disable_adapter():
                    raise ZeroDivisionError
            assert torch.equal(model.encode_text(texts).feat, features[name])
    for name in expected:
        model.set_adapter(name)
        assert_same(expected[name], behaviour(model))


def test_deleting_an_adapter_frees_it(build_model, tmp_path):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    before = sum(p.numel() for p in model.parameters())
    own = sum(p.numel() for p in model.adapters["default"].parameters())
    model.load_adapter(tmp_path / "adapter", name="flickr")
    assert sum(p.numel() for p in model.parameters()) == before + own
    with pytest.raises(ValueError, match="active"):
        model.delete_adapter("flickr")
    model.set_adapter("default")
    model.delete_adapter("flickr")
    assert sum(p.numel() for p in model.parameters()) == before
    for verb in (model.delete_adapter, model.set_adapter):
        with pytest.raises(KeyError, match="flickr"):
            verb("flickr")
    with pytest.raises(ValueError, match="trains"):
        model.delete_adapter("default")


@pytest.mark.parametrize("name", ["a.b", "layer", ""])
def test_names_that_cannot_be_keys_are_refused(build_model, tmp_path, name):
    model = build_model()
    model.save_adapter(tmp_path / "adapter")
    with pytest.raises(KeyError):
        model.load_adapter(tmp_path / "adapter", name=name)


def test_another_adapter_leaves_training_state_alone(build_model, video_batch, tmp_path):
    model = build_model().train()
    model.save_adapter(tmp_path / "other")
    perturb(model.adapters)
    model.momentum_average.update()
    before = {k: v.clone() for k, v in model.momentum_average.state_dict().items()}
    model.load_adapter(tmp_path / "other", name="other")
    assert_same(before, model.momentum_average.state_dict())
    with pytest.raises(ValueError, match="is 'other', not the one that trains"):
        model(video_batch)
    model.set_adapter("default")
    model(video_batch).loss.backward()


def test_checkpoint_with_another_queue_length_loads_for_evaluation(build_model, tmp_path):
    model, other = build_model(seed=0, queue_size=12), build_model(seed=0, queue_size=8)
    perturb(model.adapters)
    torch.save({"model": model.state_dict()}, tmp_path / "run.pth")
    other.load_checkpoint(str(tmp_path / "run.pth"))
    assert_same(behaviour(model), behaviour(other))


def test_momentum_needs_no_second_backbone(build_model):
    model = build_model(tuning="uniadapter")
    averaged = sum(b.numel() for b in model.momentum_average.buffers())
    assert averaged < model.parameter_counts()["trainable"]
    assert not hasattr(model, "visual_encoder_m")


def test_features_under_momentum_are_the_averages(build_model, video_batch):
    model = build_model().eval()
    online = outputs(model, video_batch)
    perturb(model.adapters)
    moved = outputs(model, video_batch)
    with model.momentum_average.swapped_in():
        under_momentum = outputs(model, video_batch)
    assert torch.equal(under_momentum["visual embeds"], online["visual embeds"])
    assert not torch.allclose(moved["visual embeds"], online["visual embeds"])
    assert_same(moved, outputs(model, video_batch))
