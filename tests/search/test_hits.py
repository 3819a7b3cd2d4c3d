"""Neighbouring segments that match alike are one hit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lavis_uniadapter.search.hits import Candidate, moments
from lavis_uniadapter.search.manifest import StoredSegment
from lavis_uniadapter.search.segments import Segment

UNIT = torch.tensor([1.0, 0.0])


def candidates(scores: dict[str, list[float | None]], similarities=None) -> list[Candidate]:
    """Segments of ten seconds with their probabilities, by file; the best first."""
    found = []
    for file, probabilities in scores.items():
        for i, probability in enumerate(probabilities):
            segment = Segment(10.0 * i, 10.0 * (i + 1), (0,), (10.0 * i + 5,))
            stored = StoredSegment(len(found), file, segment, UNIT.half(), UNIT.half()[None])
            similarity = similarities[file][i] if similarities else 0.3
            found.append(Candidate(0, stored, similarity, probability, probability))
    found.sort(key=lambda candidate: candidate.order)
    return [
        Candidate(rank, c.stored, c.similarity, c.ranking, c.probability)
        for rank, c in enumerate(found)
    ]


def spans(hits) -> list[tuple]:
    return [(hit.file, hit.start, hit.end, hit.best) for hit in hits]


def test_two_long_clips_keep_their_moments():
    scores = {
        "a.mp4": [0.01, 0.02, 0.6, 0.9, 0.03, 0.01],
        "b.mp4": [0.01, 0.01, 0.01, 0.01, 0.01, 0.8],
    }
    hits = moments(candidates(scores), UNIT, Path("root"), top=2)
    assert spans(hits) == [("a.mp4", 20, 40, 30), ("b.mp4", 50, 60, 50)]
    assert [hit.probability for hit in hits] == [0.9, 0.8] and len(hits[0].frames) == 2


def test_what_was_not_judged_joins_no_hit_that_was():
    hits = moments(candidates({"a.mp4": [0.9, None, None]}), UNIT, Path("root"), top=9)
    assert spans(hits) == [("a.mp4", 0, 10, 0), ("a.mp4", 10, 30, 10)]


@pytest.mark.parametrize("top", [1, 9])
def test_without_probabilities_close_similarities_are_merged(top):
    similarities = {"a.mp4": [0.2, 0.48, 0.5, 0.1]}
    found = candidates({"a.mp4": [None] * 4}, similarities)
    hits = moments(found, UNIT, Path("root"), top)
    assert spans(hits)[0] == ("a.mp4", 10, 30, 20) and len(hits) == min(top, 3)
