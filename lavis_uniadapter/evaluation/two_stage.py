"""Two-stage retrieval scores in which nothing is computed twice.

BLIP shortlists candidates by contrastive similarity and reorders them by its matching head
(``lavis.models.albef_models.compute_sim_matrix``). Here a visual input's keys and values are
projected once for all texts shortlisted with it in either direction, a pair shortlisted in both is
scored once, and texts are padded only to the longest of a batch.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures, visual_input
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.datasets.loading import gather_unreadable, samples_of
from lavis_uniadapter.datasets.reading import Unreadable

if TYPE_CHECKING:
    from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval

logger = logging.getLogger(__name__)

# LAVIS's score of pairs outside the shortlist. The contrastive similarity, at most 1, is added, so
# that they rank below the shortlist and among themselves as the first stage ranked them.
OUTSIDE_SHORTLIST = -100.0
TEXT_BATCH = 256


@dataclass(frozen=True)
class _Gallery:
    """An encoded gallery as a rank has it; its share are visual inputs ``rank::world``."""

    texts: TextFeatures  # all, padded to the longest
    lengths: Tensor  # (texts,) in tokens, on the CPU
    feat: Tensor  # (visuals, embed_dim) of all visual inputs
    embeds: Tensor  # (share, tokens, width)
    frame_feat: Tensor  # (share, frames, embed_dim)
    unreadable: Mapping[int, Unreadable]  # what no rank could read, by index


@torch.no_grad()
def score_gallery(
    model: BlipUniAdapterRetrieval, data_loader: DataLoader, settings: Evaluation
) -> tuple[Tensor, Tensor, Mapping[int, Unreadable]]:
    """Score a gallery in both directions.

    Args:
        data_loader: batches of a retrieval split, whole or sharded over ranks; its ``dataset`` has
            ``text`` and ``img2txt`` as LAVIS's retrieval datasets.
        settings: ``k_test``, ``itc_weight``, ``rerank_batch`` and ``feature_memory`` are read.

    Returns:
        (visuals, texts) and (texts, visuals) scores on the model's device, equal on every rank, and
        unreadable visual inputs (``allow_missing``) by index, which count as wrong both ways.

    Raises:
        FloatingPointError: if similarities are not finite.
        RuntimeError: if a visual input was encoded by no rank.
    """
    dataset: Any = data_loader.dataset
    was_training = model.training
    model.train(False)
    try:
        texts, lengths = encode_texts(model, list(dataset.text))
        visuals = _encode_visuals(model, data_loader, len(dataset), settings.feature_memory)
        gallery = _Gallery(texts, lengths, *visuals)
        v2t, t2v = _score(model, gallery, settings)
    finally:
        model.train(was_training)
    for index in gallery.unreadable:
        v2t[index] = 0
        v2t[index, dataset.img2txt[index]] = float("-inf")
        t2v[:, index] = float("-inf")
    return v2t, t2v, gallery.unreadable


def _score(
    model: BlipUniAdapterRetrieval, gallery: _Gallery, settings: Evaluation
) -> tuple[Tensor, Tensor]:
    with torch.autocast(model.device.type, enabled=False):
        sims = gallery.feat @ gallery.texts.feat.t()
    if not torch.isfinite(sims).all():
        raise FloatingPointError(
            "The model's features are not finite: its weights are spoiled, or they overflow in "
            "run.amp. Evaluate an earlier checkpoint, or set run.amp to null."
        )
    if settings.k_test == 0:
        return sims, sims.t().clone()
    chosen_v2t = _shortlist(sims, settings.k_test)
    readable = sims.clone()  # an unreadable input must not displace others from a shortlist
    readable[list(gallery.unreadable)] = float("-inf")
    chosen_t2v = _shortlist(readable.t(), settings.k_test).t()
    matching = _rerank(model, gallery, chosen_v2t | chosen_t2v, settings.rerank_batch)
    matching += settings.itc_weight * sims
    outside = OUTSIDE_SHORTLIST + sims
    return (
        torch.where(chosen_v2t, matching, outside),
        torch.where(chosen_t2v, matching, outside).t(),
    )


def encode_texts(model: BlipUniAdapterRetrieval, texts: list[str]) -> tuple[TextFeatures, Tensor]:
    """Encode texts, each rank its share; every rank must call it.

    Returns:
        All texts, padded to the longest, and their (texts,) lengths in tokens, on the CPU.
    """
    tokens = model.tokenize(texts)
    lengths = tokens["attention_mask"].sum(dim=1).cpu()
    feat = torch.zeros(len(texts), model.embed_dim, device=model.device)
    batches = lengths.argsort(stable=True).split(TEXT_BATCH)
    for batch in batches[get_rank() :: get_world_size()]:
        feat[batch] = model.encode_text([texts[i] for i in batch.tolist()]).feat.to(feat.dtype)
    feat = _sum_over_ranks(feat)
    return TextFeatures(tokens["input_ids"], tokens["attention_mask"], None, feat), lengths


def _encode_visuals(
    model: BlipUniAdapterRetrieval, data_loader: DataLoader, number: int, feature_memory: float
) -> tuple[Tensor, Tensor, Tensor, Mapping[int, Unreadable]]:
    """``feat``, ``embeds``, ``frame_feat`` and ``unreadable`` of a ``_Gallery``.

    A rank encodes its share alone, whether or not the loader is sharded or repeats items.
    """
    rank, world = get_rank(), get_world_size()
    share = len(range(rank, number, world))
    feat = torch.zeros(number, model.embed_dim, device=model.device)
    seen = torch.zeros(number, dtype=torch.int)
    embeds = frame_feat = torch.empty(0)
    unreadable: dict[int, Unreadable] = {}
    batches = _progress(data_loader, "encode visual inputs", len(data_loader))
    for samples in samples_of(batches, unreadable):
        index = torch.as_tensor(samples["index"]).cpu()
        mine = (index % world == rank) & (seen[index] == 0)
        if not mine.any():
            continue
        index = index[mine]
        encoded = model.encode_visual(visual_input(samples)[mine].to(model.device))
        if not len(embeds):
            embeds = _allocate((share, *encoded.embeds.shape[1:]), encoded.embeds, feature_memory)
            frame_feat = encoded.frame_feat.new_empty(share, *encoded.frame_feat.shape[1:])
        feat[index] = encoded.feat.to(feat.dtype)
        embeds[index // world] = encoded.embeds.cpu()
        frame_feat[index // world] = encoded.frame_feat
        seen[index] = 1
    if missing := torch.where(_sum_over_ranks(seen.to(model.device)) == 0)[0].tolist():
        raise RuntimeError(
            f"{len(missing)} of {number} visual inputs were not encoded, the first at index "
            f"{missing[0]}. The evaluation sampler must cover the gallery: do not shuffle it."
        )
    return _sum_over_ranks(feat), embeds, frame_feat, gather_unreadable(unreadable)


def _allocate(shape: Sequence[int], like: Tensor, memory: float) -> Tensor:
    """A CPU tensor: in memory, or in a temporary file if it takes more than so many gigabytes."""
    elements = torch.Size(shape).numel()
    gigabytes = elements * like.dtype.itemsize / 1e9
    if gigabytes <= memory:
        return torch.empty(shape, dtype=like.dtype)
    free = shutil.disk_usage(tempfile.gettempdir()).free / 1e9
    if free < gigabytes:
        raise ConfigError(
            f"The gallery's visual features take {gigabytes:.1f} GB, more than run.feature_memory "
            f"({memory:g}) and than what is free in {tempfile.gettempdir()} ({free:.1f}). Set "
            "TMPDIR to a larger disk, raise run.feature_memory, or evaluate on more processes."
        )
    logger.info("%.1f GB of visual features are kept on disk (run.feature_memory)", gigabytes)
    with tempfile.NamedTemporaryFile(prefix="visual-features-") as file:
        # The mapping outlives the file's name, so nothing is left behind, even by a crash.
        flat = torch.from_file(file.name, shared=True, size=elements, dtype=like.dtype)
    return flat.view(shape)


def _shortlist(sims: Tensor, k_test: int) -> Tensor:
    """(queries, candidates) bool, True for the ``k_test`` most similar of each query, or all."""
    best = sims.topk(min(k_test, sims.shape[1]), dim=1).indices
    return torch.zeros_like(sims, dtype=torch.bool).scatter_(1, best, True)


def _rerank(
    model: BlipUniAdapterRetrieval, gallery: _Gallery, chosen: Tensor, rerank_batch: int
) -> Tensor:
    """Matching scores of the chosen (visual, text) pairs, zero elsewhere; (visuals, texts)."""
    rank, world = get_rank(), get_world_size()
    scores = torch.zeros(chosen.shape, device=model.device)
    mine = chosen[rank::world].cpu()
    with _progress(None, "rerank pairs", int(mine.sum())) as progress:
        for group in _groups(mine.sum(dim=1).tolist(), rerank_batch):
            visual, text = mine[group].nonzero(as_tuple=True)
            embeds = gallery.embeds[group].to(model.device)
            feat, frame_feat = gallery.feat[rank::world][group], gallery.frame_feat[group]
            match = model.matcher(VisualFeatures(embeds, feat, frame_feat))
            for pairs in gallery.lengths[text].argsort(stable=True).split(rerank_batch):
                v, t = visual[pairs], text[pairs]
                texts = gallery.texts[t.to(model.device)].cut(int(gallery.lengths[t].max()))
                logits = match(texts, v.to(model.device))
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


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Merge tensors of which each rank has filled its own part, zero elsewhere."""
    if get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _progress(iterable: Iterable | None, description: str, total: int) -> tqdm:
    hidden = not is_main_process()
    return tqdm(iterable, description, total, leave=False, disable=hidden, mininterval=0.5)
