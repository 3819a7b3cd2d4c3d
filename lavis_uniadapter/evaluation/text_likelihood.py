"""How likely a decoder finds texts, by teacher forcing."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lavis_uniadapter.backbone.text import AdaptedLMHeadDecoder
from lavis_uniadapter.backbone.visual_memory import VisualMemory


class ScoredText(NamedTuple):
    """A generated text.

    Attributes:
        score: mean log-likelihood of its tokens and of its end, at most 0. It does not depend on
            how the text was found, so a beam search and samples can be compared.
    """

    text: str
    score: float


@torch.no_grad()
def mean_log_likelihood(
    decoder: AdaptedLMHeadDecoder,
    memory: VisualMemory,
    input_ids: Tensor,
    attention_mask: Tensor,
    prompt_length: int,
) -> Tensor:
    """Mean log-likelihood of each text's tokens after the prompt, the end token included.

    Unlike the loss of LAVIS's decoder, it has no label smoothing.

    Args:
        memory: of the items that the texts are about.
        input_ids, attention_mask: (texts, length), as many texts for each item, in the items'
            order; padded on the right.
        prompt_length: tokens that all texts begin with and that are not scored.

    Returns:
        (texts,) float32.
    """
    items = torch.arange(len(memory.states), device=input_ids.device)
    logits = decoder(
        input_ids,
        attention_mask=attention_mask,
        encoder_hidden_states=memory.pairs(items.repeat_interleave(len(input_ids) // len(items))),
        return_dict=True,
    ).logits[:, prompt_length - 1 : -1]
    targets, mask = input_ids[:, prompt_length:], attention_mask[:, prompt_length:]
    of_target = logits.gather(-1, targets[:, :, None]).squeeze(-1) - logits.logsumexp(dim=-1)
    return (of_target * mask).sum(dim=1) / mask.sum(dim=1)
