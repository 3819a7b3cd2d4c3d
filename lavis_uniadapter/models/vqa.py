"""BLIP visual question answering for images and video, tuned by UniAdapter or another method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lavis.common.registry import registry
from lavis.models.blip_models.blip_vqa import BlipVQA
from torch import Tensor

from lavis_uniadapter.backbone.build import build_text_decoder, build_text_encoder
from lavis_uniadapter.backbone.features import check_lengths, text_list, texts_of, visual_input
from lavis_uniadapter.backbone.visual_memory import VisualMemory
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.schema import Evaluation
from lavis_uniadapter.common.schema.model import VqaModel
from lavis_uniadapter.evaluation.answer_ranking import rank_answers, tokenise_answers
from lavis_uniadapter.evaluation.text_likelihood import ScoredText, mean_log_likelihood
from lavis_uniadapter.models.base import TunedBlip


class RankedAnswer(NamedTuple):
    """A candidate answer.

    Attributes:
        probability: among the candidates that were scored; these sum to 1.
        score: log-likelihood of its tokens, with LAVIS's label smoothing.
    """

    answer: str
    probability: float
    score: float


@registry.register_model("blip_uniadapter_vqa")
class BlipUniAdapterVQA(TunedBlip, BlipVQA):
    """BLIP VQA and VideoQA on a frozen backbone (UniAdapter).

    Question encoder and answer decoder share the adapters; each has its own key/value adapter, the
    encoder's on visual tokens and the decoder's on question states.
    """

    CONFIG = VqaModel
    PRETRAINED_MODEL_CONFIG_DICT = VqaModel.files()
    _ranked: tuple[list[str] | None, list[Tensor]] = None, []  # the last answer list, tokenised

    def build_text_models(self, med_config: str, visual_width: int) -> None:
        self.text_encoder = build_text_encoder(med_config, visual_width)
        self.text_decoder = build_text_decoder(med_config)

    def forward_encoder(self, samples: dict[str, Any]):
        """States of the questions that attend to their visual inputs, and the visual tokens.

        Args:
            samples: ``image`` (B, 3, H, W) or ``video`` (B, 3, T, H, W), and ``text_input``, B
                questions, or any number with ``visual_index``, the (questions,) indices of their
                visual inputs. ``tokenized_text`` is added, as in LAVIS.
        """
        texts = texts_of(samples)
        visual = samples.get("visual_index", visual_input(samples))
        check_lengths(text_input=len(texts), visual=len(visual))
        questions = self.tokenize(texts)
        questions.input_ids[:, 0] = self.tokenizer.enc_token_id
        samples["tokenized_text"] = questions
        visual_embeds = self.visual_tokens(samples)
        memory = self.text_encoder.encoder.project(visual_embeds)
        if "visual_index" in samples:
            memory = memory.pairs(samples["visual_index"])
        encoder_output = self.text_encoder(
            questions.input_ids,
            attention_mask=questions.attention_mask,
            encoder_hidden_states=memory,
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
        texts, number = texts_of(samples, "answer"), len(encoder_out.last_hidden_state)
        check_lengths(text_input=number, n_answers=len(samples["n_answers"]))
        check_lengths(answer=len(texts), weight=len(samples["weight"]))
        answers = self.tokenize(texts, truncation=False)
        answers.input_ids[:, 0] = self.tokenizer.bos_token_id
        targets = answers.input_ids.masked_fill(
            answers.input_ids == self.tokenizer.pad_token_id, -100
        )
        counts = lavis_versions.numbers(samples["n_answers"], self.device)
        torch._assert_async(counts.sum() == len(texts), "n_answers must add up to len(answer).")

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
        scores, candidates = self._score_answers(samples, answer_list, num_ans_candidates)
        best = candidates.gather(1, scores.argmax(dim=1, keepdim=True)).squeeze(1)
        return [answer_list[i] for i in best.tolist()]

    def _score_answers(self, samples, answer_list, num_ans_candidates) -> tuple[Tensor, Tensor]:
        if self._ranked[0] != list(answer_list):
            self._ranked = list(answer_list), tokenise_answers(answer_list, self.tokenizer)
        return rank_answers(
            self.text_decoder,
            self._question_memory(samples),
            self._ranked[1],
            self.tokenizer.bos_token_id,
            num_ans_candidates,
        )

    @torch.no_grad()
    def rank_answers(
        self, samples: dict[str, Any], answer_list: Sequence[str], num_ans_candidates: int = 128
    ) -> list[list[RankedAnswer]]:
        """The candidates of each question that ``predict_answers`` scores, the best first.

        Args:
            samples: those of ``forward_encoder``.
            answer_list: candidate answers.
            num_ans_candidates: how many of them are scored, those whose first token is likeliest.
        """
        answer_list = text_list(answer_list, "answer_list")
        scores, candidates = self._score_answers(samples, answer_list, num_ans_candidates)
        scores, order = scores.sort(dim=1, descending=True, stable=True)
        rows = candidates.gather(1, order), scores.softmax(dim=1), scores
        return [
            [RankedAnswer(answer_list[i], p, s) for i, p, s in zip(*row, strict=True)]
            for row in zip(*(each.tolist() for each in rows), strict=True)
        ]

    def _generate_answers(self, samples, num_beams=3, max_length=10, min_length=1) -> list[str]:
        """Beam search (``lavis`` ``BlipVQA``) that masks the questions' padding.

        In LAVIS answers attend to the padding and so depend on the batch.
        """
        memory = self._question_memory(samples)
        return self._write_answers(memory, num_beams, max_length, min_length)

    def _write_answers(self, memory, num_beams: int, max_length: int, min_length: int) -> list[str]:
        start = torch.full((len(memory.states), 1), self.tokenizer.bos_token_id, device=self.device)
        return self.generate_texts(
            start, memory, num_beams=num_beams, max_length=max_length, min_length=min_length
        )

    @torch.no_grad()
    def generate_with_scores(
        self, samples: dict[str, Any], num_beams: int = 3, max_length: int = 10, min_length: int = 1
    ) -> list[ScoredText]:
        """One answer to each question by beam search, and its score.

        Args:
            samples: those of ``forward_encoder``.
            max_length, min_length: in tokens.
        """
        memory = self._question_memory(samples)
        answers = self._write_answers(memory, num_beams, max_length, min_length)
        tokens = self.tokenize(answers, truncation=False)
        tokens.input_ids[:, 0] = self.tokenizer.bos_token_id
        scores = mean_log_likelihood(
            self.text_decoder, memory, tokens.input_ids, tokens.attention_mask, prompt_length=1
        )
        return [ScoredText(*each) for each in zip(answers, scores.tolist(), strict=True)]

    def predict_answers(
        self, samples: dict[str, Any], answer_list: Sequence[str] | None = None, **options
    ) -> list[str]:
        """Answers by ranking a list or by generation (``lavis`` ``BlipVQA.predict_answers``).

        Args:
            samples: ``image`` or ``video``, and ``text_input``, one question for each.
            answer_list: what to choose from, with ``inference_method="rank"``, the default.
            options: LAVIS's, which are keys of ``run:`` as well.

        Raises:
            TypeError, ValueError: naming an argument of the wrong type, length or value.
        """
        if Evaluation.read(options, "predict_answers").inference_method == "rank":
            answer_list = text_list(answer_list, "answer_list")
        # LAVIS reads the batch size from samples["image"].
        batch = {"image": visual_input(samples), "text_input": texts_of(samples)}
        check_lengths(text_input=len(batch["text_input"]), visual=len(batch["image"]))
        return super().predict_answers(batch, answer_list=answer_list, **options)
