"""What holds for any input: of sampling, padding, ranking metrics and shards."""

from __future__ import annotations

import pytest
import torch
from fuzzing import examples
from gallery import Gallery
from hypothesis import given
from hypothesis import strategies as st
from small_models import build_selective
from torch.utils.data import DataLoader

import lavis_uniadapter.runners.launch  # noqa: F401  (registers LAVIS's schedules)
from lavis_uniadapter.common.paths import PACKAGE_ROOT
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.datasets.loading import TrainingShard
from lavis_uniadapter.evaluation import two_stage
from lavis_uniadapter.evaluation.ranking_metrics import (
    query_ranks,
)
from lavis_uniadapter.evaluation.two_stage import score_gallery
from lavis_uniadapter.processors.video import sample_frame_indices

# --- sampling -----------------------------------------------------------------------------------


@given(st.integers(1, 500), st.integers(1, 40), st.data())
def test_a_frame_of_each_segment(num_frames, n_frms, data):
    positions = st.floats(0, 1, exclude_max=True, width=32)
    if one := data.draw(st.booleans()):
        position = data.draw(positions)
    else:
        position = torch.tensor(data.draw(st.lists(positions, min_size=n_frms, max_size=n_frms)))
    indices = sample_frame_indices(num_frames, n_frms, position)
    assert len(indices) == n_frms and all(type(i) is int for i in indices)
    assert indices == sorted(indices)
    for segment, index in enumerate(indices):
        first, end = (n * num_frames // n_frms for n in (segment, segment + 1))
        assert first <= index < max(end, first + 1) <= num_frames
    if num_frames >= n_frms:
        assert len(set(indices)) == n_frms
    else:
        times = [indices.count(frame) for frame in range(num_frames)]
        assert min(times) >= 1 and max(times) - min(times) <= 1
    if one and position == 0:
        assert indices[0] == 0
    if n_frms == num_frames:
        assert indices == list(range(num_frames))


# --- padding ------------------------------------------------------------------------------------

WORDS = [
    word
    for word in (PACKAGE_ROOT / "configs/tokenizers/shapes/vocab.txt").read_text().split()
    if not word.startswith(("[", "##"))
]
texts = st.lists(st.sampled_from(WORDS), max_size=40).map(" ".join)  # longer than max_txt_len, too


@pytest.fixture(scope="module")
def model(build_model):
    return build_selective(build_model).eval()


@examples(20)
@given(st.lists(texts, min_size=1, max_size=8), st.integers(0, 20), st.data())
def test_a_text_is_encoded_alike_in_any_company(model, group, padding, data):
    order = data.draw(st.permutations(range(len(group))))
    with torch.no_grad():
        alone = torch.cat([model.encode_text(text).feat for text in group])
        tokens = model.tokenize([group[i] for i in order])
        more = torch.zeros(len(group), padding, dtype=torch.long)
        tokens["input_ids"] = torch.cat(
            [tokens.input_ids, more + model.tokenizer.pad_token_id], dim=1
        )
        tokens["attention_mask"] = torch.cat([tokens.attention_mask, more], dim=1)
        together = model.encode_text(tokens).feat
    torch.testing.assert_close(together, alone[list(order)], rtol=0, atol=1e-5)


@examples(10)
@given(
    st.lists(texts, min_size=1, max_size=8),
    st.integers(1, 4),
    *(st.integers(1, 9) for _ in range(3)),
    st.booleans(),
    st.sampled_from([None, 3]),
)
def test_scores_do_not_depend_on_batches(
    model, group, number, rerank_batch, text_batch, loader_batch, on_disk, frames
):
    gallery = Gallery(number, frames=frames)
    gallery.text = group
    scores = {}
    for how, (pairs, at_once, size, memory) in {
        "one by one": (1, 1, 1, 16),  # without any padding
        "in batches": (rerank_batch, text_batch, loader_batch, 16 * (not on_disk)),
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(two_stage, "TEXT_BATCH", at_once)
            settings = {"k_test": 100, "itc_weight": 0.5, "rerank_batch": pairs}
            *scores[how], _ = score_gallery(
                model,
                DataLoader(gallery, batch_size=size),
                Evaluation(**settings, feature_memory=memory),
            )
    for one, other in zip(*scores.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


# --- ranking metrics ----------------------------------------------------------------------------


@st.composite
def galleries(draw) -> tuple[list[list[int]], dict[int, list[int]]]:
    """Whole scores from few values, so with many ties; several texts for a visual input."""
    owners = draw(st.lists(st.integers(0, 5), min_size=1, max_size=12))
    right: dict[int, list[int]] = {}
    for text, owner in enumerate(owners):
        right.setdefault(owner, []).append(text)
    row = st.lists(st.integers(-2, 3), min_size=len(owners), max_size=len(owners))
    scores = draw(st.lists(row, min_size=len(right), max_size=len(right)))
    return scores, dict(enumerate(right.values()))


@given(
    galleries(),
    st.sampled_from([torch.exp, torch.atan, lambda x: x**3, lambda x: 1e4 * x - 7]),
)
def test_ranks_depend_on_the_order_of_scores_alone(gallery, increasing):
    v2t, right = gallery
    scores = torch.tensor(v2t, dtype=torch.float64)
    assert torch.equal(query_ranks(increasing(scores), right), query_ranks(scores, right))


@given(galleries(), st.data())
def test_ranks_do_not_depend_on_the_order_of_queries_and_candidates(gallery, data):
    v2t, right = gallery
    scores = torch.tensor(v2t, dtype=torch.float32)
    queries, candidates = (data.draw(st.permutations(range(n))) for n in scores.shape)
    moved = {new: [candidates.index(c) for c in right[old]] for new, old in enumerate(queries)}
    found = query_ranks(scores[queries][:, candidates], moved)
    assert torch.equal(found, query_ranks(scores, right)[queries])


# --- sharding -----------------------------------------------------------------------------------


@given(
    st.integers(1, 200), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 50), st.data()
)
def test_training_ranks_share_an_epoch_out_and_may_begin_in_it(number, world, seed, epoch, data):
    def shares(first=0, of_epoch=epoch, of_seed=seed):
        shards = [TrainingShard(range(number), rank, world, of_seed) for rank in range(world)]
        for shard in shards:
            shard.start(of_epoch, first)
        return [list(shard) for shard in shards], [len(shard) for shard in shards]

    whole, lengths = shares()
    assert lengths == [number // world] * world == [len(share) for share in whole]
    seen = [index for share in whole for index in share]
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(number))
    assert shares()[0] == whole  # the order is the seed's and the epoch's
    first = data.draw(st.integers(0, number // world))
    assert shares(first)[0] == [share[first:] for share in whole]
    if number // world >= 20:
        assert shares(of_epoch=epoch + 1)[0] != whole and shares(of_seed=seed ^ 1)[0] != whole
