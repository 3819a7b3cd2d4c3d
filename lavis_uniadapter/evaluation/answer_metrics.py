"""Accuracy of open-ended answers, overall and by the kind of question."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence

# The first words by which MSRVTT-QA and MSVD-QA tell their questions apart.
QUESTION_TYPES = ("what", "who", "how", "where", "when")
OTHER = "other"


def question_type(question: str) -> str:
    """The question's first word, if it is one of QUESTION_TYPES, or "other"."""
    words = re.findall(r"[^\W\d_]+", question.lower())
    return words[0] if words and words[0] in QUESTION_TYPES else OTHER


def normalise_answer(answer: str) -> str:
    """An answer without what BERT's tokenizer takes away: case, accents, spaces at punctuation."""
    letters = unicodedata.normalize("NFD", answer.lower())
    plain = "".join(c for c in letters if unicodedata.category(c) != "Mn")
    return re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(plain.split()))


def is_correct(item: Mapping[str, str]) -> bool:
    """Whether ``prediction`` is ``answer``, as far as a model can tell."""
    return normalise_answer(item["prediction"]) == normalise_answer(item["answer"])


def answer_metrics(
    items: Sequence[Mapping[str, str]], vocabulary: Collection[str]
) -> dict[str, float]:
    """Exact-match accuracy in percent.

    Args:
        items: at least one, each with ``question``, ``answer`` and ``prediction``.
        vocabulary: the answers that ranking chooses from.

    Returns:
        ``accuracy``; ``accuracy_what`` and so on for each kind of question that there is; and
        ``unknown_answers``, the share of questions whose answer the vocabulary lacks. They count
        as any other question: ranking has them wrong.
    """
    by_type: dict[str, list[bool]] = defaultdict(list)
    for item in items:
        by_type[question_type(item["question"])].append(is_correct(item))
    known = {normalise_answer(answer) for answer in vocabulary}
    unknown = [normalise_answer(item["answer"]) not in known for item in items]
    metrics = {"accuracy": _percent([right for kind in by_type.values() for right in kind])}
    for kind in (*QUESTION_TYPES, OTHER):
        if kind in by_type:
            metrics[f"accuracy_{kind}"] = _percent(by_type[kind])
    return {**metrics, "unknown_answers": _percent(unknown)}


def _percent(outcomes: Sequence[bool]) -> float:
    return 100 * sum(outcomes) / len(outcomes)


def majority_answers(training: Sequence[tuple[str, str]], questions: Sequence[str]) -> list[str]:
    """What a model says that knows only how often answers occur, and sees nothing.

    Args:
        training: (question, answer) pairs, at least one.
        questions: to be answered.

    Returns:
        For each question the most frequent training answer to its kind of question, or of all if
        its kind was never asked.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    for question, answer in training:
        counts[question_type(question)][answer] += 1
    overall = sum(counts.values(), Counter())
    kinds = map(question_type, questions)
    return [(counts[kind] if kind in counts else overall).most_common(1)[0][0] for kind in kinds]
