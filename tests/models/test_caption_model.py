"""The captioning model beside LAVIS's, its generation, and its odd inputs."""

from __future__ import annotations

import pytest
import torch
from lavis.models.blip_models.blip_caption import BlipCaption
from small_models import CAPTION, VIT, LavisDecoder, perturb

from lavis_uniadapter.backbone.build import build_text_decoder, build_visual_encoder
from lavis_uniadapter.checkpoints.blip_files import load_base_state_dict
from lavis_uniadapter.common.errors import ConfigError

PROMPT = "there is "
CAPTIONS = [PROMPT + "a red circle on the left", PROMPT + "a star"]


@pytest.fixture
def build(build_small):
    def build_caption_model(seed=0, **overrides):
        return build_small(CAPTION, seed=seed, **{"prompt": PROMPT, **overrides})

    return build_caption_model


@pytest.fixture
def lavis_model(build, small_med_config, monkeypatch):
    """LAVIS's model with the weights of ``build()``, on LAVIS's own decoder."""
    ours = build()
    monkeypatch.setattr(BlipCaption, "init_tokenizer", classmethod(lambda cls: ours.tokenizer))
    config = build_text_decoder(small_med_config, 32).config
    model = BlipCaption(
        build_visual_encoder("custom", 32, VIT), LavisDecoder(config), prompt=PROMPT
    )
    model.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if not k.startswith("adapters.")}
    )
    return model


@pytest.fixture
def images():
    return {"image": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


def test_adapters_at_rest_it_is_lavis_caption(build, lavis_model, images):
    samples = {**images, "text_input": CAPTIONS}
    ours = build().train()
    losses = [model(dict(samples)).loss for model in (ours, lavis_model.train())]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    for p in ours.parameters():
        p.requires_grad_(True)
    for model in (ours, lavis_model):
        model(dict(samples)).loss.backward()
    theirs = dict(lavis_model.named_parameters())
    for name, p in ours.named_parameters():
        if not name.startswith("adapters.") and theirs[name].grad is not None:
            torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_equals_lavis(build, lavis_model, images, num_beams):
    """LAVIS computes each step from the start and without a memory."""
    how = {"num_beams": num_beams, "max_length": 14, "min_length": 6, "repetition_penalty": 1.2}
    captions = [model.eval().generate(images, **how) for model in (build(), lavis_model)]
    # LAVIS cuts the prompt off the text, and a caption may begin with the end of a word.
    texts = [(PROMPT + caption).replace(" ##", "")[len(PROMPT) :] for caption in captions[0]]
    assert texts == captions[1]
    assert len(captions[0]) == 2 and all(len(c) > 3 for c in captions[0])


def test_generation_projects_the_visual_input_once(build, images):
    model = build().eval()
    key = model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    calls = []
    key.register_forward_hook(lambda module, args, out: calls.append(tuple(args[0].shape)))
    model.generate(images, num_beams=3, max_length=12, min_length=10)
    assert calls == [(2, 5, 32)]


def test_earlier_tokens_are_not_computed_again(build, images):
    model = build().eval()
    lengths = []
    model.text_decoder.bert.encoder.layer[0].register_forward_hook(
        lambda module, args, out: lengths.append(args[0].shape[1])
    )
    model.generate(images, num_beams=2, max_length=12, min_length=10)
    assert lengths[0] == model.prompt_length and set(lengths[1:]) == {1}


def test_video_captions_depend_on_every_frame(build):
    model = build().eval()
    perturb(model.adapters)
    video = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        loss = model({"video": video, "text_input": CAPTIONS[:1]}).loss
        for frame in range(4):
            other = video.clone()
            other[:, :, frame] += 1
            assert model({"video": other, "text_input": CAPTIONS[:1]}).loss != loss
    assert len(model.generate({"video": video}, max_length=10, min_length=5)) == 1


def test_an_image_is_a_video_of_one_frame(build, images):
    model = build().eval()
    perturb(model.adapters)
    video = {"video": images["image"][:, :, None]}
    assert model.generate(images) == model.generate(video)


def test_adapters_change_what_is_generated_and_can_be_switched_off(build, images):
    model = build().eval()
    before = model.generate(images)
    perturb(model.adapters, by=1.0)
    assert model.generate(images) != before
    with model.disable_adapter():
        assert model.generate(images) == before


def test_best_captions_of_one_search(build, images):
    model = build().eval()
    captions = model.generate(images, num_beams=4, num_captions=3, max_length=12, min_length=4)
    assert len(captions) == 6
    for i in (0, 1):
        of_one = captions[3 * i : 3 * i + 3]
        assert len(set(of_one)) > 1
        assert of_one[0] == model.generate(images, num_beams=4, max_length=12, min_length=4)[i]
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(images, num_beams=2, num_captions=3)


def test_nucleus_sampling_draws(build, images):
    model = build().eval()
    torch.manual_seed(0)
    how = {"use_nucleus_sampling": True, "top_p": 0.95, "num_captions": 4, "max_length": 12}
    captions = model.generate(images, **how)
    assert len(captions) == 8 and len(set(captions)) > 4
    torch.manual_seed(0)
    assert model.generate(images, **how) == captions
    narrow = model.generate(images, **{**how, "top_p": 1e-3, "min_length": 4})
    assert len(set(narrow[:4])) == len(set(narrow[4:])) == 1


def test_the_batch_does_not_matter(build, images):
    model = build().eval()
    perturb(model.adapters)
    alone = [model.generate({"image": images["image"][i : i + 1]})[0] for i in (0, 1)]
    assert model.generate(images) == alone


def test_trained_parameters_get_gradients_and_no_others(build, images):
    model = build().train()
    perturb(model.adapters)
    model({**images, "text_input": CAPTIONS}).loss.backward()
    trained = model.trainable_parameters()
    assert any("key_value.text_decoder" in name for name in trained)
    for name, p in model.named_parameters():
        if name in trained:
            assert p.grad is not None and p.grad.abs().max() > 0, name
        else:
            assert p.grad is None, name


def test_save_and_load_under_another_seed(build, images, tmp_path):
    model, other = build(0), build(1)
    perturb(model.adapters, by=0.5)
    model.save_adapter(tmp_path / "adapter")
    load_base_state_dict(other, model.state_dict(), "the same BLIP", ())
    other.base_changed("the same BLIP")
    samples = {**images, "text_input": CAPTIONS}
    losses = [m.eval()(samples).loss.item() for m in (model, other)]
    other.load_adapter(tmp_path / "adapter")
    assert losses[0] != losses[1]
    assert other(samples).loss.item() == losses[0]


def test_the_prompt_is_not_learnt(build, images):
    model = build().eval()
    with torch.no_grad():
        labels = model({**images, "text_input": CAPTIONS}).intermediate_output.decoder_labels
    assert model.prompt_length == 3  # [DEC] there is
    assert (labels[:, :3] == -100).all() and (labels[:, 3] != -100).all()
    with pytest.raises(ValueError, match="does not begin with the model's prompt"):
        model({**images, "text_input": ["a star", "a red circle"]})


def test_no_prompt_at_all(build, images):
    model = build(prompt="").eval()
    assert torch.isfinite(model({**images, "text_input": ["a star", "a red circle"]}).loss)
    assert len(model.generate(images)) == 2


@pytest.mark.parametrize(
    "overrides, expected",
    [
        ({"adapter": {"frame_aware": True}}, "frame_aware"),
        ({"prompt": 3}, "model.prompt"),
        ({"promt": "x"}, "Did you mean 'prompt'"),
    ],
)
def test_what_it_cannot_do_is_refused(build, overrides, expected):
    with pytest.raises(ConfigError, match=expected):
        build(**overrides)


def test_visual_encoder_wider_than_the_decoder(build):
    """As ViT-L is wider than BERT base."""
    model = build(vit={"width": 48})
    assert model.text_decoder.config.encoder_width == 48
    model({"image": torch.randn(1, 3, 32, 32), "text_input": CAPTIONS[:1]}).loss.backward()
    assert all(p.grad is not None for p in model.trainable_parameters().values())
