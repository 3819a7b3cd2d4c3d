"""BLIP captioning for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_caption import BlipCaption
from torch import Tensor, nn
from transformers import BertTokenizer

from lavis_uniadapter.backbone import build_text_decoder, encode_frames
from lavis_uniadapter.backbone.features import visual_input
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.schema.model import CaptionModel
from lavis_uniadapter.models.base import TunedBlip

logger = logging.getLogger(__name__)


@registry.register_model("blip_uniadapter_caption")
class BlipUniAdapterCaption(TunedBlip, BlipCaption):
    """BLIP captioning of images and video on a frozen backbone (UniAdapter).

    Visual encoder and caption decoder share the adapters; the key/value adapter is on the visual
    tokens, of all frames together, that the decoder attends to.

    Model types: ``coco`` (images, 384 px), ``msrvtt`` and ``msvd`` (video, 224 px), and ``shapes``
    (the small model of the embedded example).

    Usage:
        >>> import lavis_uniadapter
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_uniadapter_caption", "msrvtt")
        >>> model.generate({"video": vis["eval"]("clip.mp4")[None]})
    """

    CONFIG = CaptionModel
    PRETRAINED_MODEL_CONFIG_DICT = CaptionModel.files()
    SETTINGS = (*TunedBlip.SETTINGS, "prompt")
    OUTPUT_LAYERS = ("text_decoder.cls.predictions.transform",)

    def __init__(
        self,
        image_encoder: nn.Module,
        text_decoder: nn.Module,
        tokenizer: BertTokenizer,
        *,
        prompt: str = "",
        max_txt_len: int = 40,
    ):
        """BLIP alone; ``load_base`` and ``attach_tuning`` follow (``from_config`` does all).

        Args:
            prompt: what every caption begins with, in training and generation.
        """
        lavis_versions.init_blip(self)  # BlipCaption's own asks the hub for its tokenizer
        self.tokenizer = tokenizer
        self.visual_encoder = image_encoder
        self.text_decoder = text_decoder
        self.prompt = prompt
        self.prompt_length = len(tokenizer(prompt).input_ids) - 1
        self.max_txt_len = max_txt_len
        self.load_base(None)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> BlipUniAdapterCaption:
        """Build from the ``model:`` section of a configuration.

        Raises:
            ConfigError: unknown key or impossible value, by name.
            CheckpointError: weights that do not fit, by name.
        """
        section = cls.CONFIG.read(cfg, "model")
        visual_encoder = cls.build_visual_encoder(section)
        text_decoder = build_text_decoder(cls.med_config(section), visual_encoder.vision_width)
        model = cls(
            visual_encoder,
            text_decoder,
            cls.build_tokenizer(section.tokenizer, text_decoder.config.vocab_size),
            prompt=section.prompt,
            max_txt_len=section.max_txt_len,
        )
        model.finish_building(section)
        return model

    def _text_encoders(self) -> dict[str, nn.Module]:
        return {"text_decoder": self.text_decoder.bert}

    def comment_on_base(self, state: Mapping[str, Tensor]) -> None:
        has_questions = any(key.startswith("text_encoder.") for key in state)
        if has_questions and not any(key.startswith("vision_proj.") for key in state):
            logger.warning(
                "'%s' looks like BLIP's VQA weights, whose decoder attends to questions and has "
                "never seen an image. Captioning starts better from pre-training or captioning.",
                self.base_name,
            )

    def forward_encoder(self, samples: Mapping[str, Any]) -> Tensor:
        """Visual tokens (batch, frames * tokens, width) of ``image`` or ``video``."""
        return encode_frames(self.visual_encoder, visual_input(samples)).flatten(1, 2)

    def forward_decoder(self, samples: Mapping[str, Any], image_embeds: Tensor):
        """Language modelling loss of the captions (``lavis`` ``BlipCaption.forward_decoder``).

        Args:
            samples: ``text_input``, a list of captions that begin with the prompt, which the
                text processor puts there.

        Raises:
            ValueError: for a caption without it: its first words would not be learnt.
        """
        for text in samples["text_input"]:
            if not text.startswith(self.prompt):
                raise ValueError(
                    f"The caption {text!r} does not begin with the model's prompt {self.prompt!r}. "
                    "Give the training text_processor the same prompt as the model."
                )
        return super().forward_decoder(samples, image_embeds)

    @torch.no_grad()
    def generate(
        self,
        samples: Mapping[str, Any],
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
            samples: ``image`` (batch, 3, H, W) or ``video`` (batch, 3, frames, H, W).
            use_nucleus_sampling: draw from the likeliest tokens of mass ``top_p`` instead of
                searching with ``num_beams``.
            max_length, min_length: in tokens, the prompt's included.
            num_captions: per visual input; of a beam search the best ones.

        Sampling differs from LAVIS's, which also cuts at the 50 likeliest tokens and penalises
        repetition by 1.1 whatever is asked.

        Returns:
            batch * num_captions texts without the prompt.

        Raises:
            ValueError: if a beam search is to give more captions than it has beams.
        """
        if not use_nucleus_sampling and num_captions > num_beams:
            raise ValueError(
                f"A search with {num_beams} beams has no {num_captions} captions to give. Raise "
                "num_beams, or draw them by use_nucleus_sampling=True."
            )
        embeds = self.forward_encoder(samples)
        prompt = self.tokenizer([self.prompt] * len(embeds), return_tensors="pt").to(self.device)
        prompt_ids = prompt.input_ids[:, :-1]  # all but [SEP]
        prompt_ids[:, 0] = self.tokenizer.bos_token_id
        how = (
            {"do_sample": True, "top_p": top_p, "top_k": 0}
            if use_nucleus_sampling
            else {"num_beams": num_beams}
        )
        output = self.text_decoder.generate_from_memory(
            prompt_ids,
            self.text_decoder.project(embeds),
            num_return_sequences=num_captions,
            max_length=max_length,
            min_length=min_length,
            repetition_penalty=repetition_penalty,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **how,
        )
        return self.tokenizer.batch_decode(
            output[:, prompt_ids.shape[1] :], skip_special_tokens=True
        )
