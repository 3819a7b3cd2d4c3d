"""What a query finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lavis_uniadapter.search.manifest import StoredSegment


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
        start, end: seconds in a video; both 0 for an image. Neighbouring segments are merged.
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
    """The best moments; segments of a file that touch each other are one.

    Args:
        candidates: the best first.
        vector: (embed_dim,) feature of the query.
        root: the indexed folder.
        top: moments at most.
    """
    found: list[Hit] = []
    for candidate in candidates:
        hit = _hit(candidate, vector, root)
        touched = [other for other in found if other.file == hit.file and _touch(other, hit)]
        if not touched and len(found) == top:
            break
        for other in touched:
            found.remove(other)
            hit = _merge(other, hit)
        found.append(hit)
        found.sort(key=lambda hit: hit.rank)
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
    return one.end > 0 and (other.end == one.start or other.start == one.end)


def _merge(one: Hit, other: Hit) -> Hit:
    """The better of two moments, over the time of both."""
    return replace(
        min(one, other, key=lambda hit: hit.rank),
        start=min(one.start, other.start),
        end=max(one.end, other.end),
        frames=tuple(sorted({*one.frames, *other.frames})),
    )
