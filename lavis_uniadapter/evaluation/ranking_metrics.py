"""Ranks and recalls of text-to-visual and visual-to-text retrieval."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

RECALL_CUTOFFS = (1, 5, 10)

# Scores compared at a time: bounds the boolean scratch tensor to 16 MiB.
CHUNK_ELEMENTS = 2**24

_VISUAL_LETTERS = {"video": "v", "image": "i"}


class RetrievalRanks(Metric):
    """Rank of the best-scored right candidate of each query.

    Ranks count from 1. Ties are resolved against the model: every wrong candidate that scores as
    high as the right one comes before it, so a constant scorer gets the worst rank. (LAVIS's
    `RetrievalTask` lets the sort order decide.) The other right candidates of a query never count
    against it.

    `compute()` returns floats: `r1`, `r5`, `r10` (percent of queries whose rank is at most 1, 5,
    10), `median_rank` (mean of the two middle ranks for an even number of queries), `mean_rank`.

    Args:
        kwargs: See `torchmetrics.Metric`.
    """

    higher_is_better = None
    is_differentiable = False
    full_state_update = False

    ranks: list[Tensor]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.add_state("ranks", default=[], dist_reduce_fx="cat")

    def update(self, scores: Tensor, relevant: Tensor) -> None:
        """Add queries, each with its scores for all candidates.

        Args:
            scores: Float tensor (num_queries, num_candidates), higher is better.
            relevant: Integer tensor (num_pairs, 2) of (query index, candidate index), one row for
                each right candidate of each query of this call, in any order.

        Raises:
            ValueError: If the shapes or types are wrong, an index is out of range, a score is NaN,
                or a query has no right candidate. The state is then unchanged.
        """
        _check_scores_and_pairs(scores, relevant)
        # Each right candidate must be counted once.
        query, candidate = relevant.to(scores.device).unique(dim=0).unbind(dim=1)

        num_queries = scores.shape[0]
        has_right = torch.zeros(num_queries, dtype=torch.bool, device=scores.device)
        has_right[query] = True
        if not has_right.all():
            index = int((~has_right).nonzero()[0])
            raise ValueError(
                f"Query {index} has no right candidate. "
                "Give every query at least one pair in `relevant`."
            )

        right_scores = scores[query, candidate]
        best = torch.full_like(scores[:, 0], -torch.inf)
        best = best.scatter_reduce(0, query, right_scores, reduce="amax")
        tied_right = torch.zeros_like(has_right, dtype=torch.long)
        tied_right.index_add_(0, query, (right_scores == best[query]).long())
        # best is the highest right score, so the right ones among those counted are the tied ones.
        ranks = _count_at_least(scores, best) - tied_right + 1
        # Float as torchmetrics' placeholder for a process without queries; exact below 2**24.
        self.ranks.append(ranks.float())

    def compute(self) -> dict[str, float]:
        """Summarise the ranks of all queries; ValueError if there were none."""
        ranks = dim_zero_cat(self.ranks).double()
        if ranks.numel() == 0:
            raise ValueError("No queries to rank. Call update() with at least one query first.")
        recalls = {f"r{k}": 100 * (ranks <= k).double().mean().item() for k in RECALL_CUTOFFS}
        return {
            **recalls,
            "median_rank": ranks.quantile(0.5).item(),
            "mean_rank": ranks.mean().item(),
        }


def retrieval_ranks(
    scores_v2t: np.ndarray | Tensor,
    scores_t2v: np.ndarray | Tensor,
    txt2img: Mapping[int, int],
    img2txt: Mapping[int, Sequence[int]],
    visual: str,
) -> dict[str, RetrievalRanks]:
    """Ranks in both directions, from complete score matrices.

    Args:
        scores_v2t: Float (num_visuals, num_texts), one row per video or image.
        scores_t2v: Float (num_texts, num_visuals), one row per text. Not in general the
            transpose: reranking treats the directions apart.
        txt2img: Text index to the index of its video or image, as in LAVIS's eval datasets.
        img2txt: Index of a video or image to the indices of its texts, likewise.
        visual: "video" or "image".

    Returns:
        By direction, `t2v` and `v2t`; for images `t2i` and `i2t`.

    Raises:
        ValueError: If `visual` is another word, or the scores do not fit the indices; see
            `RetrievalRanks.update`.
    """
    if visual not in _VISUAL_LETTERS:
        raise ValueError(f"visual must be 'video' or 'image', got {visual!r}.")
    letter = _VISUAL_LETTERS[visual]
    text_to_visual = list(txt2img.items())
    visual_to_text = [(v, text) for v, texts in img2txt.items() for text in texts]
    return {
        f"t2{letter}": _ranks(scores_t2v, text_to_visual),
        f"{letter}2t": _ranks(scores_v2t, visual_to_text),
    }


def retrieval_metrics(ranks: Mapping[str, RetrievalRanks]) -> dict[str, float]:
    """Recalls and ranks by name, of what `retrieval_ranks` returns.

    Returns:
        `t2v_r1`, `t2v_r5`, `t2v_r10` (percent), `t2v_medr`, `t2v_meanr` and the same five of the
        other direction; `mean_recall`, the mean of the six recalls.
    """
    metrics = {}
    for direction, metric in ranks.items():
        summary = metric.compute()
        metrics |= {f"{direction}_r{k}": summary[f"r{k}"] for k in RECALL_CUTOFFS}
        metrics[f"{direction}_medr"] = summary["median_rank"]
        metrics[f"{direction}_meanr"] = summary["mean_rank"]
    recalls = [metrics[f"{direction}_r{k}"] for direction in ranks for k in RECALL_CUTOFFS]
    return {**metrics, "mean_recall": sum(recalls) / len(recalls)}


def retrieval_outcomes(ranks: Mapping[str, RetrievalRanks]) -> dict[str, list[list[float]]]:
    """What each query contributes to a recall, in percent.

    Returns:
        By metric, a list of values for each kind of query: one for a recall of one direction, two
        for `mean_recall`. The metric is the mean over the kinds of their means.
    """
    recalled = {
        f"{direction}_r{k}": 100 * (dim_zero_cat(metric.ranks) <= k).double()
        for direction, metric in ranks.items()
        for k in RECALL_CUTOFFS
    }
    both = [
        torch.stack([recalled[f"{direction}_r{k}"] for k in RECALL_CUTOFFS]).mean(dim=0)
        for direction in ranks
    ]
    outcomes = {name: [values.tolist()] for name, values in recalled.items()}
    return {**outcomes, "mean_recall": [values.tolist() for values in both]}


def _ranks(
    scores: np.ndarray | Tensor, relevant_pairs: Sequence[tuple[int, int]]
) -> RetrievalRanks:
    # The matrices are complete and LAVIS reports from the main process alone: a sync would wait
    # forever for the others.
    metric = RetrievalRanks(sync_on_compute=False)
    metric.update(
        torch.as_tensor(scores), torch.tensor(relevant_pairs, dtype=torch.long).reshape(-1, 2)
    )
    return metric


def _check_scores_and_pairs(scores: Tensor, relevant: Tensor) -> None:
    if scores.ndim != 2 or not scores.is_floating_point():
        raise ValueError(
            "scores must be a float tensor (num_queries, num_candidates), "
            f"got {scores.dtype} of shape {tuple(scores.shape)}."
        )
    if relevant.ndim != 2 or relevant.shape[1] != 2 or relevant.dtype != torch.long:
        raise ValueError(
            "relevant must be an int64 tensor (num_pairs, 2) of (query index, candidate index), "
            f"got {relevant.dtype} of shape {tuple(relevant.shape)}."
        )
    limits = torch.tensor(scores.shape, device=relevant.device)
    out_of_range = ((relevant < 0) | (relevant >= limits)).any(dim=1)
    if out_of_range.any():
        pair = tuple(relevant[out_of_range][0].tolist())
        raise ValueError(
            f"The pair (query, candidate) = {pair} in `relevant` lies outside the scores of shape "
            f"{tuple(scores.shape)}."
        )


def _count_at_least(scores: Tensor, thresholds: Tensor) -> Tensor:
    """Per row, the number of scores >= the row's threshold; int64 (num_queries,)."""
    counts = torch.zeros(scores.shape[0], dtype=torch.long, device=scores.device)
    rows_per_chunk = max(1, CHUNK_ELEMENTS // max(1, scores.shape[1]))
    for start in range(0, scores.shape[0], rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        is_nan = scores[rows].isnan().any(dim=1)
        if is_nan.any():
            index = start + int(is_nan.nonzero()[0])
            raise ValueError(
                f"The scores of query {index} contain NaN. Look for an overflow in the model, "
                "for instance under mixed precision."
            )
        counts[rows] = (scores[rows] >= thresholds[rows, None]).sum(dim=1)
    return counts
