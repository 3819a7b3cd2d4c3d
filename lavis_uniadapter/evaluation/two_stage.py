"""Two-stage retrieval scores, each thing computed once.

BLIP shortlists candidates by contrastive similarity and reorders them by its matching head
(``lavis.models.albef_models.compute_sim_matrix``). Here keys and values of a visual input are
projected once, every text shortlisted with it in either direction is scored against them, and
they are dropped; a pair shortlisted both ways is scored once; texts are as long as they are.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process
from torch import Tensor
from tqdm import tqdm

from lavis_uniadapter.backbone.features import TextFeatures
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.datasets.reading import unreadable_mask

logger = logging.getLogger(__name__)

# What LAVIS gives to pairs outside the shortlist. The contrastive similarity, at most 1, is added,
# so that they rank below the shortlist and among themselves as the first stage ranked them.
OUTSIDE_SHORTLIST = -100.0
TEXT_BATCH = 256


@dataclass
class _Texts:
    """All texts of a gallery: tokens in ragged form, and unit vectors (texts, embed_dim)."""

    input_ids: list[Tensor]
    feat: Tensor

    def lengths(self) -> Tensor:
        return torch.tensor([len(ids) for ids in self.input_ids])


class VisualStore:
    """Visual embeddings between the two stages: in main memory, or on disk if they are too many.

    A clip of 8 frames of 224 px takes 4.8 MB in float32, an image of 384 px 1.8 MB. On disk they
    are what they are in memory, so that scores do not depend on where they waited.

    Args:
        number: of embeddings that will be added.
        memory: gigabytes that they may take in main memory.
    """

    def __init__(self, number: int, memory: float):
        self._number = number
        self._memory = memory
        self._places: dict[int, int] = {}
        self._embeds: Tensor | None = None
        self._file = None

    def add(self, index: int, embeds: Tensor) -> None:
        """Keep (tokens, width) embeddings of a gallery index."""
        if self._embeds is None:
            self._embeds = self._allocate(embeds.shape, embeds.dtype)
        place = self._places[index] = len(self._places)
        self._embeds[place] = embeds.cpu()

    def _allocate(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        size = self._number * shape.numel() * dtype.itemsize
        if size <= self._memory * 1e9:
            return torch.empty(self._number, *shape, dtype=dtype)
        # unlinked when it is closed, also by a crash
        self._file = tempfile.NamedTemporaryFile(prefix="visual-features-")
        free = shutil.disk_usage(self._file.name).free
        if free < size:
            raise ConfigError(
                f"The gallery's visual features take {size / 1e9:.1f} GB, more than "
                f"run.feature_memory {self._memory:g} allows in memory and than the "
                f"{free / 1e9:.1f} GB free in {tempfile.gettempdir()}. Set TMPDIR to a larger "
                "disk, raise run.feature_memory, or evaluate on more processes."
            )
        logger.info(
            "%.1f GB of visual features wait on disk (run.feature_memory %g)",
            size / 1e9,
            self._memory,
        )
        flat = torch.from_file(
            self._file.name, shared=True, size=self._number * shape.numel(), dtype=dtype
        )
        return flat.view(self._number, *shape)

    def __contains__(self, index: int) -> bool:
        return index in self._places

    def indices(self) -> list[int]:
        """The gallery indices that are kept, in the order in which they came."""
        return list(self._places)

    def stack(self, indices: list[int]) -> Tensor:
        """(indices, tokens, width) embeddings."""
        return self._embeds[[self._places[i] for i in indices]]


@dataclass
class _Visuals:
    """This rank's share of the visual inputs, by gallery index, and all unit vectors."""

    embeds: VisualStore
    frame_feat: dict[int, Tensor]
    feat: Tensor


@torch.no_grad()
def two_stage_scores(
    model,
    data_loader,
    *,
    k_test: int,
    itc_weight: float,
    rerank_batch: int,
    feature_memory: float = 16.0,
) -> tuple[Tensor, Tensor]:
    """Score a gallery both ways.

    Args:
        model: has ``encode_text``, ``encode_visual`` and ``match_hidden``.
        data_loader: over a LAVIS retrieval evaluation dataset, whole or sharded over ranks.
        k_test: candidates that are reranked per query; 0: contrastive similarities alone.
        itc_weight: added to the matching score times the similarity; the released code uses 0,
            LAVIS 1.
        rerank_batch: pairs scored at once, which bounds memory.
        feature_memory: gigabytes of visual features that each rank keeps in memory between the
            two stages; where its share of the gallery takes more, they wait on disk.

    Returns:
        (visuals, texts) and (texts, visuals) scores on the model's device, equal on every rank. A
        visual input that could not be read (``allow_missing``) scores lowest of all for its texts,
        and its texts for it: it counts as wrong both ways.

    Raises:
        FloatingPointError: if similarities are not finite.
        RuntimeError: if a visual input was encoded by no rank or by several.
    """
    was_training = model.training
    model.eval()
    try:
        texts = _encode_texts(model, list(data_loader.dataset.text))
        visuals = _encode_visuals(model, data_loader, feature_memory)
        with torch.autocast(model.device.type, enabled=False):
            sims = visuals.feat @ texts.feat.t()
        if not torch.isfinite(sims).all():
            raise FloatingPointError(
                "The model's features are not finite: its weights are spoiled, or overflow in "
                "run.amp. Evaluate an earlier checkpoint, or set run.amp to null."
            )
        unreadable = unreadable_mask(data_loader, sims.device)
        if k_test == 0:
            return _count_as_wrong(sims, sims.t(), unreadable, data_loader.dataset)
        chosen_v2t = _shortlist(sims, k_test, "texts")
        chosen_t2v = _shortlist(sims.t(), k_test, "visual inputs").t()
        matching = _rerank(model, texts, visuals, chosen_v2t | chosen_t2v, rerank_batch)
        matching += itc_weight * sims
        outside = OUTSIDE_SHORTLIST + sims
        return _count_as_wrong(
            torch.where(chosen_v2t, matching, outside),
            torch.where(chosen_t2v, matching, outside).t(),
            unreadable,
            data_loader.dataset,
        )
    finally:
        model.train(was_training)


def _count_as_wrong(
    scores_v2t: Tensor, scores_t2v: Tensor, unreadable: Tensor, dataset
) -> tuple[Tensor, Tensor]:
    """Give what was not seen the lowest score both ways, whoever sorts the scores."""
    if not unreadable.any():
        return scores_v2t, scores_t2v
    scores_v2t, scores_t2v = scores_v2t.clone(), scores_t2v.clone()
    scores_t2v[:, unreadable] = float("-inf")
    for index in torch.nonzero(unreadable).flatten().tolist():
        scores_v2t[index] = 0
        scores_v2t[index, dataset.img2txt[index]] = float("-inf")
    return scores_v2t, scores_t2v


def _sum_over_ranks(x: Tensor) -> Tensor:
    """Merge tensors of which each rank has filled its own part, zero elsewhere."""
    if get_world_size() > 1:
        dist.all_reduce(x)
    return x


def _progress(iterable, description: str, total: int | None = None):
    return tqdm(
        iterable,
        desc=description,
        total=total,
        leave=False,
        disable=not is_main_process(),
        mininterval=0.5,
    )


def _encode_texts(model, texts: list[str]) -> _Texts:
    input_ids = [
        torch.tensor(ids)
        for ids in model.tokenizer(texts, truncation=True, max_length=model.max_txt_len).input_ids
    ]
    by_length = sorted(range(len(texts)), key=lambda i: len(input_ids[i]))
    batches = [by_length[i : i + TEXT_BATCH] for i in range(0, len(texts), TEXT_BATCH)]
    feat = None
    for batch in batches[get_rank() :: get_world_size()]:
        encoded = model.encode_text([texts[i] for i in batch])
        if feat is None:
            feat = encoded.feat.new_zeros(len(texts), encoded.feat.shape[1])
        feat[batch] = encoded.feat
    if feat is None:  # more ranks than batches of texts
        feat = torch.zeros(len(texts), model.text_proj.out_features, device=model.device)
    return _Texts(input_ids, _sum_over_ranks(feat))


def _encode_visuals(model, data_loader, feature_memory: float) -> _Visuals:
    """Encode this rank's share: the items whose index falls to it, whether or not the loader is
    sharded, so an item that a sampler repeats to even out the ranks still counts once."""
    number = len(data_loader.dataset)
    rank, world = get_rank(), get_world_size()
    feat = torch.zeros(number, model.vision_proj.out_features, device=model.device)
    times_seen = torch.zeros(number, dtype=torch.long, device=model.device)
    embeds = VisualStore(len(range(rank, number, world)), feature_memory)
    frame_feat: dict[int, Tensor] = {}
    for samples in _progress(data_loader, "encode visual inputs", len(data_loader)):
        x = samples["video"] if "video" in samples else samples["image"]
        index = torch.as_tensor(samples["index"]).cpu()
        mine = [
            place for place, i in enumerate(index.tolist()) if i % world == rank and i not in embeds
        ]
        if not mine:
            continue
        encoded = model.encode_visual(x[mine].to(model.device))
        index = index[mine]
        feat[index] = encoded.feat.to(feat.dtype)
        times_seen[index] += 1
        for place, i in enumerate(index.tolist()):
            embeds.add(i, encoded.embeds[place])
            frame_feat[i] = encoded.frame_feat[place]
    times_seen = _sum_over_ranks(times_seen)
    if not bool((times_seen == 1).all()):
        wrong = torch.nonzero(times_seen != 1).flatten().tolist()
        raise RuntimeError(
            f"{len(wrong)} of {number} visual inputs were not encoded exactly once, the first at "
            f"index {wrong[0]}. The evaluation sampler must cover the gallery: do not shuffle it."
        )
    return _Visuals(embeds, frame_feat, _sum_over_ranks(feat))


def _shortlist(sims: Tensor, k_test: int, what: str) -> Tensor:
    """(queries, candidates) bool, True for each query's k_test likeliest."""
    available = sims.shape[1]
    if k_test > available:
        logger.info("k_test %d exceeds the gallery's %d %s: all rerank.", k_test, available, what)
    chosen = torch.zeros_like(sims, dtype=torch.bool)
    best = sims.topk(min(k_test, available), dim=1).indices
    return chosen.scatter_(1, best, True)


def _rerank(model, texts: _Texts, visuals: _Visuals, chosen: Tensor, rerank_batch: int) -> Tensor:
    """Matching score of each chosen (visual, text) pair, zero elsewhere; (visuals, texts)."""
    scores = torch.zeros(chosen.shape, device=model.device)
    lengths = texts.lengths()
    wanted = {i: torch.nonzero(chosen[i].cpu()).flatten() for i in visuals.embeds.indices()}
    number = sum(len(text_index) for text_index in wanted.values())
    with tqdm(
        total=number, desc="rerank pairs", leave=False, disable=not is_main_process()
    ) as progress:
        for group in _groups(wanted, rerank_batch):
            memory = model.text_encoder.project(visuals.embeds.stack(group).to(model.device))
            frame_feat = torch.stack([visuals.frame_feat[i] for i in group])
            text_index = torch.cat([wanted[i] for i in group])
            place = torch.cat([torch.full((len(wanted[i]),), p) for p, i in enumerate(group)])
            by_length = torch.argsort(lengths[text_index], stable=True)
            for pairs in by_length.split(rerank_batch):
                scores[torch.tensor(group)[place[pairs]], text_index[pairs]] = _score_pairs(
                    model, texts, memory, frame_feat, text_index[pairs], place[pairs]
                )
                progress.update(len(pairs))
    return _sum_over_ranks(scores)


def _groups(wanted: dict[int, Tensor], rerank_batch: int) -> Iterator[list[int]]:
    """Visual inputs to hold in memory together: one, or as few as fill a batch of pairs."""
    group: list[int] = []
    pairs = 0
    for i, text_index in wanted.items():
        group.append(i)
        pairs += len(text_index)
        if pairs >= rerank_batch:
            yield group
            group, pairs = [], 0
    if group:
        yield group


def _score_pairs(
    model, texts: _Texts, memory, frame_feat: Tensor, text_index: Tensor, place: Tensor
) -> Tensor:
    ids = [texts.input_ids[i] for i in text_index.tolist()]
    padded = torch.nn.utils.rnn.pad_sequence(
        ids, batch_first=True, padding_value=model.tokenizer.pad_token_id
    )
    length = torch.tensor([len(i) for i in ids])
    mask = (torch.arange(padded.shape[1])[None] < length[:, None]).long()
    batch = TextFeatures(
        input_ids=padded.to(model.device),
        attention_mask=mask.to(model.device),
        embeds=None,
        feat=texts.feat[text_index.to(texts.feat.device)],
    )
    hidden = model.match_hidden(batch, memory, place.to(model.device), frame_feat)
    return model.apply_head("itm_head", hidden[:, 0])[:, 1]
