"""Ranks and recalls of text-to-visual and visual-to-text retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

RECALLS = {"r1": 1, "r5": 5, "r10": 10}
# Median and mean rank: lower is better.
RANKS = ("medr", "meanr")
MEAN_RECALL = "mean_recall"


def metric_names(visual: str) -> list[str]:
    """Names of what ``retrieval_metrics`` returns for ``video`` or ``image``."""
    return [MEAN_RECALL, *(f"{way}_{m}" for way in _directions(visual) for m in (*RECALLS, *RANKS))]


def _directions(visual: str) -> tuple[str, str]:
    return f"t2{visual[0]}", f"{visual[0]}2t"


def query_ranks(scores: np.ndarray | Tensor, right: Mapping[int, Sequence[int]]) -> Tensor:
    """Rank of the best-scored right candidate of each query, from 1; (queries,) float64.

    Ties count against the model: every wrong candidate that scores as high as the right one comes
    first. (LAVIS's ``RetrievalTask`` leaves ties to the sort order.) The other right candidates of
    a query never count against it.

    Args:
        scores: (queries, candidates), higher is better.
        right: indices of the right candidates of each query, at least one.

    Raises:
        ValueError: if a score is NaN.
    """
    ranks = torch.empty(len(scores), dtype=torch.float64)
    for query, row in enumerate(torch.as_tensor(scores).cpu()):
        if row.isnan().any():
            raise ValueError(
                f"The scores of query {query} contain NaN. Check the model for an overflow, for "
                "instance under mixed precision."
            )
        right_scores = row[list(right[query])]
        best = right_scores.max()
        ranks[query] = (row >= best).sum() - (right_scores == best).sum() + 1
    return ranks


def retrieval_ranks(
    scores_v2t: np.ndarray | Tensor,
    scores_t2v: np.ndarray | Tensor,
    txt2img: Mapping[int, int],
    img2txt: Mapping[int, Sequence[int]],
    visual: str,
) -> dict[str, Tensor]:
    """Ranks (see ``query_ranks``) in both directions, ``t2v`` and ``v2t`` or ``t2i`` and ``i2t``.

    Args:
        scores_v2t, scores_t2v: (visuals, texts) and (texts, visuals); each has its own shortlist.
        txt2img, img2txt: as in LAVIS's datasets, what belongs to a text or visual input.
        visual: ``video`` or ``image``.
    """
    to_visual, to_text = _directions(visual)
    return {
        to_visual: query_ranks(scores_t2v, {text: [v] for text, v in txt2img.items()}),
        to_text: query_ranks(scores_v2t, img2txt),
    }


def retrieval_outcomes(ranks: Mapping[str, Tensor]) -> dict[str, list[list[float]]]:
    """What each query contributes to each recall, in percent.

    A metric has one list for each direction that it covers, and is the mean of the lists' means.
    """
    outcomes: dict[str, list[list[float]]] = {}
    both = []
    for way, values in ranks.items():
        recalled = torch.stack([100 * (values <= k).double() for k in RECALLS.values()])
        outcomes |= {f"{way}_{m}": [row] for m, row in zip(RECALLS, recalled.tolist(), strict=True)}
        both.append(recalled.mean(dim=0).tolist())
    return {**outcomes, MEAN_RECALL: both}


def retrieval_metrics(ranks: Mapping[str, Tensor]) -> dict[str, float]:
    """Recalls in percent, median and mean ranks (``metric_names``) from ``retrieval_ranks``."""
    metrics = {name: fmean(map(fmean, lists)) for name, lists in retrieval_outcomes(ranks).items()}
    for way, values in ranks.items():
        metrics[f"{way}_medr"] = values.quantile(0.5).item()
        metrics[f"{way}_meanr"] = values.mean().item()
    return metrics
