"""Scores of captions and answers against each text decoded alone, by teacher forcing."""

from __future__ import annotations

import pytest
import torch
from small_models import CAPTION, VQA, batch, perturb

PROMPT = "there is "
ANSWERS = ["red", "blue", "a green star", "left", "square", "top"]


@pytest.fixture(scope="module")
def captioner(build_small):
    model = build_small(CAPTION, prompt=PROMPT).eval()
    perturb(model, by=0.1)
    return model


@pytest.fixture(scope="module")
def answerer(build_small):
    model = build_small(VQA).eval()
    perturb(model, by=0.1)
    return model


@pytest.fixture
def videos():
    return {"video": batch(CAPTION)["video"]}


@pytest.fixture
def questions():
    return {key: batch(VQA)[key] for key in ("video", "text_input")}


def mean_of_log_softmax(logits, ids, prompt_length):
    """Of one text: (1, length, words) logits, (1, length) ids."""
    likelihood = logits[0, :-1].log_softmax(dim=-1)
    of_tokens = [likelihood[i, token] for i, token in enumerate(ids[0, 1:].tolist())]
    return float(torch.stack(of_tokens[prompt_length - 1 :]).mean())


@pytest.mark.parametrize(
    "how", [{"num_beams": 3, "num_captions": 2}, {"use_nucleus_sampling": True, "num_captions": 3}]
)
def test_a_captions_score_is_the_mean_log_likelihood_of_its_tokens(captioner, videos, how):
    torch.manual_seed(0)
    scored = captioner.generate_with_scores(videos, max_length=12, min_length=5, **how)
    torch.manual_seed(0)
    assert [s.text for s in scored] == captioner.generate(
        videos, max_length=12, min_length=5, **how
    )
    assert len({s.score for s in scored}) == len({s.text for s in scored}) > 2
    for i, (caption, score) in enumerate(scored):
        of_video = i // how["num_captions"]
        one = {"video": videos["video"][of_video][None], "text_input": [PROMPT + caption]}
        with torch.no_grad():
            decoded = captioner(one).intermediate_output.decoder_output
        ids = captioner._tokens([caption]).input_ids
        expected = mean_of_log_softmax(decoded.logits, ids, captioner.prompt_length)
        assert score == pytest.approx(expected, abs=1e-4)


def test_any_captions_are_scored_and_the_input_is_encoded_once(captioner, videos):
    captions = ["a red circle", "a blue star on the left", "yellow", "nothing"]
    encoded = []
    hook = captioner.visual_encoder.patch_embed.register_forward_hook(lambda *_: encoded.append(1))
    memory = captioner.memory(videos)
    together = captioner.score_captions(memory, captions)
    alone = captioner.score_captions(memory, captions[::2])
    captioner.generate(memory)
    hook.remove()
    torch.testing.assert_close(alone, together[::2], rtol=1e-5, atol=1e-5)
    assert (together < 0).all() and len(encoded) == 1


@pytest.mark.parametrize("k", [3, 6])
def test_ranked_answers_have_the_probabilities_of_lavis_losses(answerer, questions, k):
    ranked = answerer.rank_answers(dict(questions), ANSWERS, num_ans_candidates=k)
    best = answerer.predict_answers(
        dict(questions), answer_list=ANSWERS, num_ans_candidates=k, inference_method="rank"
    )
    assert [answers[0].answer for answers in ranked] == best
    for i, answers in enumerate(ranked):
        assert len({a.answer for a in answers}) == k
        losses = torch.cat([lavis_loss(answerer, questions, i, a.answer) for a in answers])
        assert [a.score for a in answers] == pytest.approx((-losses).tolist(), abs=1e-3)
        expected = (-losses).softmax(dim=0)
        assert [a.probability for a in answers] == pytest.approx(expected.tolist(), abs=1e-4)
        assert [a.score for a in answers] == sorted((a.score for a in answers), reverse=True)


@torch.no_grad()
def lavis_loss(model, questions, number, answer):
    """The loss by which LAVIS's ``_rank_answers`` ranks."""
    one = {
        "video": questions["video"][number][None],
        "text_input": [questions["text_input"][number]],
    }
    states, _ = model.forward_encoder(one)
    ids = answer_ids(model, answer)
    return model.text_decoder(
        ids,
        encoder_hidden_states=states.last_hidden_state,
        encoder_attention_mask=one["tokenized_text"].attention_mask,
        labels=ids,
        return_dict=True,
        reduction="none",
    ).loss


def answer_ids(model, answer):
    ids = model.tokenizer([answer], return_tensors="pt").input_ids
    ids[:, 0] = model.tokenizer.bos_token_id
    return ids


def test_a_generated_answers_score_is_the_mean_log_likelihood_of_its_tokens(answerer, questions):
    how = {"num_beams": 3, "min_length": 3, "max_length": 8}
    scored = answerer.generate_with_scores(dict(questions), **how)
    assert [s.text for s in scored] == answerer._generate_answers(dict(questions), **how)
    for i, (answer, score) in enumerate(scored):
        one = {"video": questions["video"][i][None], "text_input": [questions["text_input"][i]]}
        with torch.no_grad():
            states, _ = answerer.forward_encoder(one)
            ids = answer_ids(answerer, answer)
            logits = answerer.text_decoder(
                ids,
                encoder_hidden_states=states.last_hidden_state,
                encoder_attention_mask=one["tokenized_text"].attention_mask,
                return_dict=True,
            ).logits
        assert score == pytest.approx(mean_of_log_softmax(logits, ids, 1), abs=1e-4)


@pytest.mark.parametrize("method", ["rank_answers", "generate_with_scores"])
def test_several_questions_about_one_video_encode_it_once(answerer, questions, method):
    more = {"answer_list": ANSWERS} if method == "rank_answers" else {}
    asked = ["a red circle", "a blue star on the left", "yellow"]
    one = {
        "video": questions["video"],
        "text_input": asked,
        "visual_index": torch.tensor([1, 0, 1]),
    }
    together = getattr(answerer, method)(one, **more)
    repeated = {"video": questions["video"][[1, 0, 1]], "text_input": asked}
    for several, single in zip(together, getattr(answerer, method)(repeated, **more), strict=True):
        if method == "rank_answers":
            assert [a.answer for a in several] == [a.answer for a in single]
            several, single = several[0], single[0]
        assert several[0] == single[0] and several[1] == pytest.approx(single[1], abs=1e-5)
