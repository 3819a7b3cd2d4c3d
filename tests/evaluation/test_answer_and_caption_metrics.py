"""Scores of answers and captions."""

from __future__ import annotations

import os

import pytest
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from lavis_uniadapter.evaluation import caption_metrics as module
from lavis_uniadapter.evaluation.answer_metrics import (
    answer_metrics,
    majority_answers,
    normalise_answer,
    question_type,
)
from lavis_uniadapter.evaluation.caption_metrics import (
    caption_metrics,
    has_java,
    tokenise,
    tokenise_by_java,
)

needs_java = pytest.mark.skipif(not has_java(), reason="COCO's tokenizer and METEOR need Java")

# Sentences as annotators write them.
SENTENCES = [
    "A man's dog doesn't like the T-shirt, does it?",
    "two people (a man and a woman) are talking; they're sitting.",
    "Someone is making a well-known dish: pasta!",
    "a 3.5 litre car and 1,000 other things",
    "the   player\tscores\n a goal",
    "I'd say we've seen it... they'll come",
    'the "best" player -- of the year',
    "",
]


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is it?", "what"),
        ("  who is there", "who"),
        ("how many", "how"),
        ("where?", "where"),
        ("when does it end", "when"),
        ("what's that", "what"),
        ("is it red?", "other"),
        ("whatever it is", "other"),
        ("", "other"),
    ],
)
def test_question_types(question, expected):
    assert question_type(question) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("T-Shirt", "t - shirt", True),
        ("new  york", "New York", True),
        ("ice cream", "icecream", False),
        ("o'clock", "o ' clock", True),
        ("red", "red car", False),
        ("Café", "cafe", True),
    ],
)
def test_normalised_answers(one, other, same):
    assert (normalise_answer(one) == normalise_answer(other)) == same


def test_accuracy_counts_every_question():
    items = [
        {"question": question, "answer": answer, "prediction": prediction}
        for question, answer, prediction in (
            ("what is it?", "dog", "dog"),
            ("what is it?", "zebra", "dog"),  # no answer of the vocabulary
            ("who is it?", "man", "woman"),
            ("is it?", "yes", "yes"),
            ("what?", "okapi", "okapi"),  # generated, and no answer of the vocabulary
        )
    ]
    metrics = answer_metrics(items, ["dog", "man", "woman", "yes"])
    assert metrics == {
        "accuracy": 60.0,
        "accuracy_what": pytest.approx(200 / 3),
        "accuracy_who": 0.0,
        "accuracy_other": 100.0,
        "unknown_answers": 40.0,
    }


def test_majority_answers_by_kind_of_question():
    training = [("what is it?", "dog"), ("What?", "dog"), ("what?", "cat")]
    training += [("where?", "left"), ("is it?", "yes")] + [("how many?", "two")] * 3
    asked = ["what is that?", "where is it?", "does it?", "who is it?"]
    assert majority_answers(training, asked) == ["dog", "left", "yes", "two"]


@needs_java
def test_own_tokenizer_splits_as_cocos():
    assert tokenise(SENTENCES) == tokenise_by_java(SENTENCES)


@needs_java
def test_cocos_tokenizer_as_its_own_wrapper_calls_it():
    expected = PTBTokenizer().tokenize({i: [{"caption": s}] for i, s in enumerate(SENTENCES)})
    assert tokenise_by_java(SENTENCES) == [expected[i][0] for i in range(len(SENTENCES))]


@needs_java
def test_white_space_of_any_kind_breaks_no_line():
    texts = ["one\u2028two", "three\x0bfour\r\nfive", "", "café"]
    assert tokenise_by_java(texts) == ["one two", "three four five", "", "café"]


def test_own_tokenizer():
    assert tokenise(["A man's dog doesn't bark!"]) == ["a man 's dog does n't bark"]


def test_perfect_and_wrong_captions(monkeypatch):
    monkeypatch.setattr(module, "has_java", lambda: False)  # METEOR takes seconds to start
    truths = [["a dog runs in the park", "the dog runs"], ["two men play a game of chess"]]
    perfect = caption_metrics([texts[0] for texts in truths], truths)
    wrong = caption_metrics(["something else entirely", "nothing"], truths)
    for name, value in perfect.items():
        assert value > 99 or name == "cider", name
        assert wrong[name] < 5, name
    assert perfect["cider"] > 300


@needs_java
def test_without_java_the_scores_are_close_and_meteor_is_left_out(monkeypatch, caplog):
    captions = ["a man's dog doesn't run", "two people are talking"]
    truths = [["the man's dog doesn't run fast"], [SENTENCES[1], "people talk"]]
    with_java = caption_metrics(captions, truths)
    monkeypatch.setattr(module, "has_java", lambda: False)
    with caplog.at_level("WARNING"):
        without = caption_metrics(captions, truths)
    assert "Java is not installed" in caplog.text
    assert set(with_java) - set(without) == {"meteor"}
    for name, value in without.items():
        assert value == pytest.approx(with_java[name], abs=0.5), name


def test_no_java_at_all(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not has_java()
    metrics = caption_metrics(["a dog"], [["a dog"]])
    assert set(metrics) == set(module.METRICS) - {"meteor"}


def put_java_first(monkeypatch, tmp_path, script):
    java = tmp_path / "java"
    java.write_text(f"#!/bin/sh\n{script}\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")


def test_java_that_does_not_run_counts_as_none(monkeypatch, tmp_path):
    put_java_first(monkeypatch, tmp_path, "exit 1")
    assert not has_java()
    assert "meteor" not in caption_metrics(["a dog"], [["a dog"]])


def test_java_that_fails_later_is_named(monkeypatch, tmp_path):
    put_java_first(monkeypatch, tmp_path, '[ "$1" = -version ]')
    assert has_java()
    with pytest.raises(RuntimeError, match="java -version"):
        caption_metrics(["a dog", "a cat"], [["a dog"], ["a cat"]])
