"""Paired differences of a comparison, and their bootstrap intervals."""

from __future__ import annotations

import numpy as np
import pytest

from lavis_uniadapter.runners.run_folders import RunSummary
from lavis_uniadapter.tools.compare import intervals
from lavis_uniadapter.tools.compare.intervals import paired_difference


def runs(outcomes: np.ndarray, seeds=None, kinds: int = 1) -> list[RunSummary]:
    """Runs of (seeds, queries) outcomes of one metric."""
    return [
        RunSummary(seed, {}, None, None, None, None, None, {"r1": [list(row)] * kinds})
        for seed, row in zip(seeds or range(len(outcomes)), outcomes, strict=True)
    ]


def test_difference_is_the_mean_and_pairs_seeds_and_queries():
    reference = np.arange(600.0).reshape(3, 200) % 7
    found = paired_difference(runs(reference + 2.0), runs(reference), "r1")
    # every query of every seed is better by 2, however much they differ among themselves
    assert found.mean == pytest.approx(2) and found.low == pytest.approx(2) == found.high
    shuffled = runs((reference + 2.0)[[2, 0, 1]], seeds=[2, 0, 1])
    assert paired_difference(shuffled, runs(reference), "r1") == found


def test_interval_is_that_of_the_normal_theory():
    rng = np.random.default_rng(1)
    one, other = rng.normal(5, 10, (1, 1000)), np.zeros((1, 1000))
    found = paired_difference(runs(one), runs(other), "r1")
    error = one.std() / 1000**0.5
    assert found.low == pytest.approx(one.mean() - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(one.mean() + 1.96 * error, abs=0.1 * error)


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(2)
    noise, shift = rng.normal(0, 1, (5, 1000)), np.array([[-4.0], [-2.0], [0.0], [2.0], [4.0]])
    zero = runs(np.zeros((5, 1000)))
    narrow = paired_difference(runs(noise), zero, "r1")
    wide = paired_difference(runs(noise + shift), zero, "r1")
    # of the mean of five seeds whose standard deviation is 2.83
    assert wide.high - wide.low == pytest.approx(2 * 1.96 * 2.83 / 5**0.5, rel=0.1)
    assert narrow.high - narrow.low < 0.2


def test_intervals_hold_what_they_promise(monkeypatch):
    """Of 100 pairs without a difference, about 95 have an interval around zero."""
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    rng = np.random.default_rng(3)
    holds = 0
    for _ in range(100):
        both = rng.normal(0, 1, (1, 100))
        found = paired_difference(runs(both + rng.normal(0, 1, (1, 100))), runs(both), "r1")
        holds += found.low <= 0 <= found.high
    assert 89 <= holds <= 99


def test_a_single_run_is_compared_with_every_seed():
    many, one = np.stack([np.full(10, value) for value in (1.0, 2.0, 3.0)]), np.zeros((1, 10))
    assert paired_difference(runs(one, seeds=[42]), runs(many), "r1").mean == -2


def test_mean_over_kinds_of_queries():
    kinds = runs(np.ones((2, 10)), kinds=2), runs(np.zeros((2, 10)), kinds=2)
    assert paired_difference(*kinds, "r1").mean == 1


@pytest.mark.parametrize(
    ("one", "other", "metric"),
    [
        (runs(np.ones((2, 10))), runs(np.ones((2, 12))), "r1"),  # other queries
        (runs(np.ones((2, 10))), runs(np.ones((2, 10)), seeds=[7, 8]), "r1"),  # other seeds
        (runs(np.ones((2, 10))), runs(np.ones((2, 10))), "r5"),  # nothing kept
        (runs(np.ones((2, 10))), [], "r1"),
    ],
)
def test_no_difference_where_nothing_pairs(one, other, metric):
    assert paired_difference(one, other, metric) is None
