"""The question answering model beside LAVIS's, and its odd inputs."""

from __future__ import annotations

import pytest
import torch
from lavis.models.blip_models.blip_vqa import BlipVQA
from small_models import VIT, VQA, LavisDecoder, batch, perturb

from lavis_uniadapter.backbone.build import (
    build_text_decoder,
    build_text_encoder,
    build_visual_encoder,
)
from lavis_uniadapter.checkpoints.blip_files import load_base_state_dict
from lavis_uniadapter.common.errors import ConfigError

ANSWERS = ["red", "blue", "a green star", "left", "square", "top"]


@pytest.fixture
def build(build_small):
    """Build a small model whose adapters are at rest."""

    def build_vqa(seed=0, **adapter):
        return build_small(VQA, seed=seed, adapter={"init": "identity", **adapter})

    return build_vqa


@pytest.fixture
def questions():
    samples = batch(VQA)
    return {"image": samples.pop("video")[:, :, 0], **samples}


def test_adapters_at_rest_it_is_lavis_vqa(build, questions, monkeypatch, small_med_config):
    ours, other = build(), build(seed=5)
    theirs = lavis_model_with_the_weights_of(other, small_med_config, monkeypatch)
    assert load_base_state_dict(ours, theirs.state_dict(), "LAVIS's model", ()) == []
    for model in (ours, theirs):
        model.train()
    losses = [model(dict(questions)).loss for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)

    for model in (ours, theirs):
        model.eval()
    for k in (2, 6):
        with torch.no_grad():
            answers = [
                model.predict_answers(dict(questions), answer_list=ANSWERS, num_ans_candidates=k)
                for model in (ours, theirs)
            ]
        assert answers[0] == answers[1]


def lavis_model_with_the_weights_of(ours, med_config, monkeypatch):
    """LAVIS's model on LAVIS's own decoder."""
    monkeypatch.setattr(BlipVQA, "init_tokenizer", classmethod(lambda cls: ours.tokenizer))
    theirs = BlipVQA(
        build_visual_encoder("custom", 32, VIT),
        build_text_encoder(med_config, 32),
        LavisDecoder(build_text_decoder(med_config).config),
    )
    theirs.load_state_dict(
        {k: v for k, v in ours.state_dict().items() if not k.startswith("adapters.")}
    )
    return theirs


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generated_answers_equal_lavis(build, questions, monkeypatch, small_med_config, num_beams):
    """Questions of one length: LAVIS's answers see the padding of others."""
    ours = build().eval()
    theirs = lavis_model_with_the_weights_of(ours, small_med_config, monkeypatch)
    samples = {**questions, "text_input": ["a red circle", "a green star"]}
    how = {"inference_method": "generate", "num_beams": num_beams, "max_len": 8, "min_len": 4}
    with torch.no_grad():
        answers = [m.predict_answers(dict(samples), **how) for m in (ours, theirs.eval())]
    assert answers[0] == answers[1] and all(answers[0])


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_an_answer_does_not_depend_on_the_batch(build, questions, method):
    model = build().eval()
    perturb(model.adapters, by=0.5)
    how = {"inference_method": method, "answer_list": ANSWERS, "num_ans_candidates": 4}
    how |= {"max_len": 8, "min_len": 4}
    with torch.no_grad():
        together = model.predict_answers(dict(questions), **how)
        alone = [
            model.predict_answers(
                {"image": questions["image"][i : i + 1], "text_input": [question]}, **how
            )[0]
            for i, question in enumerate(questions["text_input"])
        ]
    assert together == alone


def test_every_trained_parameter_gets_a_gradient(build, questions):
    model = build().train()
    perturb(model.adapters)
    model(dict(questions)).loss.backward()
    for name, p in model.trainable_parameters().items():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    assert not any(p.requires_grad for p in model.text_decoder.parameters())


def test_video_differs_from_its_first_frame(build, questions):
    model = build().eval()
    video = torch.randn(2, 3, 4, 32, 32)
    with torch.no_grad():
        states = [
            model.forward_encoder({"text_input": questions["text_input"], **visual})[0]
            for visual in ({"video": video}, {"image": video[:, :, 0]})
        ]
    assert not torch.allclose(states[0].last_hidden_state, states[1].last_hidden_state)


@pytest.mark.parametrize("method", ["rank", "generate"])
def test_answers_about_video(build, method):
    model = build().eval()
    samples = {"video": torch.randn(2, 3, 3, 32, 32), "text_input": ["a star", "a red circle"]}
    with torch.no_grad():
        answers = model.predict_answers(
            samples, inference_method=method, answer_list=ANSWERS, num_ans_candidates=3, num_beams=2
        )
    assert len(answers) == 2 and all(isinstance(answer, str) for answer in answers)
    if method == "rank":
        assert set(answers) <= set(ANSWERS)
    assert "image" not in samples


def test_save_and_load_under_another_seed(build, questions, tmp_path):
    model, other = build(0), build(1)
    perturb(model.adapters)
    model.save_adapter(tmp_path / "adapter")
    load_base_state_dict(other, model.state_dict(), "the same BLIP", ())
    other.base_changed("the same BLIP")
    losses = [m.eval()(dict(questions)).loss.item() for m in (model, other)]
    other.load_adapter(tmp_path / "adapter")
    assert losses[0] != losses[1]
    assert other(dict(questions)).loss.item() == losses[0]


def test_frame_aware_attention_without_contrastive_features_is_refused(build):
    with pytest.raises(ConfigError, match="frame_aware"):
        build(frame_aware=True)
