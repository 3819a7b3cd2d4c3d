"""BLIP retrieval for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lavis.common.dist_utils import get_rank, get_world_size
from lavis.common.registry import registry
from lavis.models.base_model import all_gather_with_grad, concat_all_gather
from lavis.models.blip_models.blip import BlipBase
from lavis.models.blip_models.blip_outputs import (
    BlipIntermediateOutput,
    BlipOutput,
    BlipSimilarity,
)
from torch import Tensor, nn
from transformers import BatchEncoding, BertTokenizer

from lavis_uniadapter.backbone.build import build_text_encoder
from lavis_uniadapter.backbone.features import (
    TextFeatures,
    VisualFeatures,
    check_lengths,
    texts_of,
    visual_input,
)
from lavis_uniadapter.backbone.vision import encode_frames
from lavis_uniadapter.backbone.visual_memory import VisualMemory, frame_aware_weights
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.common.schema.model import RetrievalModel
from lavis_uniadapter.evaluation.two_stage import score_gallery
from lavis_uniadapter.models.base import DEFAULT_SET, TunedBlip
from lavis_uniadapter.models.momentum import MomentumAverage

# Modules that contrastive features depend on.
CONTRASTIVE = ("visual_encoder.", "text_encoder.", "vision_proj.", "text_proj.")
IGNORED = -100  # label of pairs that the matching loss ignores
EMPTY_ID = -100  # of entries of the queue that no batch has filled yet


@registry.register_model("blip_uniadapter_retrieval")
class BlipUniAdapterRetrieval(TunedBlip, BlipBase):
    """BLIP for image-text and video-text retrieval on a frozen backbone (UniAdapter).

    Usage:
        >>> import lavis_uniadapter
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_uniadapter_retrieval", "msrvtt")
    """

    CONFIG = RetrievalModel
    PRETRAINED_MODEL_CONFIG_DICT = RetrievalModel.files()
    HEADS = ("vision_proj", "text_proj", "itm_head")
    TEXT_MODE = True

    def __init__(self, section: RetrievalModel, tokenizer: BertTokenizer | None = None):
        super().__init__(section, tokenizer)
        text_width = self.text_encoder.config.hidden_size
        self.embed_dim = section.embed_dim
        self.vision_proj = nn.Linear(self.visual_encoder.vision_width, self.embed_dim)
        self.text_proj = nn.Linear(text_width, self.embed_dim)
        self.itm_head = nn.Linear(text_width, 2)
        self.temp = nn.Parameter(0.07 * torch.ones([]))
        self.queue_size = section.queue_size
        for name in ("image_queue", "text_queue"):
            features = torch.randn(self.embed_dim, self.queue_size)
            self.register_buffer(name, F.normalize(features, dim=0))
        self.register_buffer("idx_queue", torch.full((1, self.queue_size), EMPTY_ID))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def build_text_models(self, med_config: str, visual_width: int) -> None:
        self.text_encoder = build_text_encoder(med_config, visual_width)

    def attach_tuning(self) -> None:
        super().attach_tuning()
        self.reset_momentum()

    def reset_momentum(self) -> None:
        decays = {name: self._decay(name) for name in self.trainable_parameters()}
        averaged = {name: decay for name, decay in decays.items() if decay is not None}
        self.momentum_average = MomentumAverage(self, averaged)

    def _decay(self, name: str) -> float | None:
        """Decay of a parameter's average; None if contrastive features do not depend on it."""
        own = name.removeprefix(f"adapters.{DEFAULT_SET}.")
        if own.removeprefix("heads.").startswith(CONTRASTIVE):
            return self.section.momentum
        if own == name or own.startswith(("heads.", "key_value.")):
            return None
        return self.section.adapter_momentum

    # --- encoding and matching ------------------------------------------------------------------

    def encode_visual(self, samples: Mapping[str, Any] | Tensor) -> VisualFeatures:
        """Encode the images or videos of a batch; raises as ``visual_input``."""
        embeds = encode_frames(self.visual_encoder, visual_input(samples))
        frame_cls = embeds[:, :, 0]
        return VisualFeatures(
            embeds=embeds.flatten(1, 2),
            feat=F.normalize(self.apply_head("vision_proj", frame_cls.mean(dim=1)), dim=-1),
            frame_feat=F.normalize(self.apply_head("vision_proj", frame_cls), dim=-1),
            adapter=self.adapter_state(),
        )

    def encode_text(self, texts: str | Sequence[str] | BatchEncoding) -> TextFeatures:
        """Encode texts (one, several, or the output of ``tokenize``); raises as ``text_list``."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = texts if isinstance(texts, BatchEncoding) else self.tokenize(texts)
        embeds = self.text_encoder.forward_text(tokens).last_hidden_state
        return TextFeatures(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            embeds=embeds,
            feat=F.normalize(self.apply_head("text_proj", embeds[:, 0]), dim=-1),
            adapter=self.adapter_state(),
        )

    def match_hidden(
        self, texts: TextFeatures, memory: VisualMemory, visual_index: Tensor, frame_feat: Tensor
    ) -> Tensor:
        """Hidden states (pairs, length, width) of texts, each attending to a visual input.

        Args:
            visual_index: (pairs,) the input in memory that each text is paired with.
            frame_feat: of the inputs in memory; only read for frame-aware attention.
        """
        weights = None
        active = self.adapters.active_set
        if active is not None and active.frame_aware and frame_feat.shape[1] > 1:
            weights = frame_aware_weights(texts.feat, frame_feat[visual_index])
        input_ids = texts.input_ids.clone()
        input_ids[:, 0] = self.tokenizer.enc_token_id
        return self.text_encoder(
            input_ids,
            attention_mask=texts.attention_mask,
            encoder_hidden_states=memory.pairs(visual_index, weights),
            return_dict=True,
        ).last_hidden_state

    def matcher(self, visuals: VisualFeatures) -> Callable[[TextFeatures, Tensor], Tensor]:
        """``match`` for visual inputs that are projected once for any number of calls."""
        memory = self.text_encoder.encoder.project(visuals.embeds)

        def match(texts: TextFeatures, visual_index: Tensor) -> Tensor:
            self._check_features(texts=texts, visuals=visuals)
            hidden = self.match_hidden(texts, memory, visual_index, visuals.frame_feat)
            return self.apply_head("itm_head", hidden[:, 0])

        return match

    def match(
        self,
        texts: TextFeatures,
        visuals: VisualFeatures,
        visual_index: Tensor | Sequence[int] | None = None,
    ) -> Tensor:
        """Matching logits (pairs, 2); column 1 stands for a match.

        Args:
            texts: one text per pair.
            visual_index: (pairs,) the visual input of each text; by default the one beside it.

        Raises:
            TypeError, ValueError: for arguments that do not fit, and features that were encoded
                with another adapter than the active one, or before its weights changed.
        """
        self._check_features(texts=texts, visuals=visuals)
        number = len(visuals.feat)
        if visual_index is None:
            check_lengths(texts=len(texts.feat), visuals=number)
            visual_index = range(number)
        index = torch.as_tensor(visual_index, device=visuals.feat.device)
        if index.dtype not in (torch.int32, torch.int64) or index.ndim != 1:
            raise TypeError("visual_index must be a list of integers.")
        check_lengths(texts=len(texts.feat), visual_index=len(index))
        if ((index < 0) | (index >= number)).any():
            raise ValueError(f"visual_index must have numbers from 0 to {number - 1}.")
        return self.matcher(visuals)(texts, index)

    def _check_features(self, **features: VisualFeatures | TextFeatures) -> None:
        """Refuse what was not encoded, or not with what is active now."""
        for name, given in features.items():
            expected = TextFeatures if name == "texts" else VisualFeatures
            if not isinstance(given, expected):
                raise TypeError(
                    f"{name} must be the {expected.__name__} that encode_{name[:-1]} returns; got "
                    f"{type(given).__name__}."
                )
            if given.adapter is not None and given.adapter != self.adapter_state():
                raise ValueError(
                    f"{name} were encoded with another adapter than the active one, before its "
                    "weights changed, or in another mode (train or eval). Encode them again."
                )

    # --- training -------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> BlipOutput:
        """Contrastive and matching loss of a batch (``lavis`` ``BlipRetrieval.forward``).

        Args:
            samples: ``image`` (B, 3, H, W) or ``video`` (B, 3, T, H, W); ``text_input``, B
                strings; ``image_id`` (B,), equal for items that show the same; ``epoch``,
                ``iters`` and ``num_iters_per_epoch`` for the ramp-up of ``alpha``.

        A loss that is not finite is returned as it is; the training loop skips the step.
        """
        self.check_training()
        texts, ids = texts_of(samples), samples["image_id"]
        check_lengths(text_input=len(texts), visual=len(visual_input(samples)), image_id=len(ids))
        ids = lavis_versions.numbers(ids, self.device).view(-1, 1)
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        gathers_texts = self.section.negative_all_rank and get_world_size() > 1
        tokens = self.tokenize(texts, padding="max_length" if gathers_texts else "longest")
        # Averages first, while no activations are kept for the backward pass.
        self.momentum_average.update()
        with self.momentum_average.swapped_in():
            momentum = self.encode_visual(samples), self.encode_text(tokens)
        online = self.encode_visual(samples), self.encode_text(tokens)

        loss_itc, sims = self._contrastive_loss(samples, *online, *momentum, ids)
        loss_itm, itm = self._matching_loss(*online, ids)
        return BlipOutput(
            loss=loss_itc + loss_itm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            sims=sims,
            intermediate_output=BlipIntermediateOutput(
                image_embeds=online[0].embeds,
                text_embeds=online[1].embeds,
                image_embeds_m=momentum[0].embeds,
                text_embeds_m=momentum[1].embeds,
                itm_logits=itm[0],
                itm_labels=itm[1],
            ),
        )

    def _contrastive_loss(self, samples, visuals, texts, visuals_m, texts_m, ids):
        alpha = self.section.alpha * self._rampup_factor(
            samples["epoch"], samples["iters"], samples["num_iters_per_epoch"]
        )
        # In float32 also under autocast: similarities are divided by a small temperature.
        with torch.autocast(self.device.type, enabled=False):
            visual_feat, text_feat = visuals.feat.float(), texts.feat.float()
            visual_feat_m, text_feat_m = visuals_m.feat.float(), texts_m.feat.float()
            with torch.no_grad():
                same = torch.eq(ids, torch.cat([ids.t(), self.idx_queue], dim=1)).float()
                hard_targets = same / same.sum(1, keepdim=True)
                all_texts = torch.cat([text_feat_m.t(), self.text_queue], dim=1)
                all_visuals = torch.cat([visual_feat_m.t(), self.image_queue], dim=1)
                sims_m = (
                    visual_feat_m @ all_texts / self.temp,
                    text_feat_m @ all_visuals / self.temp,
                )
                targets = [
                    alpha * sim.softmax(dim=1) + (1 - alpha) * hard_targets for sim in sims_m
                ]
            sims = visual_feat @ all_texts / self.temp, text_feat @ all_visuals / self.temp
            loss = sum(
                -(sim.log_softmax(dim=1) * target).sum(dim=1).mean()
                for sim, target in zip(sims, targets, strict=True)
            )
        self._enqueue(visual_feat_m, text_feat_m, ids)
        return loss / 2, BlipSimilarity(*sims, *sims_m, *targets)

    def _matching_loss(self, visuals: VisualFeatures, texts: TextFeatures, ids: Tensor):
        """Loss of positives, and of a negative visual and a negative text for each item.

        An item without any negative also has pairs, so that shapes do not depend on values on the
        device; the loss ignores them.
        """
        own = torch.arange(len(ids), device=ids.device)
        from_ranks = self.section.negative_all_rank and get_world_size() > 1
        pool = self._gather(visuals, texts, ids) if from_ranks else (visuals, texts, ids)
        pool_visuals, pool_texts, pool_ids = pool
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            same = torch.eq(ids, pool_ids.t())
            scale = 1 / self.temp if self.section.hard_negatives else 0
            negative_visual, has_negative = _sample_negatives(
                scale * (texts.feat @ pool_visuals.feat.t()), same
            )
            negative_text, _ = _sample_negatives(scale * (visuals.feat @ pool_texts.feat.t()), same)
        positive_text = own + get_rank() * len(ids) if from_ranks else own
        text_index = torch.cat([positive_text, positive_text, negative_text])
        pair_texts = dataclasses.replace(pool_texts, embeds=None)[text_index]
        if from_ranks:
            names = "embeds", "feat", "frame_feat"
            pairs = [(getattr(visuals, name), getattr(pool_visuals, name)) for name in names]
            visuals = VisualFeatures(*(torch.cat([x, y[negative_visual]]) for x, y in pairs))
            negative_visual = len(ids) + own
        logits = self.matcher(visuals)(pair_texts, torch.cat([own, negative_visual, own]))
        no_match = torch.where(has_negative, 0, IGNORED)
        labels = torch.cat([torch.ones_like(own), no_match, no_match])
        return F.cross_entropy(logits, labels, ignore_index=IGNORED), (logits, labels)

    @staticmethod
    def _gather(visuals: VisualFeatures, texts: TextFeatures, ids: Tensor):
        """The batches of all ranks; gradients flow through the visual tokens."""
        embeds = all_gather_with_grad(visuals.embeds.contiguous())
        others = visuals.feat, visuals.frame_feat, texts.input_ids, texts.attention_mask, texts.feat
        feat, frame_feat, input_ids, attention_mask, text_feat = (
            concat_all_gather(x.contiguous()) for x in others
        )
        return (
            VisualFeatures(embeds, feat, frame_feat),
            TextFeatures(input_ids, attention_mask, None, text_feat),
            concat_all_gather(ids),
        )

    @torch.no_grad()
    def _enqueue(self, image_feat: Tensor, text_feat: Tensor, ids: Tensor) -> None:
        """Replace the queue's oldest entries, also across its end, by all ranks' features and ids.

        Features that are not finite leave the old entry: one bad batch must not spoil the next.
        """
        size = self.queue_size
        if not size:
            return
        image_feat, text_feat, ids = (
            concat_all_gather(x.contiguous())[-size:] for x in (image_feat, text_feat, ids)
        )
        places = (self.queue_ptr + torch.arange(len(ids), device=ids.device)) % size
        finite = (torch.isfinite(image_feat) & torch.isfinite(text_feat)).all(dim=1)
        for queue, new in (
            (self.image_queue, image_feat.T),
            (self.text_queue, text_feat.T),
            (self.idx_queue, ids.T),
        ):
            queue[:, places] = torch.where(finite, new.to(queue.dtype), queue[:, places])
        self.queue_ptr.add_(len(ids)).remainder_(size)

    def _rampup_factor(self, epoch: int, iters: int, num_iters_per_epoch: int) -> float:
        """From 0 to 1 over the first ``alpha_rampup_epochs`` (two in LAVIS)."""
        steps = self.section.alpha_rampup_epochs * num_iters_per_epoch
        return min(1, (epoch * num_iters_per_epoch + iters) / steps) if steps else 1

    def compute_sim_matrix(self, data_loader, task_cfg) -> tuple[np.ndarray, np.ndarray]:
        """(visuals, texts) and (texts, visuals) scores, for LAVIS's ``retrieval`` task."""
        v2t, t2v, _ = score_gallery(self, data_loader, Evaluation.pick(task_cfg, "run"))
        return v2t.cpu().numpy(), t2v.cpu().numpy()


def _sample_negatives(logits: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each row a column that is not the same item, with softmax(logits) probability.

    Returns:
        (rows,) columns, and (rows,) whether the row has any negative: a batch may be one video.
    """
    has_negative = ~same.all(dim=1)
    weights = logits.masked_fill(same, float("-inf")).softmax(dim=1)
    # Without negatives, or if a similarity is NaN, draw any column.
    weights = weights.nan_to_num(0.0)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    # The draw of torch.multinomial, which in some releases waits for the device.
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1), has_negative
