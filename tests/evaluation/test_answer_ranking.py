"""Ranked answers against the same decoded whole, one by one, as LAVIS does."""

from __future__ import annotations

import pytest
import torch
from small_models import VQA, batch, perturb

from lavis_uniadapter.evaluation import answer_ranking
from lavis_uniadapter.evaluation.answer_ranking import rank_answers, tokenise_answers
from lavis_uniadapter.models import vqa

ANSWERS = [
    *("red", "blue", "a green star", "left", "square", "top", "red circle", "red square"),
    *("a", "a small blue cross at the bottom", "xyz", "red", "there", "the left"),
]


@pytest.fixture
def model(build_small):
    model = build_small(VQA).eval()
    perturb(model, by=0.1)
    return model


@pytest.fixture
def samples():
    return {key: batch(VQA)[key] for key in ("video", "text_input")}


@torch.no_grad()
def scores_one_by_one(model, samples, answers):
    """(questions, answers) minus the loss of each answer decoded alone."""
    encoder_output, _ = model.forward_encoder(samples)
    mask = samples["tokenized_text"].attention_mask
    rows = []
    for question in range(len(samples["text_input"])):
        losses = []
        for answer in answers:
            ids = model.tokenizer([answer], return_tensors="pt").input_ids
            ids[:, 0] = model.tokenizer.bos_token_id
            losses.append(
                model.text_decoder(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    encoder_hidden_states=encoder_output.last_hidden_state[question][None],
                    encoder_attention_mask=mask[question][None],
                    labels=ids,
                    return_dict=True,
                    reduction="none",
                ).loss
            )
        rows.append(-torch.cat(losses))
    return torch.stack(rows)


def ranked(model, samples, answers, k):
    candidates = tokenise_answers(answers, model.tokenizer)
    with torch.no_grad():
        memory = model._question_memory(samples)
    return rank_answers(model.text_decoder, memory, candidates, model.tokenizer.bos_token_id, k)


@pytest.mark.parametrize("positions_at_once", [1, 3, 1024])
def test_scores_equal_those_of_whole_answers(model, samples, monkeypatch, positions_at_once):
    monkeypatch.setattr(answer_ranking, "POSITIONS_AT_ONCE", positions_at_once)
    expected = scores_one_by_one(model, dict(samples), ANSWERS)
    scores, chosen = ranked(model, dict(samples), ANSWERS, len(ANSWERS))
    assert all(sorted(row.tolist()) == list(range(len(ANSWERS))) for row in chosen)
    torch.testing.assert_close(scores, expected.gather(1, chosen), rtol=1e-5, atol=1e-4)
    assert expected.std(dim=1).min() > 1e-2


@pytest.mark.parametrize("k", [1, 5])
def test_the_likeliest_first_tokens_are_scored(model, samples, k):
    expected = scores_one_by_one(model, dict(samples), ANSWERS)
    scores, chosen = ranked(model, dict(samples), ANSWERS, k)
    assert scores.shape == chosen.shape == (2, k)
    torch.testing.assert_close(scores, expected.gather(1, chosen), rtol=1e-5, atol=1e-4)


def test_bf16_makes_no_ties(model, samples):
    answers = [
        f"{size} {colour} {shape}"
        for size in ("small", "large")
        for colour in ("red", "green", "blue", "yellow")
        for shape in ("circle", "square", "star", "cross")
    ]
    exact, _ = ranked(model, dict(samples), answers, len(answers))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse, _ = ranked(model, dict(samples), answers, len(answers))
    assert coarse.dtype == torch.float32 and not torch.equal(coarse, exact)
    assert len(exact.unique()) == len(coarse.unique()) == exact.numel()


def test_bf16_takes_the_likeliest_first_tokens(model, samples):
    """First tokens whose scores bfloat16 cannot tell apart are still told apart."""
    first = "red green blue yellow cyan circle square star cross left right top bottom".split()
    decoder = model.text_decoder
    word_of = {model.tokenizer.convert_tokens_to_ids(word): i for i, word in enumerate(first)}
    with torch.no_grad():
        output = decoder.cls.predictions.decoder
        output.weight.zero_()
        for token, i in word_of.items():
            output.bias[token] = 10 + i / 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, chosen = ranked(model, dict(samples), first, len(first))
    assert chosen.tolist() == [list(reversed(range(len(first))))] * 2


def test_equal_answers_tie(model, samples):
    answers = ["red", "red", "red"]
    scores, chosen = ranked(model, dict(samples), answers, 3)
    # a matrix product may round its rows apart
    torch.testing.assert_close(scores, scores[:, :1].expand_as(scores), rtol=1e-6, atol=0)
    assert model.predict_answers(dict(samples), answer_list=answers) == ["red", "red"]


def test_a_list_of_one(model, samples):
    assert model.predict_answers(dict(samples), answer_list=["top"]) == ["top", "top"]


def test_the_question_is_projected_once_and_the_first_position_decoded_once(model, samples):
    layer = model.text_decoder.bert.encoder.layer[0]
    projected, decoded = [], []
    layer.crossattention.self.key.register_forward_hook(
        lambda module, args, out: projected.append(args[0].shape[0])
    )
    layer.register_forward_hook(lambda module, args, out: decoded.append(tuple(args[0].shape[:2])))
    model.predict_answers(dict(samples), answer_list=["red", "blue", "a green star"])
    assert projected == [2]  # the two questions
    # one position a question, then one of each short answer and three of each long one
    assert decoded == [(2, 1), (4, 1), (2, 3)]


def test_the_answer_list_is_tokenised_once(model, samples, monkeypatch):
    calls = []
    monkeypatch.setattr(
        vqa, "tokenise_answers", lambda *args: calls.append(1) or tokenise_answers(*args)
    )
    for _ in range(3):
        model.predict_answers(dict(samples), answer_list=list(ANSWERS))
    assert len(calls) == 1
    model.predict_answers(dict(samples), answer_list=ANSWERS[:3])
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("answers", "expected"), [([], "answer_list is empty"), (["red", ""], "has no token")]
)
def test_what_cannot_be_ranked_is_named(model, samples, answers, expected):
    with pytest.raises(ValueError, match=expected):
        model.predict_answers(dict(samples), answer_list=answers)
