"""What the BLIP models that answer in words have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from lavis_uniadapter.backbone.features import visual_input
from lavis_uniadapter.backbone.vision import encode_frames
from lavis_uniadapter.backbone.visual_memory import VisualMemory
from lavis_uniadapter.models.base import TunedBlip


class GeneratingBlip(TunedBlip):
    """A tuned BLIP with a ``text_decoder``."""

    def visual_tokens(self, samples: Mapping[str, Any]) -> Tensor:
        """(batch, frames * tokens, width) of ``image`` or ``video``; see ``visual_input``."""
        return encode_frames(self.visual_encoder, visual_input(samples)).flatten(1, 2)

    def tokens_from(self, texts: Sequence[str], first_token: int, **options) -> BatchEncoding:
        """Token ids and mask on the model's device, with ``first_token`` in place of [CLS]."""
        tokens = self.tokenizer(list(texts), padding="longest", return_tensors="pt", **options)
        tokens = self.on_device(tokens)
        tokens["input_ids"][:, 0] = first_token
        return tokens

    @torch.no_grad()
    def generate_texts(
        self, prompt_ids: Tensor, memory: VisualMemory, *, num_return_sequences: int = 1, **options
    ) -> list[str]:
        """Continuations of (items, length) prompts, ``num_return_sequences`` for each.

        ``options`` are those of ``transformers.GenerationMixin.generate``.
        """
        rows = num_return_sequences if options.get("do_sample") else options.get("num_beams", 1)
        items = torch.arange(len(prompt_ids), device=prompt_ids.device)
        output = self.text_decoder.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            # transformers repeats tensors for beams; what is not a tensor it passes on as it is
            encoder_hidden_states=memory.pairs(items.repeat_interleave(rows)),
            num_return_sequences=num_return_sequences,
            eos_token_id=self.tokenizer.sep_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
            **options,
        )
        continuations = output[:, prompt_ids.shape[1] :]
        return self.tokenizer.batch_decode(continuations, skip_special_tokens=True)
