"""Paired differences between lines of a comparison, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lavis_uniadapter.runners.run_folders import RunSummary

RESAMPLES = 10_000
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """A metric of one line less that of another: its mean and the ends of its interval."""

    mean: float
    low: float
    high: float


def paired_difference(
    runs: Sequence[RunSummary], reference: Sequence[RunSummary], metric: str
) -> Difference | None:
    """How much higher a metric is than the reference's, over the queries that both answered.

    Queries and seeds are resampled with replacement, the same ones on both sides. Runs are paired
    by seed; a line of one run, such as zero-shot, is paired with every run of the other. None if a
    run has no outcomes of the metric, or they are of other queries.
    """
    pairs = [
        (one.outcomes.get(metric, ()), other.outcomes.get(metric, ()))
        for one in runs
        for other in reference
        if 1 in (len(runs), len(reference)) or one.seed == other.seed is not None
    ]
    lengths = {tuple(map(len, outcomes)) for pair in pairs for outcomes in pair}
    if len(lengths) != 1 or not (kinds := lengths.pop()):
        return None
    # of each kind of query, (seeds, queries) differences
    differences = [
        np.stack([np.subtract(one[kind], other[kind]) for one, other in pairs])
        for kind in range(len(kinds))
    ]
    rng = np.random.default_rng(0)
    seed_weights = _resampling_weights(rng, len(pairs))
    resampled = np.zeros(RESAMPLES)
    for each in differences:
        query_weights = _resampling_weights(rng, each.shape[1])
        resampled += ((seed_weights @ each) * query_weights).sum(axis=1) / len(differences)
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(resampled, [tail, 100 - tail])
    mean = np.mean([each.mean() for each in differences])
    return Difference(float(mean), float(low), float(high))


def _resampling_weights(rng: np.random.Generator, number: int) -> np.ndarray:
    """(resamples, number) shares of each item in samples drawn with replacement."""
    return rng.multinomial(number, np.full(number, 1 / number), RESAMPLES) / number
