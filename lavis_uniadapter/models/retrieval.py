"""BLIP retrieval for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
from lavis_uniadapter.backbone.features import TextFeatures, VisualFeatures, visual_input
from lavis_uniadapter.backbone.vision import encode_frames
from lavis_uniadapter.backbone.visual_memory import VisualMemory, frame_aware_weights
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.common.schema.methods import MethodConfig
from lavis_uniadapter.common.schema.model import RetrievalModel
from lavis_uniadapter.evaluation.two_stage import Matcher, two_stage_scores
from lavis_uniadapter.models.base import DEFAULT_SET, TunedBlip
from lavis_uniadapter.models.contrastive_queue import ContrastiveQueueMixin
from lavis_uniadapter.models.momentum import MomentumAverage

# Label of pairs that the matching loss ignores.
IGNORED = -100


@registry.register_model("blip_uniadapter_retrieval")
class BlipUniAdapterRetrieval(TunedBlip, ContrastiveQueueMixin, BlipBase):
    """BLIP for image-text and video-text retrieval on a frozen backbone (UniAdapter).

    Model types: ``coco``, ``flickr`` (images, 384 px), ``msrvtt``, ``didemo`` (video, 224 px) and
    ``shapes`` (the small model of the embedded example).

    Usage:
        >>> import lavis_uniadapter
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_uniadapter_retrieval", "msrvtt")
    """

    CONFIG = RetrievalModel
    PRETRAINED_MODEL_CONFIG_DICT = RetrievalModel.files()
    HEADS = ("vision_proj", "text_proj", "itm_head")
    TEXT_MODE = True

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        tokenizer: BertTokenizer,
        *,
        queue_size: int = 57600,
        alpha: float = 0.4,
        alpha_rampup_epochs: float = 2,
        embed_dim: int = 256,
        momentum: float = 0.995,
        adapter_momentum: float = 0.990025,
        negative_all_rank: bool = True,
        max_txt_len: int = 35,
    ):
        """BLIP alone; ``load_base`` and ``attach_tuning`` follow (``from_config`` does all)."""
        lavis_versions.init_blip(self)
        self.tokenizer = tokenizer
        self.visual_encoder = image_encoder
        self.text_encoder = text_encoder
        text_width = text_encoder.config.hidden_size
        self.vision_proj = nn.Linear(image_encoder.vision_width, embed_dim)
        self.text_proj = nn.Linear(text_width, embed_dim)
        self.itm_head = nn.Linear(text_width, 2)
        self.temp = nn.Parameter(0.07 * torch.ones([]))
        self.embed_dim = embed_dim
        self._init_queue(embed_dim, queue_size)
        self.alpha = alpha
        self.alpha_rampup_epochs = alpha_rampup_epochs
        self.momentum = momentum
        self.adapter_momentum = adapter_momentum
        self.negative_all_rank = negative_all_rank
        self.max_txt_len = max_txt_len
        self.load_base(None)

    @classmethod
    def build_text_models(cls, med_config: str, visual_width: int) -> dict[str, nn.Module]:
        return {"text_encoder": build_text_encoder(med_config, visual_width)}

    def attach_tuning(self, tuning: str, method_config: MethodConfig, **kwargs) -> None:
        super().attach_tuning(tuning, method_config, **kwargs)
        trained = self.trainable_parameters()
        groups = (
            ([name for name in trained if name.startswith(f"{module}.")], decay)
            for module, decay in self._averaged_modules()
        )
        self.momentum_average = MomentumAverage(self, groups)

    def _averaged_modules(self) -> Iterator[tuple[str, float]]:
        """Modules that contrastive features depend on, and their decay in the average."""
        for module in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
            yield module, self.momentum
        if self.adapters.active is not None:
            prefix = f"adapters.{self.adapters.active}"
            for child, _ in self.adapters.active_set.named_children():
                if child not in ("heads", "key_value"):
                    yield f"{prefix}.{child}", self.adapter_momentum
            yield f"{prefix}.heads.vision_proj", self.momentum
            yield f"{prefix}.heads.text_proj", self.momentum

    def reset_momentum(self) -> None:
        self.momentum_average.reset()

    def load_adapter(self, folder, name="default", force=False):
        super().load_adapter(folder, name, force)
        if self._trains(name):
            self.reset_momentum()

    def merge_adapter(self) -> None:
        super().merge_adapter()
        self.momentum_average = MomentumAverage(self, [])  # nothing trains any more

    # --- encoding and matching ------------------------------------------------------------------

    def encode_visual(self, samples: Mapping[str, Any] | Tensor) -> VisualFeatures:
        """Encode images or videos.

        Args:
            samples: a tensor (batch, 3, H, W) or (batch, 3, frames, H, W), or a dict that holds it
                as ``image`` or ``video``.

        Raises:
            ValueError: for another shape.
        """
        embeds = encode_frames(self.visual_encoder, visual_input(samples))
        frame_cls = embeds[:, :, 0]
        return VisualFeatures(
            embeds=embeds.flatten(1, 2),
            feat=F.normalize(self.apply_head("vision_proj", frame_cls.mean(dim=1)), dim=-1),
            frame_feat=F.normalize(self.apply_head("vision_proj", frame_cls), dim=-1),
        )

    def tokenize(self, texts: Sequence[str], padding: str = "longest") -> BatchEncoding:
        """Token ids and mask, cut at ``max_txt_len``, on the model's device."""
        tokens = self.tokenizer(
            list(texts),
            padding=padding,
            truncation=True,
            max_length=self.max_txt_len,
            return_tensors="pt",
        )
        return self.on_device(tokens)

    def encode_text(self, texts: str | Sequence[str] | BatchEncoding) -> TextFeatures:
        """Encode texts (one, several, or the output of ``tokenize``) in text mode."""
        texts = [texts] if isinstance(texts, str) else texts
        tokens = self.tokenize(texts) if isinstance(texts, list | tuple) else texts
        embeds = self.text_encoder.forward_text(tokens).last_hidden_state
        return TextFeatures(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            embeds=embeds,
            feat=F.normalize(self.apply_head("text_proj", embeds[:, 0]), dim=-1),
        )

    def match_hidden(
        self, texts: TextFeatures, memory: VisualMemory, visual_index: Tensor, frame_feat: Tensor
    ) -> Tensor:
        """Hidden states (pairs, length, width) of texts attending to one visual input each.

        Args:
            texts: one text per pair.
            memory: the projected visual inputs.
            visual_index: (pairs,) the visual input that each text is paired with.
            frame_feat: (visuals, frames, embed_dim) of the inputs in memory; read only if the
                active adapter has frame-aware attention.
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

    def matcher(self, visuals: VisualFeatures) -> Matcher:
        """Project visual inputs once, for any number of calls of the function returned.

        It takes one text per pair and the (pairs,) indices of the visual inputs they are paired
        with, and returns matching logits (pairs, 2), of which column 1 stands for a match.
        """
        memory = self.text_encoder.encoder.project(visuals.embeds)

        def match(texts: TextFeatures, visual_index: Tensor) -> Tensor:
            hidden = self.match_hidden(texts, memory, visual_index, visuals.frame_feat)
            return self.apply_head("itm_head", hidden[:, 0])

        return match

    def match(
        self, texts: TextFeatures, visuals: VisualFeatures, visual_index: Tensor | None = None
    ) -> Tensor:
        """Matching logits (pairs, 2); see ``matcher``.

        Args:
            visual_index: by default each text is paired with the visual input at its position.
        """
        if visual_index is None:
            visual_index = torch.arange(len(texts.input_ids), device=texts.input_ids.device)
        return self.matcher(visuals)(texts, visual_index)

    # --- training -------------------------------------------------------------------------------

    def forward(self, samples: Mapping[str, Any]) -> BlipOutput:
        """Contrastive and matching loss of a batch (``lavis`` ``BlipRetrieval.forward``).

        Args:
            samples: ``image`` (B, 3, H, W) or ``video`` (B, 3, T, H, W); ``text_input``, B
                strings; ``image_id`` (B,), equal for items that show the same; ``epoch``,
                ``iters`` and ``num_iters_per_epoch`` for the ramp-up of ``alpha``.

        Returns:
            BlipOutput with ``loss``, ``loss_itc``, ``loss_itm``, similarities and intermediates.

        A loss that is not finite is returned as it is; the training loop skips the step.
        """
        if self.training and self.adapters.active and not self._trains(self.adapters.active):
            raise ValueError(
                f"The active adapter '{self.adapters.active}' is not the one that trains. "
                f"Call set_adapter('{DEFAULT_SET}') first."
            )
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        ids = lavis_versions.numbers(samples["image_id"], self.device).view(-1, 1)
        gathers_texts = self.negative_all_rank and get_world_size() > 1
        tokens = self.tokenize(
            samples["text_input"], padding="max_length" if gathers_texts else "longest"
        )
        # Averages first, while no activations are kept for the backward pass.
        self.momentum_average.update()
        with self.momentum_average.swapped_in():
            momentum = self.encode_visual(samples), self.encode_text(tokens)
        visuals = self.encode_visual(samples)
        texts = self.encode_text(tokens)

        loss_itc, sims = self._contrastive_loss(samples, visuals, texts, *momentum, ids)
        loss_itm, itm = self._matching_loss(visuals, texts, ids)
        return BlipOutput(
            loss=loss_itc + loss_itm,
            loss_itc=loss_itc,
            loss_itm=loss_itm,
            sims=sims,
            intermediate_output=BlipIntermediateOutput(
                image_embeds=visuals.embeds,
                text_embeds=texts.embeds,
                image_embeds_m=momentum[0].embeds,
                text_embeds_m=momentum[1].embeds,
                itm_logits=itm[0],
                itm_labels=itm[1],
            ),
        )

    def _contrastive_loss(self, samples, visuals, texts, visuals_m, texts_m, ids):
        alpha = self.alpha * self._rampup_factor(
            samples["epoch"], samples["iters"], samples["num_iters_per_epoch"]
        )
        # In float32 also under autocast: similarities are divided by a small temperature.
        with torch.autocast(self.device.type, enabled=False):
            visual_feat, text_feat = visuals.feat.float(), texts.feat.float()
            visual_feat_m, text_feat_m = visuals_m.feat.float(), texts_m.feat.float()
            with torch.no_grad():
                same = torch.eq(ids, torch.cat([ids.t(), self.idx_queue], dim=1)).float()
                hard_targets = same / same.sum(1, keepdim=True)
                image_feat_all = torch.cat([visual_feat_m.t(), self.image_queue], dim=1)
                text_feat_all = torch.cat([text_feat_m.t(), self.text_queue], dim=1)
                sim_i2t_m = visual_feat_m @ text_feat_all / self.temp
                sim_t2i_m = text_feat_m @ image_feat_all / self.temp
                targets_i2t, targets_t2i = (
                    alpha * sim.softmax(dim=1) + (1 - alpha) * hard_targets
                    for sim in (sim_i2t_m, sim_t2i_m)
                )
            sim_i2t = visual_feat @ text_feat_all / self.temp
            sim_t2i = text_feat @ image_feat_all / self.temp
            loss = sum(
                -(sim.log_softmax(dim=1) * targets).sum(dim=1).mean()
                for sim, targets in ((sim_i2t, targets_i2t), (sim_t2i, targets_t2i))
            )
        self._dequeue_and_enqueue(visual_feat_m, text_feat_m, ids)
        sims = BlipSimilarity(
            sim_i2t=sim_i2t,
            sim_t2i=sim_t2i,
            sim_i2t_m=sim_i2t_m,
            sim_t2i_m=sim_t2i_m,
            sim_i2t_targets=targets_i2t,
            sim_t2i_targets=targets_t2i,
        )
        return loss / 2, sims

    def _matching_loss(self, visuals: VisualFeatures, texts: TextFeatures, ids: Tensor):
        """Loss of positives, and of a hard negative visual and a hard negative text for each item.

        The three groups are one batch of pairs over the batch's own visual memory; only negatives
        from all ranks add visual inputs to it. An item without any negative also has pairs, so
        that shapes do not depend on values on the device; the loss ignores them.
        """
        own = torch.arange(len(ids), device=ids.device)
        from_ranks = self.negative_all_rank and get_world_size() > 1
        pool = self._gather(visuals, texts, ids) if from_ranks else (visuals, texts, ids)
        pool_visuals, pool_texts, pool_ids = pool
        with torch.no_grad(), torch.autocast(ids.device.type, enabled=False):
            same = torch.eq(ids, pool_ids.t())
            negative_visual, has_negative = _sample_negatives(
                texts.feat @ pool_visuals.feat.t() / self.temp, same
            )
            negative_text, _ = _sample_negatives(
                visuals.feat @ pool_texts.feat.t() / self.temp, same
            )
        positive_text = own + get_rank() * len(ids) if from_ranks else own
        text_index = torch.cat([positive_text, positive_text, negative_text])
        pair_texts = TextFeatures(
            input_ids=pool_texts.input_ids[text_index],
            attention_mask=pool_texts.attention_mask[text_index],
            embeds=None,
            feat=pool_texts.feat[text_index],
        )
        if from_ranks:
            pairs = zip(vars(visuals).values(), vars(pool_visuals).values(), strict=True)
            visuals = VisualFeatures(*(torch.cat([x, y[negative_visual]]) for x, y in pairs))
            negative_visual = len(ids) + own
        logits = self.match(pair_texts, visuals, torch.cat([own, negative_visual, own]))
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

    def _rampup_factor(self, epoch: int, iters: int, num_iters_per_epoch: int) -> float:
        """From 0 to 1 over the first ``alpha_rampup_epochs`` (two in LAVIS)."""
        steps = self.alpha_rampup_epochs * num_iters_per_epoch
        return min(1, (epoch * num_iters_per_epoch + iters) / steps) if steps else 1

    def compute_sim_matrix(self, data_loader, task_cfg) -> tuple[np.ndarray, np.ndarray]:
        """Scores for LAVIS's ``retrieval`` task; see ``evaluation.two_stage.two_stage_scores``.

        Returns:
            (visuals, texts) and (texts, visuals) float32 arrays, the same on every rank.
        """
        settings = Evaluation.pick(task_cfg, "run").two_stage
        v2t, t2v = two_stage_scores(self, data_loader, **settings)
        return v2t.cpu().numpy(), t2v.cpu().numpy()


def _sample_negatives(logits: Tensor, same: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each row a column that is not the same item, with softmax(logits) probability.

    Args:
        logits: (rows, columns).
        same: (rows, columns) True where the column shows what the row shows.

    Returns:
        (rows,) columns, and (rows,) whether the row has any negative. MSR-VTT has 20 captions per
        video, so a small batch may show a single video.
    """
    has_negative = ~same.all(dim=1)
    weights = logits.masked_fill(same, float("-inf")).softmax(dim=1)
    # Without negatives, or if a similarity is NaN, draw any column.
    weights = weights.nan_to_num(0.0)
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, torch.ones_like(weights))
    # The draw of torch.multinomial, which in some releases waits for the device.
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1), has_negative
