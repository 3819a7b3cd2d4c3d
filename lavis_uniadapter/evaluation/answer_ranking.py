"""LAVIS's ranking of candidate answers, without its repeated computations.

``lavis`` ``BlipVQA._rank_answers`` takes the candidates whose first token is likeliest and decodes
each of them whole, padded to the longest of the list. Here a question's keys and values are
projected once; the first position, which all candidates share, is decoded once; candidates are not
padded; and the last position, whose prediction is not used, is not decoded. The scores are equal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lavis_uniadapter.backbone.text import AdaptedLMHeadDecoder
from lavis_uniadapter.backbone.visual_memory import VisualMemory

# Of the loss that LAVIS trains and ranks with (lavis.models.med, BertLMHeadModel).
LABEL_SMOOTHING = 0.1
# Bounds memory: the scores of all of BERT's words at one position take 122 kB.
POSITIONS_AT_ONCE = 1024


def tokenise_answers(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of each answer, on the CPU, without the token that all begin with.

    Raises:
        ValueError: for an answer without tokens.
    """
    tokens = tokenizer(list(texts), padding="longest", return_tensors="pt")
    masks = tokens.attention_mask.bool()
    answers = [ids[mask][1:] for ids, mask in zip(tokens.input_ids, masks, strict=True)]
    for text, ids in zip(texts, answers, strict=True):
        if len(ids) < 2:  # [SEP] alone
            raise ValueError(f"answer_list has {text!r}, which has no token; remove it.")
    return answers


@torch.no_grad()
def rank_answers(
    decoder: AdaptedLMHeadDecoder,
    memory: VisualMemory,
    answers: Sequence[Tensor],
    bos_id: int,
    num_ans_candidates: int,
) -> tuple[Tensor, Tensor]:
    """Score the answers whose first token is likeliest.

    Args:
        memory: states of the questions, with their padding masked.
        answers: of ``tokenise_answers``.
        bos_id: the token that all answers begin with.
        num_ans_candidates: how many answers are scored for each question.

    Returns:
        (questions, k) log-likelihoods, label smoothing included, and (questions, k) indices of
        their answers.
    """
    device = memory.states.device
    questions = torch.arange(len(memory.states), device=device)
    start = decoder.bert(
        torch.full((len(questions), 1), bos_id, device=device),
        encoder_hidden_states=memory.pairs(questions),
        is_decoder=True,
        use_cache=True,
        return_dict=True,
    )
    first_logits = decoder.cls(start.last_hidden_state[:, 0])
    first_token = torch.stack([ids[0] for ids in answers]).to(device)
    k = min(num_ans_candidates, len(first_token))
    chosen = first_logits[:, first_token].topk(k, dim=1).indices

    question_of = questions.repeat_interleave(k)
    scores = _log_likelihood(first_logits, first_token[chosen]).flatten()
    # Decode the rest of each answer from the first position, which all share.
    token_ids = [answers[i] for i in chosen.flatten().tolist()]
    for pairs in _batches_of_one_length(torch.tensor([len(ids) for ids in token_ids])):
        ids = torch.stack([token_ids[i] for i in pairs.tolist()]).to(device)
        pairs = pairs.to(device)
        own = question_of[pairs]
        hidden = decoder.bert(
            ids[:, :-1],
            attention_mask=torch.ones_like(ids),
            encoder_hidden_states=memory.pairs(own),
            past_key_values=[(keys[own], values[own]) for keys, values in start.past_key_values],
            is_decoder=True,
            return_dict=True,
        ).last_hidden_state
        likelihood = _log_likelihood(decoder.cls(hidden), ids[:, 1:, None])
        scores[pairs] += likelihood.flatten(1).sum(dim=1)
    return scores.view(len(questions), k), chosen


def _log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """Minus the smoothed cross entropy of each of (..., n) targets under (..., words) logits."""
    of_target = logits.gather(-1, targets)
    smoothing = LABEL_SMOOTHING * logits.mean(dim=-1, keepdim=True)
    return (1 - LABEL_SMOOTHING) * of_target + smoothing - logits.logsumexp(dim=-1, keepdim=True)


def _batches_of_one_length(lengths: Tensor) -> Iterator[Tensor]:
    """Indices in batches of equal length, of at most POSITIONS_AT_ONCE positions (or one item)."""
    for length in lengths.unique().tolist():
        yield from torch.where(lengths == length)[0].split(max(1, POSITIONS_AT_ONCE // length))
