"""What a query finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lavis_uniadapter.search.manifest import StoredSegment

# Touching segments are merged if the weaker one has at least this share of the better one's
# probability or, without probabilities, a cosine that is lower by this at most.
_ALIKE_PROBABILITY = 0.5
_ALIKE_SIMILARITY = 0.05


class Frame(NamedTuple):
    """An encoded frame of a moment: when, how similar, and which of which segment."""

    seconds: float
    similarity: float
    segment: int
    number: int


@dataclass(frozen=True)
class Hit:
    """A moment of a file that matches a query.

    Attributes:
        rank: 1 for the best.
        file: path relative to the indexed folder.
        path: absolute path.
        start, end: seconds in a video; both 0 for an image. Neighbouring segments that match
            about equally well are merged.
        best: seconds at which its best segment begins.
        probability: that text and moment match, by the matching head; None if that has not judged
            it (a query by image, or a candidate beyond ``rerank``).
        similarity: cosine of the contrastive features.
        frames: the encoded frames, in order of time.
        segment: id of its best segment.
    """

    rank: int
    file: str
    path: Path
    start: float
    end: float
    best: float
    probability: float | None
    similarity: float
    frames: tuple[Frame, ...]
    segment: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Stage:
    """What is known at some point of a query.

    Attributes:
        name: ``shortlist``, ``matching`` or ``done``.
        hits: of the shortlist, and when done; none in between.
        matched, total: candidates that the matching head has judged, and will.
    """

    name: str
    hits: list[Hit]
    matched: int = 0
    total: int = 0


@dataclass(frozen=True)
class Candidate:
    """A segment that may match.

    Attributes:
        rank: from 0.
        ranking: what the matching head makes of it, higher is better; None if not judged.
    """

    rank: int
    stored: StoredSegment
    similarity: float
    ranking: float | None = None
    probability: float | None = None

    @property
    def order(self) -> tuple[bool, float]:
        # those that the matching head has judged come before the rest
        return self.ranking is None, -(self.similarity if self.ranking is None else self.ranking)


def moments(candidates: Sequence[Candidate], vector: Tensor, root: Path, top: int) -> list[Hit]:
    """The best moments. Segments of a file that touch each other and match alike are one.

    Args:
        candidates: the best first.
        vector: (embed_dim,) feature of the query.
        root: the indexed folder.
        top: moments at most.
    """
    found: list[Hit] = []
    for candidate in candidates:
        hit = _hit(candidate, vector, root)
        for other in list(found):
            better, weaker = sorted((other, hit), key=lambda each: each.rank)
            if _touch(other, hit) and _alike(better, weaker):
                found.remove(other)
                hit = _merge(better, weaker)
        if len(found) < top:
            found.append(hit)
            found.sort(key=lambda each: each.rank)
    return [replace(hit, rank=i + 1) for i, hit in enumerate(found)]


def _hit(candidate: Candidate, vector: Tensor, root: Path) -> Hit:
    stored = candidate.stored
    cosines = (stored.frame_feat.float() @ vector.float().cpu()).tolist()
    return Hit(
        rank=candidate.rank,
        file=stored.file,
        path=root / stored.file,
        start=stored.segment.start,
        end=stored.segment.end,
        best=stored.segment.start,
        probability=candidate.probability,
        similarity=candidate.similarity,
        frames=tuple(
            Frame(seconds, cosine, stored.id, number)
            for number, (seconds, cosine) in enumerate(
                zip(stored.segment.times, cosines, strict=True)
            )
        ),
        segment=stored.id,
    )


def _touch(one: Hit, other: Hit) -> bool:
    if one.file != other.file or one.end == 0:
        return False
    return other.end == one.start or other.start == one.end


def _alike(better: Hit, weaker: Hit) -> bool:
    """Whether two moments match a query about equally well."""
    if better.probability is None and weaker.probability is None:
        return weaker.similarity >= better.similarity - _ALIKE_SIMILARITY
    if better.probability is None or weaker.probability is None:
        return False
    return weaker.probability >= _ALIKE_PROBABILITY * better.probability


def _merge(better: Hit, weaker: Hit) -> Hit:
    """The better of two moments, over the time of both."""
    return replace(
        better,
        start=min(better.start, weaker.start),
        end=max(better.end, weaker.end),
        frames=tuple(sorted({*better.frames, *weaker.frames})),
    )
