"""Accuracy of open-ended answers, overall and by type of question."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

# The first words by which MSRVTT-QA and MSVD-QA classify their questions; all others are "other".
QUESTION_TYPES = ("what", "who", "how", "where", "when", "other")
METRICS = ("accuracy", *(f"accuracy_{kind}" for kind in QUESTION_TYPES))


def question_type(question: str) -> str:
    """The first word of a question if it is one of QUESTION_TYPES, else "other"."""
    words = re.findall(r"[^\W\d_]+", question.lower())
    return words[0] if words and words[0] in QUESTION_TYPES else "other"


def normalise_answer(answer: str) -> str:
    """An answer without what BERT's tokenizer removes: case, accents, spaces at punctuation."""
    letters = unicodedata.normalize("NFD", answer.lower())
    plain = "".join(c for c in letters if unicodedata.category(c) != "Mn")
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(plain.split()))


def is_correct(item: Mapping[str, str]) -> bool:
    """Whether ``prediction`` equals ``answer`` after normalisation."""
    return normalise_answer(item["prediction"]) == normalise_answer(item["answer"])


def answer_metrics(
    items: Sequence[Mapping[str, str]], vocabulary: Collection[str]
) -> dict[str, float]:
    """Exact-match accuracy in percent.

    Args:
        items: at least one, each with ``question``, ``answer`` and ``prediction``.
        vocabulary: the answers that ranking chooses from.

    Returns:
        ``accuracy``; ``accuracy_what`` and so on for each type of question that occurs; and
        ``unknown_answers``, the share of answers outside the vocabulary, which ranking gets wrong.
    """
    by_type: dict[str, list[bool]] = {kind: [] for kind in QUESTION_TYPES}
    for item in items:
        by_type[question_type(item["question"])].append(is_correct(item))
    known = {normalise_answer(answer) for answer in vocabulary}
    unknown = [normalise_answer(item["answer"]) not in known for item in items]
    return {
        "accuracy": _percent(sum(by_type.values(), [])),
        **{f"accuracy_{kind}": _percent(right) for kind, right in by_type.items() if right},
        "unknown_answers": _percent(unknown),
    }


def _percent(outcomes: Sequence[bool]) -> float:
    return fmean(100.0 * outcome for outcome in outcomes)


def majority_answers(training: Sequence[tuple[str, str]], questions: Sequence[str]) -> list[str]:
    """The answer most frequent for each question's type in (question, answer) pairs, or overall."""
    counts: dict[str, Counter] = defaultdict(Counter)
    for question, answer in training:
        counts[question_type(question)][answer] += 1
    overall = sum(counts.values(), Counter())
    kinds = map(question_type, questions)
    return [counts.get(kind, overall).most_common(1)[0][0] for kind in kinds]
