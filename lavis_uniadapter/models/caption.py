"""BLIP captioning for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_caption import BlipCaption
from torch import Tensor
from transformers import BatchEncoding, BertTokenizer

from lavis_uniadapter.backbone.build import build_text_decoder
from lavis_uniadapter.backbone.features import check_lengths, texts_of
from lavis_uniadapter.backbone.visual_memory import VisualMemory
from lavis_uniadapter.common.schema.model import CaptionModel
from lavis_uniadapter.evaluation.text_likelihood import ScoredText, mean_log_likelihood
from lavis_uniadapter.models.base import TunedBlip

logger = logging.getLogger(__name__)


@registry.register_model("blip_uniadapter_caption")
class BlipUniAdapterCaption(TunedBlip, BlipCaption):
    """BLIP captioning of images and video on a frozen backbone (UniAdapter).

    Visual encoder and caption decoder share the adapters; the key/value adapter is on the visual
    tokens, of all frames together, that the decoder attends to.

    Usage:
        >>> import lavis_uniadapter
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_uniadapter_caption", "msrvtt")
        >>> model.generate({"video": vis["eval"]("clip.mp4")[None]})
    """

    CONFIG = CaptionModel
    PRETRAINED_MODEL_CONFIG_DICT = CaptionModel.files()
    SETTINGS = (*TunedBlip.SETTINGS, "prompt")

    def __init__(self, section: CaptionModel, tokenizer: BertTokenizer | None = None):
        super().__init__(section, tokenizer)
        self.prompt = section.prompt
        self.prompt_length = len(self.tokenizer(self.prompt).input_ids) - 1

    def build_text_models(self, med_config: str, visual_width: int) -> None:
        self.text_decoder = build_text_decoder(med_config, visual_width)

    def comment_on_base(self, state: Mapping[str, Tensor]) -> None:
        has_questions = any(key.startswith("text_encoder.") for key in state)
        if has_questions and not any(key.startswith("vision_proj.") for key in state):
            logger.warning(
                "'%s' looks like BLIP's VQA weights, whose decoder attends to questions and has "
                "never seen an image. For captioning, start from pre-training or captioning "
                "weights.",
                self.base_name,
            )

    def forward_encoder(self, samples: Mapping[str, Any]) -> Tensor:
        return self.visual_tokens(samples)

    def forward_decoder(self, samples: Mapping[str, Any], image_embeds: Tensor):
        """Loss of ``text_input``, captions that begin with the prompt (``lavis`` ``BlipCaption``).

        Raises:
            ValueError: for a caption without the prompt, whose first words would not be learnt.
        """
        texts = texts_of(samples)
        check_lengths(text_input=len(texts), visual=len(image_embeds))
        for text in texts:
            if not text.startswith(self.prompt):
                raise ValueError(
                    f"The caption {text!r} does not begin with the model's prompt {self.prompt!r}. "
                    "Give the training text_processor the same prompt as the model."
                )
        return super().forward_decoder({**samples, "text_input": texts}, image_embeds)

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any] | VisualMemory,
        use_nucleus_sampling: bool = False,
        num_beams: int = 3,
        max_length: int = 30,
        min_length: int = 10,
        top_p: float = 0.9,
        repetition_penalty: float = 1.0,
        num_captions: int = 1,
    ) -> list[str]:
        """Captions of images or videos (``lavis`` ``BlipCaption.generate``).

        Args:
            samples: ``image`` (batch, 3, H, W) or ``video`` (batch, 3, frames, H, W), or what
                ``memory`` made of them.
            use_nucleus_sampling: sample from the likeliest tokens of mass ``top_p`` instead of
                searching with ``num_beams``. (LAVIS also keeps only the 50 likeliest tokens and
                penalises repetition by 1.1.)
            max_length, min_length: in tokens, prompt included.
            num_captions: per visual input; the best ones of a beam search.

        Returns:
            batch * num_captions texts without the prompt.

        Raises:
            ValueError: for more captions than ``num_beams``.
        """
        if use_nucleus_sampling:
            method = {"do_sample": True, "top_p": top_p, "top_k": 0}
        else:
            method = {"num_beams": num_beams}
        memory = self.memory(samples)
        prompts = self._tokens([""] * len(memory.states)).input_ids[:, :-1]
        return self.generate_texts(
            prompts,
            memory,
            num_return_sequences=num_captions,
            max_length=max_length,
            min_length=min_length,
            repetition_penalty=repetition_penalty,
            **method,
        )

    def generate_with_scores(self, samples: Mapping[str, Any], **options) -> list[ScoredText]:
        """Captions and their scores; takes the arguments of ``generate``, whose order it keeps."""
        memory = self.memory(samples)
        captions = self.generate(memory, **options)
        scores = self.score_captions(memory, captions).tolist()
        return [ScoredText(*each) for each in zip(captions, scores, strict=True)]

    def score_captions(
        self, samples: Mapping[str, Any] | VisualMemory, captions: Sequence[str]
    ) -> Tensor:
        """Mean log-likelihood per token of captions, (captions,); see ``mean_log_likelihood``.

        Args:
            samples: as for ``generate``.
            captions: without the prompt; as many for each visual input, in their order.
        """
        tokens = self._tokens(captions)
        return mean_log_likelihood(
            self.text_decoder,
            self.memory(samples),
            tokens.input_ids,
            tokens.attention_mask,
            self.prompt_length,
        )

    @torch.no_grad()
    def memory(self, samples: Mapping[str, Any] | VisualMemory) -> VisualMemory:
        """Images or videos as the decoder attends to them, encoded once for several calls."""
        if isinstance(samples, VisualMemory):
            return samples
        return self.text_decoder.project(self.visual_tokens(samples))

    def _tokens(self, captions: Sequence[str]) -> BatchEncoding:
        """Token ids and mask of the prompt, captions and end tokens, as the decoder reads them."""
        tokens = self.tokenize([self.prompt + caption for caption in captions], truncation=False)
        tokens.input_ids[:, 0] = self.tokenizer.bos_token_id
        return tokens
