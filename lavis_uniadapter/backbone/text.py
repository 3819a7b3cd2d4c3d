"""LAVIS's BERT layers, made aware of the textual and cross-modal adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from lavis.models.med import (
    BertEncoder,
    BertLayer,
    BertOnlyMLMHead,
    BertSelfAttention,
    XBertEncoder,
    XBertLMHeadDecoder,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin

from lavis_uniadapter.adapters import AdapterSlot, KeyValueSlot
from lavis_uniadapter.backbone.visual_memory import LayerMemory, VisualMemory


def _merge_heads(context: Tensor) -> Tensor:
    return context.transpose(1, 2).flatten(2)


class SdpaSelfAttention(BertSelfAttention):
    """``lavis.models.med.BertSelfAttention`` over a text's own tokens.

    Attention maps, head masks and relative positions take LAVIS's own path.
    """

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        if output_attentions or head_mask is not None or self.position_embedding_type != "absolute":
            return super().forward(
                hidden_states,
                attention_mask,
                head_mask,
                past_key_value=past_key_value,
                output_attentions=output_attentions,
            )
        query, keys, values = (
            self.transpose_for_scores(linear(hidden_states))
            for linear in (self.query, self.key, self.value)
        )
        if past_key_value is not None:
            keys = torch.cat([past_key_value[0], keys], dim=2)
            values = torch.cat([past_key_value[1], values], dim=2)
        context = F.scaled_dot_product_attention(
            query,
            keys,
            values,
            attn_mask=attention_mask,
            dropout_p=self.dropout.p if self.training else 0.0,
        )
        return _merge_heads(context), (keys, values)


class SdpaCrossAttention(BertSelfAttention):
    """``lavis.models.med.BertSelfAttention`` over the keys and values of a LayerMemory."""

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states: LayerMemory | None = None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
    ):
        memory = encoder_hidden_states
        query = self.transpose_for_scores(self.query(hidden_states))
        if not (output_attentions or self.save_attention or head_mask is not None):
            context = memory.attend(query, self.dropout.p if self.training else 0.0)
            return _merge_heads(context), (memory.keys, memory.values)

        probs, values = memory.attention_map(query)
        if self.save_attention:
            self.save_attention_map(probs)
            probs.register_hook(self.save_attn_gradients)
        weights = self.dropout(probs)
        if head_mask is not None:
            weights = weights * head_mask
        context = _merge_heads(weights @ values)
        present = (memory.keys, memory.values)
        return (context, probs, present) if output_attentions else (context, present)


class AdaptedBertLayer(BertLayer):
    """``lavis.models.med.BertLayer`` with adapters parallel to its FFN.

    With ``a`` the output of self-attention and ``c`` that of cross-attention, both after their
    LayerNorm: text mode gives ``FFN(a) + A_t(a)``; cross-modal mode ``FFN(c) + A_t(a) + A_c(c)``,
    where ``A_t(a)`` is the query residual (UniAdapter, section 3.2).
    """

    adapter_slot: AdapterSlot
    activation_checkpointing: bool

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states: VisualMemory | None = None,
        encoder_attention_mask=None,
        past_key_value=None,
        output_attentions=False,
        mode=None,
    ):
        cross_modal = mode in ("multimodal", "fusion") and hasattr(self, "crossattention")
        if cross_modal and encoder_hidden_states is None:
            raise ValueError(f"Mode '{mode}' attends to encoder_hidden_states, and none are given.")
        # Projected here and not inside the checkpointed part: a memory keeps its projections, and
        # recomputation must find what the first pass found.
        memory = encoder_hidden_states.for_layer(self.crossattention.self) if cross_modal else None
        arguments = (
            hidden_states,
            attention_mask,
            head_mask,
            memory,
            past_key_value,
            output_attentions,
        )
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._forward, *arguments, use_reentrant=False)
        return self._forward(*arguments)

    def _forward(
        self, hidden_states, attention_mask, head_mask, memory, past_key_value, output_attentions
    ):
        self_outputs = self.attention(
            hidden_states,
            attention_mask,
            head_mask,
            past_key_value=None if past_key_value is None else past_key_value[:2],
            output_attentions=output_attentions,
        )
        after_self = self_outputs[0]
        attentions, present = self_outputs[1:-1], self_outputs[-1]

        adapter = self.adapter_slot()
        if memory is None:
            out = self.feed_forward_chunk(after_self)
            delta = None if adapter is None else adapter.textual(after_self)
        else:
            cross_outputs = self.crossattention(
                after_self, attention_mask, head_mask, memory, output_attentions=output_attentions
            )
            after_cross = cross_outputs[0]
            attentions = attentions + cross_outputs[1:-1]
            out = self.feed_forward_chunk(after_cross)
            delta = None if adapter is None else adapter.cross_modal(after_self, after_cross)
        if delta is not None:
            out = out + delta
        return (out, *attentions, present)


class AdaptedBertEncoder(BertEncoder):
    """``lavis.models.med.BertEncoder`` whose layers attend to a VisualMemory.

    Plain encoder states, which LAVIS's own code passes, become a memory of their own here.
    """

    key_value_slot: KeyValueSlot

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        head_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        **kwargs,
    ):
        if torch.is_tensor(encoder_hidden_states):
            encoder_hidden_states = VisualMemory(
                encoder_hidden_states, self.key_value_slot(), encoder_attention_mask
            )
        return super().forward(
            hidden_states,
            attention_mask=attention_mask,
            head_mask=head_mask,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **kwargs,
        )


class AdaptedXBertEncoder(XBertEncoder):
    """``lavis.models.med.XBertEncoder`` that can project its visual side ahead of any text."""

    def project(self, visual_embeds: Tensor) -> VisualMemory:
        """Visual memory of (visuals, tokens, width) embeddings, key/value adapter included."""
        return VisualMemory(visual_embeds, self.encoder.key_value_slot())


class WordScores(BertOnlyMLMHead):
    """``lavis.models.med.BertOnlyMLMHead``, in evaluation in its own precision under autocast.

    Words and answers are ranked by what it gives, and bfloat16 would make many scores equal.
    """

    def forward(self, sequence_output: Tensor) -> Tensor:
        if self.training:
            return super().forward(sequence_output)
        with torch.autocast(sequence_output.device.type, enabled=False):
            return super().forward(sequence_output.to(self.predictions.decoder.weight.dtype))


class AdaptedLMHeadDecoder(XBertLMHeadDecoder, GenerationMixin):
    """``lavis.models.med.XBertLMHeadDecoder`` that generates from a VisualMemory.

    The memory is projected once for all steps and beams, and earlier tokens are not computed
    again. LAVIS's decoder does both anew at every step: it looks for its cache under a name that
    transformers no longer uses.
    """

    def __init__(self, config):
        super().__init__(config)
        self.cls.__class__ = WordScores

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """Not transformers' cache objects: LAVIS's layers keep keys and values in tuples."""
        return False

    def project(self, states: Tensor, attention_mask: Tensor | None = None) -> VisualMemory:
        """Memory of (items, tokens, width) states, key/value adapter included.

        Args:
            attention_mask: (items, tokens) ones where there is something to attend to.
        """
        mask = None if attention_mask is None else self.invert_attention_mask(attention_mask)
        return VisualMemory(states, self.bert.encoder.key_value_slot(), mask)

    @torch.no_grad()
    def generate_from_memory(
        self, prompt_ids: Tensor, memory: VisualMemory, *, num_return_sequences: int = 1, **options
    ) -> Tensor:
        """Beam search (``num_beams``) or sampling (``do_sample``), by transformers.

        Args:
            prompt_ids: (items, prompt length), the same prompt for each.
            memory: of the same items.
            num_return_sequences: texts per item; beam search gives its best ones.
            options: of ``transformers.GenerationMixin.generate``.

        Returns:
            (items * num_return_sequences, length) token ids, the prompt included.
        """
        rows = num_return_sequences if options.get("do_sample") else options.get("num_beams", 1)
        items = torch.arange(len(prompt_ids), device=prompt_ids.device)
        return self.generate(
            input_ids=prompt_ids,
            attention_mask=torch.ones_like(prompt_ids),
            # transformers repeats tensors for beams; what is not a tensor it passes on as it is
            encoder_hidden_states=memory.pairs(items.repeat_interleave(rows)),
            num_return_sequences=num_return_sequences,
            **options,
        )

    def prepare_inputs_for_generation(
        self, input_ids, past_key_values=None, attention_mask=None, **model_kwargs
    ):
        return {
            "input_ids": input_ids if past_key_values is None else input_ids[:, -1:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "encoder_hidden_states": model_kwargs["encoder_hidden_states"],
            "is_decoder": True,
        }
