"""The visual side of cross-attention, projected once and shared by every text paired with it.

Keys and values of BLIP's cross-modal encoder depend on the visual input alone. A pair is a text and
the index of a visual input; texts paired with the same input attend to it in one product, without
a copy of keys or values per pair.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_uniadapter.common.host_copy import HostCopy


class VisualMemory:
    """Visual inputs as the cross-modal encoder sees them, for its ``encoder_hidden_states``.

    Args:
        states: (visuals, tokens, width); frames of a video concatenated along tokens.
        attentions: the cross-attention of each layer (LAVIS's BertSelfAttention).
        key_value_adapters: ``key`` and ``value``, applied once for all layers.
        mask: additive, broadcastable to (visuals, heads, queries, tokens); frame weights ignore it.
    """

    def __init__(
        self,
        states: Tensor,
        attentions: Iterable[nn.Module],
        key_value_adapters: Mapping[str, nn.Module],
        mask: Tensor | None,
    ):
        self.states, self.mask = states, mask
        self._layout: PairLayout | None = None
        self._token_weights: Tensor | None = None
        deltas = [adapter(states) for adapter in key_value_adapters.values()] or [0, 0]
        self.projected = {}  # keys and values (visuals, heads, tokens, d) by cross-attention
        for attention in attentions:
            projected = attention.key(states) + deltas[0], attention.value(states) + deltas[1]
            # in one piece: matrix products would copy them otherwise
            self.projected[attention] = tuple(
                attention.transpose_for_scores(x).contiguous() for x in projected
            )

    def pairs(self, visual_index: Tensor, frame_weights: Tensor | None = None) -> VisualMemory:
        """The same memory, keys and values shared, for texts paired with (pairs,) visual inputs.

        ``frame_weights`` (pairs, frames) are factors of the keys of a frame's tokens, but of [CLS].
        """
        view = copy.copy(self)
        view._layout = PairLayout(visual_index, len(self.states))
        if frame_weights is not None:
            tokens_of_frame = self.states.shape[1] // frame_weights.shape[1]
            weights = frame_weights[:, :, None].repeat(1, 1, tokens_of_frame)
            weights[:, :, 0] = 1
            view._token_weights = weights.flatten(1).to(self.states.dtype)
        return view

    def size(self) -> tuple[int, int, int]:
        """(pairs, tokens, width), which LAVIS's BertModel reads of encoder states."""
        pairs = len(self.states) if self._layout is None else len(self._layout.visual_index)
        return pairs, *self.states.shape[1:]

    def attend(self, attention: nn.Module, query: Tensor, dropout: float) -> Tensor:
        """Output (pairs, heads, length, d) of a layer's cross-attention for such queries."""
        keys, values = self.projected[attention]
        if self._layout is None:
            return F.scaled_dot_product_attention(query, keys, values, self.mask, dropout)
        folded = self._layout.fold(query)
        if self._token_weights is None:
            context = F.scaled_dot_product_attention(folded, keys, values, self.mask, dropout)
        else:
            # Weights belong to a pair and keys to a visual input. q.(w k) = w (q.k), so weighting
            # the logits leaves the keys shared.
            weights = self._token_weights[:, None, None, :].expand(-1, 1, query.shape[2], -1)
            weights = self._layout.fold(weights) / math.sqrt(query.shape[-1])
            context = _attend_weighted(folded, keys, values, weights, dropout)
        return self._layout.unfold(context, query.shape[2])

    def attention_map(self, attention: nn.Module, query: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (pairs, heads, length, tokens), and the values they weight, per pair."""
        index = slice(None) if self._layout is None else self._layout.visual_index
        keys, values = (projected[index] for projected in self.projected[attention])
        logits = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self._token_weights is not None:
            logits = logits * self._token_weights[:, None, None, :]
        elif self.mask is not None:
            logits = logits + self.mask[index]
        return logits.softmax(dim=-1), values


class PairLayout:
    """Lays the pairs of each visual input side by side; ``visual_index`` is (pairs,)."""

    def __init__(self, visual_index: Tensor, num_visuals: int):
        self.visual_index = visual_index.long()
        self.num_visuals = num_visuals
        visuals = torch.arange(num_visuals, device=visual_index.device)
        pairs_so_far = (self.visual_index[:, None] == visuals).cumsum(dim=0)
        self.place = pairs_so_far.gather(1, self.visual_index[:, None]).squeeze(1) - 1
        self._most = HostCopy(pairs_so_far[-1:].amax(dim=1))

    @functools.cached_property
    def most(self) -> int:
        """The most pairs that one visual input has."""
        return self._most.tolist()[0]

    def fold(self, x: Tensor) -> Tensor:
        """(pairs, heads, length, d) to (visuals, heads, most * length, d), zeros where no pair."""
        folded = x.new_zeros(self.num_visuals, self.most, *x.shape[1:])
        folded[self.visual_index, self.place] = x
        return folded.transpose(1, 2).flatten(2, 3)

    def unfold(self, x: Tensor, length: int) -> Tensor:
        """Inverse of fold for a (visuals, heads, most * length, d) tensor."""
        x = x.unflatten(2, (self.most, length)).transpose(1, 2)
        return x[self.visual_index, self.place]


def _attend_weighted(query, keys, values, weights, dropout: float) -> Tensor:
    """Attention whose logits are multiplied by weights (visuals, 1, queries, tokens)."""
    if torch.is_grad_enabled():
        # Tensors of (visuals, heads, queries, tokens) cost more to keep than to recompute.
        return checkpoint(_at_once, query, keys, values, weights, dropout, use_reentrant=False)
    if query.device.type == "cpu" and not dropout:
        # in pieces that fit a processor's cache
        context = torch.empty_like(query)
        for i, head in itertools.product(*map(range, query.shape[:2])):
            at = (query[i, head], keys[i, head], values[i, head], weights[i, 0])
            context[i, head] = _at_once(*at, dropout)
        return context
    return _at_once(query, keys, values, weights, dropout)


def _at_once(query, keys, values, weights, dropout: float) -> Tensor:
    logits = query @ keys.transpose(-1, -2) * weights
    return F.dropout(logits.softmax(dim=-1), dropout) @ values


def frame_aware_weights(text_feat: Tensor, frame_feat: Tensor) -> Tensor:
    """Parameter-free frame-aware attention: how much each frame matters to each text.

    UniAdapter, section 3.3: a softmax over frames, scaled so that it averages 1; no gradient.

    Args:
        text_feat, frame_feat: (pairs, embed_dim) and (pairs, frames, embed_dim) unit vectors.

    Returns:
        (pairs, frames) weights.
    """
    with torch.no_grad(), torch.autocast(text_feat.device.type, enabled=False):
        logits = torch.einsum("pd,ptd->pt", text_feat.float(), frame_feat.float()) / 4
        return logits.softmax(dim=-1) * frame_feat.shape[1]
