"""LAVIS's BERT layers with the textual and cross-modal adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from lavis.models.med import (
    BertEncoder,
    BertLayer,
    BertOnlyMLMHead,
    BertSelfAttention,
    XBertLMHeadDecoder,
)
from torch import Tensor, nn
from transformers import GenerationMixin

from lavis_uniadapter.backbone.visual_memory import VisualMemory


class AdaptedBertLayer(BertLayer):
    """``lavis.models.med.BertLayer`` with adapters parallel to its FFN.

    With ``a`` the output of self-attention and ``c`` that of cross-attention, both after their
    LayerNorm: text mode gives ``FFN(a) + A_t(a)``; cross-modal mode ``FFN(c) + A_t(a) + A_c(c)``,
    where ``A_t(a)`` is the query residual (UniAdapter, section 3.2).
    """

    adapter: Callable[..., Tensor | int]  # the active one of this layer, see AdapterBank.layer

    def forward(
        self, x, mask, head_mask, memory: VisualMemory | None, _, past, output_attentions, mode
    ):
        a, *attentions, present = self.attention(
            x, mask, head_mask, past_key_value=past, output_attentions=output_attentions
        )
        if mode == "multimodal":
            c, _ = self.crossattention(a, mask, head_mask, memory)
            out = self.feed_forward_chunk(c) + self.adapter("cross_modal", a, c)
        else:
            out = self.feed_forward_chunk(a) + self.adapter("textual", a)
        return (out, *attentions, present)


class SdpaCrossAttention(BertSelfAttention):
    """``lavis.models.med.BertSelfAttention`` over a VisualMemory, without head masks.

    LAVIS's gradcam sets ``save_attention``, for attention maps.
    """

    def forward(self, hidden_states, attention_mask, head_mask, memory: VisualMemory, *unused):
        query = self.transpose_for_scores(self.query(hidden_states))
        if self.save_attention:
            probs, values = memory.attention_map(self, query)
            self.save_attention_map(probs)
            probs.register_hook(self.save_attn_gradients)
            context = self.dropout(probs) @ values
        else:
            context = memory.attend(self, query, self.dropout.p if self.training else 0.0)
        return context.transpose(1, 2).flatten(2), None


class AdaptedBertEncoder(BertEncoder):
    """``lavis.models.med.BertEncoder`` whose layers attend to a VisualMemory."""

    key_value_adapters: Callable[[], Mapping[str, nn.Module]]  # looks up the active ones

    def project(self, states: Tensor, mask: Tensor | None = None) -> VisualMemory:
        """Memory of (items, tokens, width) states, key/value adapters included, as VisualMemory."""
        attentions = [layer.crossattention.self for layer in self.layer]
        return VisualMemory(states, attentions, self.key_value_adapters(), mask)

    def forward(self, *args, encoder_hidden_states=None, encoder_attention_mask=None, **kwargs):
        memory = encoder_hidden_states
        if torch.is_tensor(memory):  # as LAVIS's own code passes states
            memory = self.project(memory, encoder_attention_mask)
        return super().forward(*args, encoder_hidden_states=memory, **kwargs)


class WordScores(BertOnlyMLMHead):
    """``lavis.models.med.BertOnlyMLMHead`` that ignores autocast in evaluation.

    Words and answers are ranked by its output, and bfloat16 would make many scores equal.
    """

    def forward(self, sequence_output: Tensor) -> Tensor:
        if self.training:
            return super().forward(sequence_output)
        with torch.autocast(sequence_output.device.type, enabled=False):
            return super().forward(sequence_output.to(self.predictions.decoder.weight.dtype))


class AdaptedLMHeadDecoder(XBertLMHeadDecoder, GenerationMixin):
    """``lavis.models.med.XBertLMHeadDecoder`` that generates from a VisualMemory.

    The memory is projected once, and keys and values of earlier tokens are cached; LAVIS recomputes
    both at every step.
    """

    def __init__(self, config):
        super().__init__(config)
        self.cls.__class__ = WordScores

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """LAVIS's layers cache keys and values in tuples, not in transformers' objects."""
        return False

    def project(self, states: Tensor, attention_mask: Tensor | None = None) -> VisualMemory:
        """Memory of (items, tokens, width) states, of which (items, tokens) ones are attended."""
        mask = None if attention_mask is None else self.invert_attention_mask(attention_mask)
        return self.bert.encoder.project(states, mask)

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, **kwargs):
        return {
            "input_ids": input_ids if past_key_values is None else input_ids[:, -1:],
            "past_key_values": past_key_values,
            **{name: kwargs[name] for name in ("attention_mask", "encoder_hidden_states")},
            "is_decoder": True,
        }
