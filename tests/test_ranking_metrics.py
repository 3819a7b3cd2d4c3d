import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.retrieval import RetrievalHitRate

from lavis_uniadapter.evaluation import ranking_metrics
from lavis_uniadapter.evaluation.ranking_metrics import (
    RetrievalRanks,
    retrieval_metrics,
    retrieval_outcomes,
    retrieval_ranks,
)


def naive_rank(scores, right):
    """Rank of the best right candidate after every wrong one that scores at least as high."""
    best = max(scores[c] for c in right)
    return 1 + sum(score >= best for c, score in enumerate(scores) if c not in right)


def pairs_of(right_sets):
    return torch.tensor([(q, c) for q, right in enumerate(right_sets) for c in right])


def ranks_of(scores, right_sets):
    metric = RetrievalRanks()
    metric.update(torch.tensor(scores, dtype=torch.float32), pairs_of(right_sets))
    return torch.cat(metric.ranks).tolist()


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


@settings(deadline=None)
@given(queries())
def test_chunks_do_not_change_the_ranks(case):
    scores, right_sets = case
    whole = ranks_of(scores, right_sets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking_metrics, "CHUNK_ELEMENTS", 2 * len(scores[0]))
        assert ranks_of(scores, right_sets) == whole


def test_constant_scores_get_the_worst_rank():
    assert ranks_of([[0.3] * 5], [{2}]) == [5]


def test_other_right_candidates_do_not_count():
    assert ranks_of([[3.0, 2.0, 2.0, 1.0]], [{1, 2, 3}]) == [2]


def test_a_repeated_pair_counts_once():
    metric = RetrievalRanks()
    metric.update(torch.tensor([[1.0, 1.0, 1.0]]), torch.tensor([[0, 1], [0, 1]]))
    assert torch.cat(metric.ranks).tolist() == [3]


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

    metric = RetrievalRanks()
    metric.update(scores, relevant.nonzero())
    summary = metric.compute()

    for k in (1, 5, 10):
        hit_rate = RetrievalHitRate(top_k=k)(scores, relevant, indexes=query_of_score)
        assert summary[f"r{k}"] == pytest.approx(100 * hit_rate.item(), abs=1e-4)


def test_summary_of_known_ranks():
    num_candidates = 20
    scores = -torch.arange(num_candidates).float().expand(4, -1)
    right = torch.tensor([[0, 0], [1, 4], [2, 7], [3, 19]])  # ranks 1, 5, 8, 20

    metric = RetrievalRanks()
    metric.update(scores[:1], right[:1])
    metric.update(scores[1:], right[1:] - torch.tensor([1, 0]))

    summary = metric.compute()
    assert summary == {"r1": 25, "r5": 50, "r10": 75, "median_rank": 6.5, "mean_rank": 8.5}
    assert all(type(value) is float for value in summary.values())


def test_reset_forgets_the_queries():
    metric = RetrievalRanks()
    metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[0, 0]]))
    metric.reset()
    metric.update(torch.tensor([[0.0, 1.0]]), torch.tensor([[0, 1]]))
    assert metric.compute()["mean_rank"] == 1


ONE_RIGHT_EACH = torch.tensor([[0, 0], [1, 1], [2, 1]])


@pytest.mark.parametrize(
    ("scores", "relevant", "named"),
    [
        (torch.tensor([[0, 1], [0, 1], [0, torch.nan]]), ONE_RIGHT_EACH, "query 2.*NaN"),
        (torch.zeros(3, 2), ONE_RIGHT_EACH[[0, 2]], "Query 1 has no right candidate"),
        (torch.zeros(3, 2), torch.tensor([[0, 0], [1, 2], [2, 0]]), r"\(1, 2\)"),
        (torch.zeros(3, 2), torch.tensor([[0, 0], [1, -1], [2, 0]]), r"\(1, -1\)"),
        (torch.zeros(3, 2, dtype=torch.long), ONE_RIGHT_EACH, "int64"),
        (torch.zeros(3), ONE_RIGHT_EACH, "num_queries, num_candidates"),
        (torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), "bool"),
        (torch.zeros(3, 2), torch.tensor([0, 1, 0]), "num_pairs, 2"),
    ],
)
def test_wrong_input_is_named_and_leaves_no_trace(scores, relevant, named):
    metric = RetrievalRanks()
    with pytest.raises(ValueError, match=named):
        metric.update(scores, relevant)
    assert metric.ranks == []


def test_the_row_of_a_nan_is_named_across_chunks(monkeypatch):
    monkeypatch.setattr(ranking_metrics, "CHUNK_ELEMENTS", 4)
    scores = torch.zeros(7, 2)
    scores[5, 1] = torch.nan
    with pytest.raises(ValueError, match="query 5"):
        RetrievalRanks().update(scores, torch.stack([torch.arange(7), torch.zeros(7).long()], 1))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_queries_is_an_error():
    with pytest.raises(ValueError):
        RetrievalRanks().compute()


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


def test_unknown_visual_kind_is_refused():
    with pytest.raises(ValueError, match="'audio'"):
        retrieval_ranks(SCORES_V2T, SCORES_T2V, TXT2IMG, IMG2TXT, "audio")


def test_swapped_score_matrices_are_refused():
    with pytest.raises(ValueError, match="lies outside"):
        retrieval_ranks(SCORES_T2V, SCORES_V2T, TXT2IMG, IMG2TXT, "video")


def test_metrics_do_not_wait_for_other_processes(monkeypatch):
    """LAVIS reports from the main process alone, where a collective call would hang."""

    def fail(*args, **kwargs):
        raise AssertionError("the metric tried to gather")

    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    monkeypatch.setattr("torchmetrics.metric.gather_all_tensors", fail)
    retrieval_metrics(retrieval_ranks(SCORES_V2T, SCORES_T2V, TXT2IMG, IMG2TXT, "video"))
