"""BLIP visual question answering for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_outputs import BlipIntermediateOutput, BlipOutput
from lavis.models.blip_models.blip_vqa import BlipVQA
from torch import Tensor, nn
from transformers import BertTokenizer

from lavis_uniadapter.backbone import VisualMemory, build_text_decoder, encode_frames
from lavis_uniadapter.backbone.features import visual_input
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.schema.model import VqaModel
from lavis_uniadapter.evaluation.answer_ranking import CandidateAnswers, rank_answers
from lavis_uniadapter.models.base import TunedBlip


@registry.register_model("blip_uniadapter_vqa")
class BlipUniAdapterVQA(TunedBlip, BlipVQA):
    """BLIP VQA and VideoQA on a frozen backbone (UniAdapter).

    Question encoder and answer decoder share the adapters; each has its own key/value adapter, the
    encoder's on visual tokens and the decoder's on question states. Answers are ranked or generated
    as by LAVIS's ``BlipVQA``, each thing computed once.

    Model types: ``vqav2`` (images, 480 px), ``msrvtt_qa`` and ``msvd_qa`` (video, 224 px), and
    ``shapes`` (the small model of the embedded example).

    Usage:
        >>> import lavis_uniadapter
        >>> from lavis.models import load_model_and_preprocess
        >>> model, vis, txt = load_model_and_preprocess("blip_uniadapter_vqa", "msrvtt_qa")
    """

    CONFIG = VqaModel
    PRETRAINED_MODEL_CONFIG_DICT = VqaModel.files()
    OUTPUT_LAYERS = ("text_decoder.cls.predictions.transform",)

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
        lavis_versions.init_blip(self)  # BlipVQA's own asks the hub for its tokenizer
        self.tokenizer = tokenizer
        self.visual_encoder = image_encoder
        self.text_encoder = text_encoder
        self.text_decoder = text_decoder
        self.max_txt_len = max_txt_len
        self._candidates: CandidateAnswers | None = None  # the answer list last ranked
        self.load_base(None)

    @classmethod
    def from_config(cls, cfg: Mapping[str, Any]) -> BlipUniAdapterVQA:
        """Build from the ``model:`` section of a configuration.

        Raises:
            ConfigError: unknown key or impossible value, by name.
            CheckpointError: weights that do not fit, by name.
        """
        section = cls.CONFIG.read(cfg, "model")
        visual_encoder, text_encoder, tokenizer = cls.build_encoders(section)
        text_decoder = build_text_decoder(cls.med_config(section))
        model = cls(
            visual_encoder, text_encoder, text_decoder, tokenizer, max_txt_len=section.max_txt_len
        )
        model.finish_building(section)
        return model

    def _text_encoders(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "text_decoder": self.text_decoder.bert}

    def forward(self, samples: dict[str, Any]) -> BlipOutput:
        """Weighted answer loss of a batch (``lavis`` ``BlipVQA.forward``).

        Args:
            samples: ``image`` (B, 3, H, W) or ``video`` (B, 3, T, H, W); ``text_input``, B
                questions; ``answer``, all answers of all questions in turn; ``n_answers`` (B,),
                how many each question has; ``weight`` (sum of n_answers,).
        """
        encoder_output, visual_embeds = self.forward_encoder(samples)
        loss, decoder_output, labels = self.forward_decoder(samples, encoder_output)
        return BlipOutput(
            loss=loss,
            intermediate_output=BlipIntermediateOutput(
                image_embeds=visual_embeds,
                encoder_output=encoder_output,
                decoder_output=decoder_output,
                decoder_labels=labels,
            ),
        )

    def forward_encoder(self, samples: dict[str, Any]):
        """Questions that have looked at their visual inputs, and the visual tokens.

        Adds ``tokenized_text`` to samples, as LAVIS's does.
        """
        questions = self.tokenizer(
            samples["text_input"],
            padding="longest",
            truncation=True,
            max_length=self.max_txt_len,
            return_tensors="pt",
        )
        questions = self.on_device(questions)
        questions["input_ids"][:, 0] = self.tokenizer.enc_token_id
        samples["tokenized_text"] = questions
        visual_embeds = encode_frames(self.visual_encoder, visual_input(samples)).flatten(1, 2)
        encoder_output = self.text_encoder(
            questions.input_ids,
            attention_mask=questions.attention_mask,
            encoder_hidden_states=self.text_encoder.project(visual_embeds),
            return_dict=True,
        )
        return encoder_output, visual_embeds

    def forward_decoder(self, samples: dict[str, Any], encoder_out, **kwargs):
        """Loss of the answers given the questions, summed over tokens and averaged over frames.

        Over images, that is, as in LAVIS, or over all frames of all videos, as in the authors'
        released code; the scale is one that AdamW does not see.
        """
        answers = self.tokenizer(samples["answer"], padding="longest", return_tensors="pt")
        answers = self.on_device(answers)
        answers["input_ids"][:, 0] = self.tokenizer.bos_token_id
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
        loss = (weight * output.loss).sum() / num_frames
        return loss, output, targets

    def _rank_answers(self, samples, answer_list, num_ans_candidates) -> list[str]:
        """Best answer of a list (``lavis`` ``BlipVQA``); see ``evaluation/answer_ranking.py``."""
        if self._candidates is None or self._candidates.texts != tuple(answer_list):
            self._candidates = CandidateAnswers.tokenise(answer_list, self.tokenizer)
        scores, candidates = rank_answers(
            self.text_decoder,
            self._question_memory(samples),
            self._candidates,
            num_ans_candidates,
        )
        best = candidates.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return [answer_list[i] for i in best.tolist()]

    def _question_memory(self, samples) -> VisualMemory:
        """Questions that have looked, as the answer decoder attends to them."""
        states = self.forward_encoder(samples)[0].last_hidden_state
        return self.text_decoder.project(states, samples["tokenized_text"].attention_mask)

    def _generate_answers(self, samples, num_beams=3, max_length=10, min_length=1) -> list[str]:
        """Beam search (``lavis`` ``BlipVQA``), blind to a question's padding.

        LAVIS lets answers see it, which makes them depend on the batch.
        """
        memory = self._question_memory(samples)
        start = torch.full((len(memory.states), 1), self.tokenizer.bos_token_id)
        output = self.text_decoder.generate_from_memory(
            start.to(self.device),
            memory,
            num_beams=num_beams,
            max_length=max_length,
            min_length=min_length,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.batch_decode(output, skip_special_tokens=True)

    def predict_answers(self, samples: dict[str, Any], **kwargs) -> list[str]:
        """Answers by ranking a list or by generation (``lavis`` ``BlipVQA.predict_answers``).

        Args:
            samples: ``image`` or ``video`` and ``text_input``, as in forward.
            kwargs: ``inference_method`` ("rank", "generate"), ``answer_list``,
                ``num_ans_candidates``, ``num_beams``, ``max_len``, ``min_len``.
        """
        # LAVIS's asks samples["image"] for the batch size, which a video has as well.
        return super().predict_answers({**samples, "image": visual_input(samples)}, **kwargs)
