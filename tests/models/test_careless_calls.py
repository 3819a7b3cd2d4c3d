"""Calls of the models' methods with what does not fit together: an error, never a wrong number."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import (
    CAPTION,
    MODELS,
    RETRIEVAL,
    VQA,
    WORDS,
    assert_differ,
    assert_same,
    batch,
    behaviour,
    four_videos,
    outputs,
    perturb,
)

VIDEO = torch.randn(2, 3, 2, 32, 32, generator=torch.Generator().manual_seed(3))
QUESTIONS = {"video": VIDEO, "text_input": WORDS}
ANSWERS = ["red", "left"]


@pytest.fixture(scope="module")
def model(build_small, tmp_path_factory):
    """A retrieval model with a second adapter, "other", whose weights differ."""
    built = build_small(RETRIEVAL).eval()
    folder = tmp_path_factory.mktemp("adapter") / "other"
    built.save_adapter(folder)
    built.load_adapter(folder, name="other")
    perturb(built.adapters["other"])
    built.set_adapter("default")
    return built


@pytest.fixture(scope="module")
def answering(build_small):
    return build_small(VQA).eval()


@pytest.fixture(scope="module")
def captioning(build_small):
    return build_small(CAPTION).eval()


@pytest.fixture(autouse=True)
def the_default_adapter(model):
    yield
    model.eval().set_adapter("default")


# --- features of different adapters -------------------------------------------------------------


def use_the_other(model):
    model.set_adapter("other")


def change_the_weights(model):
    with torch.no_grad():
        next(model.adapters["default"].layer_parameters()).add_(0.01)


def train_mode(model):
    model.train()


@pytest.mark.parametrize("change", [use_the_other, change_the_weights, train_mode])
@torch.no_grad()
def test_features_of_two_adapters_do_not_match(model, change):
    visuals, texts = model.encode_visual(VIDEO), model.encode_text(WORDS)
    match = model.matcher(visuals)
    expected = model.match(texts, visuals)
    change(model)
    for combine in (
        lambda: model.match(texts, visuals),
        lambda: model.match(model.encode_text(WORDS), visuals),
        lambda: model.match(texts, model.encode_visual(VIDEO)),
        lambda: match(texts, torch.arange(2)),
    ):
        with pytest.raises(ValueError, match="another adapter than the active one"):
            combine()
    if change is not change_the_weights:
        model.eval().set_adapter("default")
        assert torch.equal(model.match(texts, visuals), expected)


@torch.no_grad()
def test_features_without_the_adapter_do_not_match_those_with_it(model):
    visuals = model.encode_visual(VIDEO)
    with model.disable_adapter():
        texts = model.encode_text(WORDS)
        with pytest.raises(ValueError, match="another adapter than the active one"):
            model.match(texts, visuals)
        model.match(texts, model.encode_visual(VIDEO))


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_features_before_a_training_step_do_not_match(build_small, mode, fused):
    model = build_small(RETRIEVAL).train()
    optimizer = torch.optim.AdamW(model.trainable_parameters().values(), fused=fused)
    model(batch(RETRIEVAL)).loss.backward()
    model.train(mode)
    visuals = model.encode_visual(VIDEO)
    model.match(model.encode_text(WORDS), visuals)
    optimizer.step()
    with pytest.raises(ValueError, match="weights changed"):
        model.match(model.encode_text(WORDS), visuals)


@torch.no_grad()
def test_features_before_weights_are_assigned_do_not_match(build_small):
    model = build_small(RETRIEVAL).eval()
    for seed in range(3):  # assigned tensors are new, and their versions all equal
        state = {name: value.clone() for name, value in model.state_dict().items()}
        state["adapters.default.heads.text_proj.bias"] += 1 + seed
        visuals = model.encode_visual(VIDEO)
        model.load_state_dict(state, assign=True)
        with pytest.raises(ValueError, match="weights changed"):
            model.match(model.encode_text(WORDS), visuals)


@torch.no_grad()
def test_features_match_under_an_equal_adapter_of_another_process(model):
    """As when a gallery is encoded once and its features are kept in a file."""
    kept = pickle.loads(pickle.dumps(model.encode_visual(VIDEO)))
    same, different = copy.deepcopy(model), copy.deepcopy(model)
    perturb(different.adapters)
    logits = model.match(model.encode_text(WORDS), kept)
    assert torch.equal(same.match(same.encode_text(WORDS), kept), logits)
    with pytest.raises(ValueError, match="weights changed"):
        different.match(different.encode_text(WORDS), kept)


# --- arguments that do not fit ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "index", "error", "message"),
    [
        (["red"], None, ValueError, "texts 1, visuals 2"),
        (["red"], [0, 1], ValueError, "texts 1, visual_index 2"),
        (WORDS, [0, 2], ValueError, "from 0 to 1"),
        (WORDS, [0, -1], ValueError, "from 0 to 1"),
        (WORDS, [0.0, 1.0], TypeError, "visual_index"),
        (WORDS, [True, False], TypeError, "visual_index"),
        (WORDS, [[0], [1]], TypeError, "visual_index"),
    ],
)
@torch.no_grad()
def test_matching_needs_a_visual_input_for_each_text(model, texts, index, error, message):
    encoded, visuals = model.encode_text(texts), model.encode_visual(VIDEO)
    with pytest.raises(error, match=message):
        model.match(encoded, visuals, index)
    both = model.match(model.encode_text(WORDS), visuals)
    swapped = model.match(model.encode_text(WORDS), visuals[[1, 0]], [1, 0])
    torch.testing.assert_close(swapped, both)


@torch.no_grad()
def test_matching_names_what_is_no_features(model):
    texts, visuals = model.encode_text(WORDS), model.encode_visual(VIDEO)
    for arguments, name in (((WORDS, visuals), "texts"), ((texts, VIDEO), "visuals")):
        with pytest.raises(TypeError, match=f"^{name} must be"):
            model.match(*arguments)
    with pytest.raises(TypeError, match="texts must be the TextFeatures"):
        model.match(visuals, texts)


@pytest.mark.parametrize(
    ("samples", "error", "message"),
    [
        ({}, ValueError, "either 'image' or 'video'"),
        ({"image": VIDEO[:, :, 0], "video": VIDEO}, ValueError, "either 'image' or 'video'"),
        ({"video": torch.randn(3, 3, 32, 32)}, ValueError, r"frames, H, W\); got \(3, 3, 32, 32"),
        ({"image": torch.randn(2, 4, 32, 32)}, ValueError, "image.*got"),
        (torch.randn(3, 32, 32), ValueError, "samples must have the shape"),
        (VIDEO[:0], ValueError, "samples must have the shape"),
        (VIDEO[:, :, :0], ValueError, "samples must have the shape"),
        (torch.randn(1, 3, 48, 48), ValueError, "32 x 32 pixels; got 48 x 48"),
        ({"image": Image.new("RGB", (32, 32))}, TypeError, r"samples\['image'\].*got Image"),
        (VIDEO.numpy(), TypeError, "samples .*got ndarray"),
        (None, TypeError, "samples .*got NoneType"),
        ((VIDEO * 50).to(torch.uint8), TypeError, "samples .*got torch.uint8"),
    ],
)
def test_wrong_visual_input_is_named(model, captioning, samples, error, message):
    for method in (model.encode_visual, captioning.generate):
        with pytest.raises(error, match=message):
            method(samples)


@torch.no_grad()
def test_any_floating_point_input_fits_any_precision(model):
    expected = model.encode_visual(VIDEO).feat
    torch.testing.assert_close(model.encode_visual(VIDEO.double()).feat, expected)
    half = copy.deepcopy(model).half()
    logits = half.match(half.encode_text(WORDS), half.encode_visual(VIDEO))
    assert logits.dtype == torch.float16 and logits.isfinite().all()


@pytest.mark.parametrize(
    ("texts", "error"),
    [
        ([], ValueError),
        (None, TypeError),
        (5, TypeError),
        ([None, "red"], TypeError),
        ([("red", "blue")], TypeError),
        ({"text_input": WORDS}, TypeError),
        (set(WORDS), TypeError),
        (b"red", TypeError),
    ],
)
def test_texts_are_strings(model, answering, texts, error):
    with pytest.raises(error, match="^texts "):
        model.encode_text(texts)
    with pytest.raises(error, match="^answer_list "):
        answering.predict_answers(QUESTIONS, answer_list=texts)
    with pytest.raises(error, match=r"^samples\['text_input'\]"):
        answering.predict_answers({"video": VIDEO, "text_input": texts}, answer_list=ANSWERS)


@torch.no_grad()
def test_one_text_and_arrays_of_texts_are_fine(model, answering):
    one = model.encode_text("red").feat
    assert torch.equal(model.encode_text(["red"]).feat, one) and len(one) == 1
    expected = answering.predict_answers(QUESTIONS, answer_list=ANSWERS)
    for answers in (tuple(ANSWERS), np.array(ANSWERS), iter(ANSWERS)):
        assert answering.predict_answers(QUESTIONS, answer_list=answers) == expected


@pytest.mark.parametrize("answers", ["red", None])
def test_a_list_of_answers_is_a_list(answering, answers):
    with pytest.raises(TypeError, match="answer_list must be a list"):
        answering.predict_answers(QUESTIONS, answer_list=answers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_ans_candidates": 0}, "num_ans_candidates is 0"),
        ({"inference_method": "ranking"}, "Did you mean 'rank'"),
        ({"num_candidates": 3}, "num_candidates"),
        ({"inference_method": "generate", "num_beams": 0}, "num_beams is 0"),
        ({"inference_method": "generate", "max_len": 2, "min_len": 3}, "min_len 3 exceeds"),
        ({"inference_method": "generate", "max_len": 900}, "1 to 900 tokens"),
    ],
)
def test_wrong_options_of_answering_are_named(answering, options, message):
    with pytest.raises(ValueError, match=message):
        answering.predict_answers(QUESTIONS, answer_list=ANSWERS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_captions": 0}, "0 texts .* num_beams 3"),
        ({"num_captions": 4}, "4 texts .* num_beams 3"),
        ({"num_beams": 0}, "1 texts .* num_beams 0"),
        ({"max_length": 5}, "10 to 5 tokens"),
        ({"max_length": 900}, "10 to 900 tokens"),
    ],
)
def test_wrong_options_of_captioning_are_named(captioning, options, message):
    with pytest.raises(ValueError, match=message):
        captioning.generate({"video": VIDEO}, **options)


@pytest.mark.parametrize(
    ("arch", "key", "value", "message"),
    [
        (RETRIEVAL, "text_input", ["red"], "text_input 1, visual 2"),
        (RETRIEVAL, "text_input", "ab", "text_input 1, visual 2"),
        (RETRIEVAL, "image_id", torch.arange(3), "image_id 3"),
        (VQA, "text_input", ["red"], "text_input 1, visual 2"),
        (VQA, "answer", "red", "answer 1, weight 3"),
        (VQA, "weight", torch.ones(1), "answer 3, weight 1"),
        (VQA, "n_answers", torch.ones(3).long(), "text_input 2, n_answers 3"),
        (VQA, "n_answers", torch.ones(2).long(), "n_answers must add up"),
        (CAPTION, "text_input", ["red"], "text_input 1, visual 2"),
        (CAPTION, "text_input", "ab", "text_input 1, visual 2"),
    ],
)
def test_a_batch_has_one_of_each(model, answering, captioning, arch, key, value, message):
    chosen = dict(zip(MODELS, (model, answering, captioning), strict=True))[arch]
    with pytest.raises((ValueError, RuntimeError), match=message):
        chosen({**batch(arch), key: value})


# --- adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", [VQA, CAPTION])
def test_only_the_adapter_that_trains_can_be_trained(build_small, tmp_path, arch):
    model = build_small(arch).train()
    model.save_adapter(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", name="other")
    with pytest.raises(ValueError, match="'other', not the one that trains"):
        model(batch(arch))
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="not the one that trains"):
        model(batch(arch))
    model(batch(arch)).loss.backward()


@pytest.mark.parametrize("name", ["nothing", None, 1, ["default"]])
def test_adapters_that_do_not_exist(model, name):
    for verb in (model.set_adapter, model.delete_adapter):
        with pytest.raises(KeyError, match="No adapter is named"):
            verb(name)


@torch.no_grad()
def test_adapters_deleted_or_merged_where_they_are_disabled(build_small, tmp_path):
    model = build_small(RETRIEVAL, "lora").eval()
    perturb(model.adapters)
    expected = behaviour(model)
    model.save_adapter(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", name="other")
    with model.disable_adapter():
        plain = behaviour(model)
        with model.disable_adapter():
            model.delete_adapter("other")
    assert_same(plain, behaviour(model))
    with model.disable_adapter():
        model.set_adapter("default")
        model.merge_adapter()
    for name, value in behaviour(model).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="no active adapter"):
        model.merge_adapter()


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copied_model_is_another_model(build_small, duplicate):
    model = build_small(RETRIEVAL, vit_grad_ckpt=True, vit_ckpt_layer=1, text_ckpt_layer=1)
    videos, expected = four_videos(), behaviour(model)
    copied = duplicate(model)
    assert_same(expected, outputs(copied, videos))
    perturb(copied.adapters)
    assert_differ(expected, outputs(copied, videos))
    perturb(copied, seed=2)
    assert_same(expected, outputs(model, videos))
