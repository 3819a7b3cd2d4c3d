"""Paired differences between lines of a comparison, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lavis_uniadapter.runners.run_folders import RunSummary

RESAMPLES = 10_000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A metric of one line less that of another: its mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    runs: Sequence[RunSummary], reference: Sequence[RunSummary], metric: str
) -> Difference | None:
    """How much higher a metric is than the reference's, over the queries that both answered.

    Queries and seeds are resampled with replacement, the same ones on both sides. Runs are paired
    by seed; a line of one run, such as zero-shot, is paired with every run of the other.

    Returns:
        None if a run has no outcomes of the metric, or they are of other queries.
    """
    pairs = [
        (one, other)
        for one in runs
        for other in reference
        if 1 in (len(runs), len(reference)) or one.seed == other.seed is not None
    ]
    outcomes = [(one.outcomes.get(metric), other.outcomes.get(metric)) for one, other in pairs]
    if not outcomes or any(one is None or other is None for one, other in outcomes):
        return None
    if any(list(map(len, one)) != list(map(len, other)) for one, other in outcomes):
        return None
    kinds = [
        np.stack([np.subtract(one[kind], other[kind]) for one, other in outcomes])
        for kind in range(len(outcomes[0][0]))
    ]
    return _bootstrap(kinds)


def _bootstrap(kinds: Sequence[np.ndarray]) -> Difference:
    """Interval of the mean over kinds of the means of (seeds, queries) differences."""
    rng = np.random.default_rng(0)
    seeds = len(kinds[0])
    seed_weights = rng.multinomial(seeds, np.full(seeds, 1 / seeds), RESAMPLES) / seeds
    resampled = np.zeros(RESAMPLES)
    for differences in kinds:
        queries = differences.shape[1]
        query_weights = rng.multinomial(queries, np.full(queries, 1 / queries), RESAMPLES) / queries
        resampled += ((seed_weights @ differences) * query_weights).sum(axis=1) / len(kinds)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    return Difference(float(np.mean([d.mean() for d in kinds])), float(low), float(high))
