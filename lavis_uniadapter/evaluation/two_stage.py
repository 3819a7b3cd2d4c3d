"""Two-stage retrieval scores in which nothing is computed twice.

BLIP shortlists candidates by contrastive similarity and reorders them by its matching head
(``lavis.models.albef_models.compute_sim_matrix``). Here the keys and values of a visual input are
projected once, and every text shortlisted with it in either direction is scored against them; a
pair shortlisted in both directions is scored once; texts are padded only to the longest of a batch.
"""

from __future__ import annotations

import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures, visual_input
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.loading import gather_unreadable, samples_of
from lavis_uniadapter.datasets.reading import Unreadable

logger = logging.getLogger(__name__)

# LAVIS's score of pairs outside the shortlist. The contrastive similarity, at most 1, is added, so
# that they rank below the shortlist and among themselves as the first stage ranked them.
OUTSIDE_SHORTLIST = -100.0
TEXT_BATCH = 256

# Matching logits (pairs, 2) of one text per pair with the visual inputs of (pairs,) indices.
Matcher = Callable[[TextFeatures, Tensor], Tensor]


class PairScorer(Protocol):
    """A model that scores texts against visual inputs in two stages."""

    embed_dim: int  # of the contrastive features
    training: bool

    @property
    def device(self) -> torch.device: ...

    def train(self, mode: bool = True) -> Any: ...

    def tokenize(self, texts: Sequence[str]) -> Mapping[str, Tensor]:
        """``input_ids`` and ``attention_mask`` (texts, longest), padded on the right."""

    def encode_text(self, texts: Sequence[str]) -> TextFeatures: ...

    def encode_visual(self, samples: Tensor) -> VisualFeatures: ...

    def matcher(self, visuals: VisualFeatures) -> Matcher:
        """Project visual inputs for cross-attention, once for all texts paired with them."""


@dataclass(frozen=True)
class _Gallery:
    """A rank's view of an encoded gallery.

    Attributes:
        texts: all texts, padded to the longest.
        lengths: (texts,) tokens of each, on the CPU.
        feat: (visuals, embed_dim) unit vectors of all visual inputs.
        embeds: (share, tokens, width) of this rank's visual inputs, which are those of index
            ``rank``, ``rank + world`` and so on; None if it has none.
        frame_feat: (share, frames, embed_dim) unit vectors; likewise.
        unreadable: what no rank could read, by index.
    """

    texts: TextFeatures
    lengths: Tensor
    feat: Tensor
    embeds: Tensor | None
    frame_feat: Tensor | None
    unreadable: Mapping[int, Unreadable]


def two_stage_scores(
    scorer: PairScorer, data_loader: DataLoader, **settings: Any
) -> tuple[Tensor, Tensor]:
    """The scores of ``score_gallery``."""
    v2t, t2v, _ = score_gallery(scorer, data_loader, **settings)
    return v2t, t2v


@torch.no_grad()
def score_gallery(
    scorer: PairScorer,
    data_loader: DataLoader,
    *,
    k_test: int,
    itc_weight: float,
    rerank_batch: int,
    feature_memory: float = math.inf,
) -> tuple[Tensor, Tensor, Mapping[int, Unreadable]]:
    """Score a gallery in both directions.

    Args:
        scorer: the model.
        data_loader: batches of a retrieval split, whole or sharded over ranks; its ``dataset`` has
            ``text`` and ``img2txt`` as LAVIS's retrieval datasets.
        k_test: candidates that are reranked per query; 0: contrastive similarities alone.
        itc_weight: weight of the similarity that is added to the matching score; 0 in the released
            code, 1 in LAVIS.
        rerank_batch: pairs scored at once, which bounds memory.
        feature_memory: gigabytes of visual features that each rank keeps in memory between the
            two stages; a larger share of the gallery is kept on disk.

    Returns:
        (visuals, texts) and (texts, visuals) scores on the scorer's device, equal on every rank. An
        unreadable visual input (``allow_missing``) scores lowest for its texts, and they for it: it
        counts as wrong in both directions. Third, what was unreadable, by index.

    Raises:
        FloatingPointError: if similarities are not finite.
        RuntimeError: if a visual input was encoded by no rank or by several.
    """
    was_training = scorer.training
    scorer.train(False)
    try:
        gallery = _encode(scorer, data_loader, feature_memory)
        v2t, t2v = _score(scorer, gallery, k_test, itc_weight, rerank_batch)
    finally:
        scorer.train(was_training)
    for index in gallery.unreadable:
        v2t[index] = 0
        v2t[index, data_loader.dataset.img2txt[index]] = float("-inf")
        t2v[:, index] = float("-inf")
    return v2t, t2v, gallery.unreadable


def _score(
    scorer: PairScorer, gallery: _Gallery, k_test: int, itc_weight: float, rerank_batch: int
) -> tuple[Tensor, Tensor]:
    with torch.autocast(scorer.device.type, enabled=False):
        sims = gallery.feat @ gallery.texts.feat.t()
    if not torch.isfinite(sims).all():
        raise FloatingPointError(
            "The model's features are not finite: its weights are spoiled, or they overflow in "
            "run.amp. Evaluate an earlier checkpoint, or set run.amp to null."
        )
    if k_test == 0:
        return sims, sims.t().clone()
    chosen_v2t = _shortlist(sims, k_test, "texts")
    readable = sims.clone()  # an unreadable input takes nobody's place in a shortlist
    readable[list(gallery.unreadable)] = float("-inf")
    chosen_t2v = _shortlist(readable.t(), k_test, "visual inputs").t()
    matching = _rerank(scorer, gallery, chosen_v2t | chosen_t2v, rerank_batch)
    matching += itc_weight * sims
    outside = OUTSIDE_SHORTLIST + sims
    return (
        torch.where(chosen_v2t, matching, outside),
        torch.where(chosen_t2v, matching, outside).t(),
    )


def _encode(scorer: PairScorer, data_loader: DataLoader, feature_memory: float) -> _Gallery:
    texts, lengths = _encode_texts(scorer, list(data_loader.dataset.text))
    return _Gallery(texts, lengths, *_encode_visuals(scorer, data_loader, feature_memory))


def _encode_texts(scorer: PairScorer, texts: list[str]) -> tuple[TextFeatures, Tensor]:
    """All texts, and their lengths on the CPU."""
    tokens = scorer.tokenize(texts)
    input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
    lengths = attention_mask.sum(dim=1).cpu()
    feat = torch.zeros(len(texts), scorer.embed_dim, device=scorer.device)
    batches = lengths.argsort(stable=True).split(TEXT_BATCH)
    for batch in batches[get_rank() :: get_world_size()]:
        feat[batch] = scorer.encode_text([texts[i] for i in batch.tolist()]).feat.to(feat.dtype)
    return TextFeatures(input_ids, attention_mask, None, _sum_over_ranks(feat)), lengths


def _encode_visuals(
    scorer: PairScorer, data_loader: DataLoader, feature_memory: float
) -> tuple[Tensor, Tensor | None, Tensor | None, Mapping[int, Unreadable]]:
    """``feat``, ``embeds``, ``frame_feat`` and ``unreadable`` of a ``_Gallery``.

    A rank encodes the items whose index falls to it, whether or not the loader is sharded, so an
    item that a sampler repeats to even out the ranks still counts once.
    """
    number, rank, world = len(data_loader.dataset), get_rank(), get_world_size()
    share = len(range(rank, number, world))
    feat = torch.zeros(number, scorer.embed_dim, device=scorer.device)
    times_seen = torch.zeros(number, dtype=torch.long)
    embeds = frame_feat = None
    unreadable: dict[int, Unreadable] = {}
    batches = _progress(data_loader, "encode visual inputs", len(data_loader))
    for samples in samples_of(batches, unreadable):
        index = torch.as_tensor(samples["index"]).cpu()
        mine = (index % world == rank) & (times_seen[index] == 0)
        if not mine.any():
            continue
        index = index[mine]
        encoded = scorer.encode_visual(visual_input(samples)[mine].to(scorer.device))
        if embeds is None:
            embeds = _allocate((share, *encoded.embeds.shape[1:]), encoded.embeds, feature_memory)
            frame_feat = encoded.frame_feat.new_empty(share, *encoded.frame_feat.shape[1:])
        feat[index] = encoded.feat.to(feat.dtype)
        embeds[index // world] = encoded.embeds.cpu()
        frame_feat[index // world] = encoded.frame_feat
        times_seen[index] += 1
    times_seen = _sum_over_ranks(times_seen.to(scorer.device))
    if not bool((times_seen == 1).all()):
        wrong = torch.nonzero(times_seen != 1).flatten().tolist()
        raise RuntimeError(
            f"{len(wrong)} of {number} visual inputs were not encoded exactly once, the first at "
            f"index {wrong[0]}. The evaluation sampler must cover the gallery: do not shuffle it."
        )
    return _sum_over_ranks(feat), embeds, frame_feat, gather_unreadable(unreadable)


def _allocate(shape: Sequence[int], like: Tensor, memory: float) -> Tensor:
    """A CPU tensor of a dtype: in memory, or in a temporary file if it takes more gigabytes.

    A clip of 8 frames of 224 px takes 4.8 MB in float32, an image of 384 px 1.8 MB.

    Raises:
        ConfigError: if there is no room for the file.
    """
    elements = torch.Size(shape).numel()
    gigabytes = elements * like.dtype.itemsize / 1e9
    if gigabytes <= memory:
        return torch.empty(shape, dtype=like.dtype)
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < gigabytes:
        raise ConfigError(
            f"The gallery's visual features take {gigabytes:.1f} GB, more than run.feature_memory "
            f"{memory:g} allows in memory and more than the {free:.1f} GB free in "
            f"{tempfile.gettempdir()}. Set TMPDIR to a larger disk, raise run.feature_memory, or "
            "evaluate on more processes."
        )
    logger.info(
        "%.1f GB of visual features are kept on disk (run.feature_memory %g)", gigabytes, memory
    )
    with tempfile.NamedTemporaryFile(prefix="visual-features-") as file:
        # The mapping outlives the file's name, so nothing is left behind, even by a crash.
        flat = torch.from_file(file.name, shared=True, size=elements, dtype=like.dtype)
    return flat.view(shape)


def _shortlist(sims: Tensor, k_test: int, candidates: str) -> Tensor:
    """(queries, candidates) bool, True for the ``k_test`` most similar of each query."""
    available = sims.shape[1]
    if k_test > available:
        logger.info(
            *("k_test %d exceeds the gallery's %d %s: all rerank.", k_test, available, candidates)
        )
    best = sims.topk(min(k_test, available), dim=1).indices
    return torch.zeros_like(sims, dtype=torch.bool).scatter_(1, best, True)


def _rerank(scorer: PairScorer, gallery: _Gallery, chosen: Tensor, rerank_batch: int) -> Tensor:
    """Matching scores of the chosen (visual, text) pairs, zero elsewhere; (visuals, texts)."""
    rank, world = get_rank(), get_world_size()
    scores = torch.zeros(chosen.shape, device=scorer.device)
    mine = chosen[rank::world].cpu()
    with _progress(None, "rerank pairs", int(mine.sum())) as progress:
        for group in _groups(mine.sum(dim=1).tolist(), rerank_batch):
            visual, text = mine[group].nonzero(as_tuple=True)
            embeds = gallery.embeds[group].to(scorer.device)
            feat, frame_feat = gallery.feat[rank::world][group], gallery.frame_feat[group]
            match = scorer.matcher(VisualFeatures(embeds, feat, frame_feat))
            for pairs in gallery.lengths[text].argsort(stable=True).split(rerank_batch):
                v, t = visual[pairs], text[pairs]
                logits = match(_select(gallery, t), v.to(scorer.device))
                scores[rank + world * (group.start + v), t] = logits[:, 1]
                progress.update(len(pairs))
    return _sum_over_ranks(scores)


def _groups(pairs: Sequence[int], least: int) -> Iterator[slice]:
    """Visual inputs to project together: as few as have ``least`` pairs in all."""
    start = total = 0
    for i, number in enumerate(pairs):
        total += number
        if total >= least or i + 1 == len(pairs):
            yield slice(start, i + 1)
            start, total = i + 1, 0


def _select(gallery: _Gallery, index: Tensor) -> TextFeatures:
    """Some texts of a gallery, padded to the longest of them."""
    length = int(gallery.lengths[index].max())
    texts, index = gallery.texts, index.to(gallery.feat.device)
    ids, mask = texts.input_ids[index, :length], texts.attention_mask[index, :length]
    return TextFeatures(ids, mask, None, texts.feat[index])


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Merge tensors of which each rank has filled its own part, zero elsewhere."""
    if get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _progress(iterable: Iterable | None, description: str, total: int) -> tqdm:
    hidden = not is_main_process()
    return tqdm(iterable, description, total, leave=False, disable=hidden, mininterval=0.5)
