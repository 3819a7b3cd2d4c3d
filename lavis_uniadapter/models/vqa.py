"""BLIP visual question answering for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_vqa import BlipVQA
from torch import Tensor, nn
from transformers import BertTokenizer

from lavis_uniadapter.backbone.build import build_text_decoder, build_text_encoder
from lavis_uniadapter.backbone.features import visual_input
from lavis_uniadapter.backbone.visual_memory import VisualMemory
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.schema.model import VqaModel
from lavis_uniadapter.evaluation.answer_ranking import CandidateAnswers, rank_answers
from lavis_uniadapter.models.generation import GeneratingBlip


@registry.register_model("blip_uniadapter_vqa")
class BlipUniAdapterVQA(GeneratingBlip, BlipVQA):
    """BLIP VQA and VideoQA on a frozen backbone (UniAdapter).

    Question encoder and answer decoder share the adapters; each has its own key/value adapter, the
    encoder's on visual tokens and the decoder's on question states. Answers are ranked or generated
    as by LAVIS's ``BlipVQA``, whose ``forward`` is inherited; repeated computations are removed.

    Model types: ``vqav2`` (images, 480 px), ``msrvtt_qa`` and ``msvd_qa`` (video, 224 px), and
    ``shapes`` (the small model of the embedded example).

    Usage:
        >>> import lavis_uniadapter
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_uniadapter_vqa", "msrvtt_qa")
    """

    CONFIG = VqaModel
    PRETRAINED_MODEL_CONFIG_DICT = VqaModel.files()

    def __init__(
        self,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        text_decoder: nn.Module,
        tokenizer: BertTokenizer,
        *,
        max_txt_len: int = 35,
    ):
        """BLIP alone; ``load_base`` and ``attach_tuning`` follow (``from_config`` does all)."""
        lavis_versions.init_blip(self)  # BlipVQA's constructor loads its tokenizer from the hub
        self.tokenizer = tokenizer
        self.visual_encoder = image_encoder
        self.text_encoder = text_encoder
        self.text_decoder = text_decoder
        self.max_txt_len = max_txt_len
        self._candidates: CandidateAnswers | None = None  # the last answer list, tokenised
        self.load_base(None)

    @classmethod
    def build_text_models(cls, med_config: str, visual_width: int) -> dict[str, nn.Module]:
        return {
            "text_encoder": build_text_encoder(med_config, visual_width),
            "text_decoder": build_text_decoder(med_config),
        }

    def forward_encoder(self, samples: dict[str, Any]):
        """States of the questions that attend to their visual inputs, and the visual tokens.

        Args:
            samples: ``image`` (B, 3, H, W) or ``video`` (B, 3, T, H, W), and ``text_input``, B
                questions. ``tokenized_text`` is added, as in LAVIS.
        """
        questions = self.tokens_from(
            samples["text_input"],
            self.tokenizer.enc_token_id,
            truncation=True,
            max_length=self.max_txt_len,
        )
        samples["tokenized_text"] = questions
        visual_embeds = self.visual_tokens(samples)
        encoder_output = self.text_encoder(
            questions.input_ids,
            attention_mask=questions.attention_mask,
            encoder_hidden_states=self.text_encoder.encoder.project(visual_embeds),
            return_dict=True,
        )
        return encoder_output, visual_embeds

    def forward_decoder(self, samples: dict[str, Any], encoder_out, **kwargs):
        """Loss of the answers given the questions, summed over tokens and averaged over frames.

        For images this is LAVIS's average; for videos, over all frames of the batch, that of the
        released code. AdamW does not depend on this scale.

        Args:
            samples: those of ``forward_encoder``; ``answer``, the answers of all questions in
                order; ``n_answers`` (B,), how many each question has; ``weight`` (answers,).
        """
        answers = self.tokens_from(samples["answer"], self.tokenizer.bos_token_id)
        targets = answers.input_ids.masked_fill(
            answers.input_ids == self.tokenizer.pad_token_id, -100
        )
        counts = lavis_versions.numbers(samples["n_answers"], self.device)

        def for_each_answer(of_questions: Tensor) -> Tensor:
            # Without output_size the host waits until the device has added up the counts.
            return of_questions.repeat_interleave(counts, dim=0, output_size=len(targets))

        output = self.text_decoder(
            answers.input_ids,
            attention_mask=answers.attention_mask,
            encoder_hidden_states=for_each_answer(encoder_out.last_hidden_state),
            encoder_attention_mask=for_each_answer(samples["tokenized_text"].attention_mask),
            labels=targets,
            return_dict=True,
            reduction="none",
        )
        visual = visual_input(samples)
        num_frames = len(visual) * (1 if visual.ndim == 4 else visual.shape[2])
        weight = lavis_versions.numbers(samples["weight"], self.device)
        return (weight * output.loss).sum() / num_frames, output, targets

    def _question_memory(self, samples) -> VisualMemory:
        """States of the questions, as the answer decoder attends to them."""
        states = self.forward_encoder(samples)[0].last_hidden_state
        return self.text_decoder.project(states, samples["tokenized_text"].attention_mask)

    def _rank_answers(self, samples, answer_list, num_ans_candidates) -> list[str]:
        """Best answer of a list (``lavis`` ``BlipVQA``); see ``evaluation/answer_ranking.py``."""
        if self._candidates is None or self._candidates.texts != tuple(answer_list):
            self._candidates = CandidateAnswers.tokenise(answer_list, self.tokenizer)
        memory = self._question_memory(samples)
        scores, candidates = rank_answers(
            self.text_decoder, memory, self._candidates, num_ans_candidates
        )
        best = candidates.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return [answer_list[i] for i in best.tolist()]

    def _generate_answers(self, samples, num_beams=3, max_length=10, min_length=1) -> list[str]:
        """Beam search (``lavis`` ``BlipVQA``) that masks the questions' padding.

        In LAVIS answers attend to the padding and so depend on the batch.
        """
        memory = self._question_memory(samples)
        start = torch.full((len(memory.states), 1), self.tokenizer.bos_token_id, device=self.device)
        lengths = {"max_length": max_length, "min_length": min_length}
        return self.generate_texts(start, memory, num_beams=num_beams, **lengths)

    def predict_answers(self, samples: dict[str, Any], **kwargs) -> list[str]:
        """Answers by ranking a list or by generation (``lavis`` ``BlipVQA.predict_answers``).

        Args:
            samples: ``image`` or ``video`` and ``text_input``, as in forward.
            kwargs: ``inference_method`` ("rank", "generate"), ``answer_list``,
                ``num_ans_candidates``, ``num_beams``, ``max_len``, ``min_len``.
        """
        # LAVIS reads the batch size from samples["image"].
        return super().predict_answers({**samples, "image": visual_input(samples)}, **kwargs)
