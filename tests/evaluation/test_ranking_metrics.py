import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.retrieval import RetrievalHitRate

from lavis_uniadapter.evaluation.ranking_metrics import (
    metric_names,
    query_ranks,
    retrieval_metrics,
    retrieval_outcomes,
    retrieval_ranks,
)


def naive_rank(scores, right):
    """Rank of the best right candidate after every wrong one that scores at least as high."""
    best = max(scores[c] for c in right)
    return 1 + sum(score >= best for c, score in enumerate(scores) if c not in right)


def ranks_of(scores, right_sets):
    scores = torch.tensor(scores, dtype=torch.float32)
    return query_ranks(scores, dict(enumerate(right_sets))).tolist()


@st.composite
def queries(draw):
    """Scores from few values, so with many ties, and the right candidates of each query."""
    num_queries, num_candidates = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    score = st.sampled_from([-torch.inf, -1.0, 0.0, 0.5, 2.0])
    scores = draw(
        st.lists(
            st.lists(score, min_size=num_candidates, max_size=num_candidates),
            min_size=num_queries,
            max_size=num_queries,
        )
    )
    right = st.sets(st.integers(0, num_candidates - 1), min_size=1)
    return scores, draw(st.lists(right, min_size=num_queries, max_size=num_queries))


@settings(deadline=None)
@given(queries())
def test_ranks_agree_with_a_loop_over_the_candidates(case):
    scores, right_sets = case
    expected = [naive_rank(row, right) for row, right in zip(scores, right_sets, strict=True)]
    assert ranks_of(scores, right_sets) == expected


def test_constant_scores_get_the_worst_rank():
    assert ranks_of([[0.3] * 5], [{2}]) == [5]


def test_other_right_candidates_do_not_count():
    assert ranks_of([[3.0, 2.0, 2.0, 1.0]], [{1, 2, 3}]) == [2]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000))
def test_recalls_agree_with_torchmetrics_without_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    num_queries, num_candidates = 12, 25
    scores = torch.stack(
        [torch.randperm(num_candidates, generator=generator) for _ in range(num_queries)]
    ).float()
    relevant = torch.rand(num_queries, num_candidates, generator=generator) < 0.1
    relevant[torch.arange(num_queries), torch.arange(num_queries)] = True
    query_of_score = torch.arange(num_queries)[:, None].expand_as(scores)
    right = {query: row.nonzero().flatten().tolist() for query, row in enumerate(relevant)}
    metrics = retrieval_metrics({"t2v": query_ranks(scores, right)})
    for k in (1, 5, 10):
        hit_rate = RetrievalHitRate(top_k=k)(scores, relevant, indexes=query_of_score)
        assert metrics[f"t2v_r{k}"] == pytest.approx(100 * hit_rate.item(), abs=1e-4)


def test_metrics_of_known_ranks():
    assert retrieval_metrics({"t2v": torch.tensor([1.0, 5.0, 8.0, 20.0])}) == {
        **{"t2v_r1": 25, "t2v_r5": 50, "t2v_r10": 75, "t2v_medr": 6.5, "t2v_meanr": 8.5},
        "mean_recall": 50,
    }


def test_the_query_of_a_nan_is_named():
    scores = torch.zeros(7, 2)
    scores[5, 1] = torch.nan
    with pytest.raises(ValueError, match="query 5"):
        query_ranks(scores, {query: [0] for query in range(7)})


# Two videos; texts 0 and 2 describe video 1, text 1 describes video 0.
TXT2IMG = {0: 1, 1: 0, 2: 1}
IMG2TXT = {0: [1], 1: [0, 2]}
SCORES_T2V = np.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]], dtype=np.float32)  # ranks 2, 1, 1
SCORES_V2T = np.array([[0.6, 0.5, 0.4], [0.1, 0.2, 0.3]], dtype=np.float32)  # ranks 2, 1


def test_both_directions_of_a_small_example():
    third = pytest.approx(200 / 3)
    assert retrieval_metrics(
        retrieval_ranks(SCORES_V2T, SCORES_T2V, TXT2IMG, IMG2TXT, "video")
    ) == {
        "t2v_r1": third,
        "t2v_r5": 100,
        "t2v_r10": 100,
        "t2v_medr": 1,
        "t2v_meanr": pytest.approx(4 / 3),
        "v2t_r1": 50,
        "v2t_r5": 100,
        "v2t_r10": 100,
        "v2t_medr": 1.5,
        "v2t_meanr": 1.5,
        "mean_recall": pytest.approx((200 / 3 + 50 + 400) / 6),
    }


def test_metrics_are_the_means_of_what_queries_contribute():
    ranks = retrieval_ranks(SCORES_V2T, SCORES_T2V, TXT2IMG, IMG2TXT, "video")
    outcomes, metrics = retrieval_outcomes(ranks), retrieval_metrics(ranks)
    assert set(outcomes) == {name for name in metrics if not name.endswith(("medr", "meanr"))}
    assert [len(values) for values in outcomes["mean_recall"]] == [3, 2]
    for name, kinds in outcomes.items():
        assert np.mean([np.mean(values) for values in kinds]) == pytest.approx(metrics[name]), name


def test_images_have_their_own_keys_and_the_same_numbers():
    video = retrieval_metrics(retrieval_ranks(SCORES_V2T, SCORES_T2V, TXT2IMG, IMG2TXT, "video"))
    tensors = torch.from_numpy(SCORES_V2T), torch.from_numpy(SCORES_T2V)
    image = retrieval_metrics(retrieval_ranks(*tensors, TXT2IMG, IMG2TXT, "image"))
    names = {key: key if key == "mean_recall" else key.replace("v", "i", 1) for key in video}
    assert image == {names[key]: value for key, value in video.items()}


@pytest.mark.parametrize("visual", ["video", "image"])
def test_names_are_those_of_the_metrics(visual):
    ranks = retrieval_ranks(SCORES_V2T, SCORES_T2V, TXT2IMG, IMG2TXT, visual)
    assert set(metric_names(visual)) == set(retrieval_metrics(ranks))


def test_swapped_score_matrices_are_refused():
    with pytest.raises(IndexError):
        retrieval_ranks(SCORES_T2V, SCORES_V2T, TXT2IMG, IMG2TXT, "video")
