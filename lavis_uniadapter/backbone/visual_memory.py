"""The visual side of cross-attention, projected once and shared by every text paired with it.

BLIP's cross-modal encoder attends from a text to the tokens of a visual input. Keys and values
depend on the visual input alone, so a VisualMemory projects them once per layer, and a pair is a
text and the index of a visual input. Texts paired with the same visual input are attended from
in one product, which leaves no copy of keys or values per pair.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lavis_uniadapter.adapters import KeyValueAdapter
from lavis_uniadapter.common.host_copy import HostCopy


class PairLayout:
    """Which visual input each pair belongs to, and how its pairs are laid side by side.

    Args:
        visual_index: (pairs,) whole numbers below ``num_visuals``.
        num_visuals: number of visual inputs in the memory.
    """

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
        _, heads, length, d = x.shape
        folded = x.new_zeros(self.num_visuals, self.most, heads, length, d)
        folded[self.visual_index, self.place] = x
        return folded.transpose(1, 2).reshape(self.num_visuals, heads, self.most * length, d)

    def unfold(self, x: Tensor, length: int) -> Tensor:
        """Inverse of fold for a (visuals, heads, most * length, d) tensor."""
        visuals, heads, _, d = x.shape
        x = x.view(visuals, heads, self.most, length, d).transpose(1, 2)
        return x[self.visual_index, self.place]


class LayerMemory:
    """Keys and values of one layer, and how pairs attend to them."""

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        mask: Tensor | None,
        layout: PairLayout | None,
        token_weights: Tensor | None,
    ):
        self.keys = keys
        self.values = values
        self.mask = mask
        self.layout = layout
        self.token_weights = token_weights

    def attend(self, query: Tensor, dropout: float) -> Tensor:
        """Attention output (pairs, heads, length, d) for queries of that shape."""
        if self.token_weights is not None:
            return self._attend_weighted(query, dropout)
        if self.layout is None:
            return F.scaled_dot_product_attention(
                query, self.keys, self.values, attn_mask=self.mask, dropout_p=dropout
            )
        folded = self.layout.fold(query)
        context = F.scaled_dot_product_attention(
            folded, self.keys, self.values, attn_mask=self.mask, dropout_p=dropout
        )
        return self.layout.unfold(context, query.shape[2])

    def _attend_weighted(self, query: Tensor, dropout: float) -> Tensor:
        # Weights belong to a pair and keys to a visual input. q.(w k) = w (q.k), so weighting the
        # logits leaves the keys shared.
        weights = self.token_weights[:, None, None, :].expand(-1, 1, query.shape[2], -1)
        folded = query if self.layout is None else self.layout.fold(query)
        weights = weights if self.layout is None else self.layout.fold(weights)
        weights = weights / math.sqrt(query.shape[-1])
        if torch.is_grad_enabled():
            # Probabilities are computed again for the backward pass: three tensors of (pairs,
            # heads, length, tokens) a layer cost more to keep than to recompute.
            context = checkpoint(
                self._attend_at_once, folded, weights, dropout, use_reentrant=False
            )
        elif query.device.type == "cpu" and not dropout:
            context = self._attend_head_by_head(folded, weights)
        else:
            context = self._attend_at_once(folded, weights, dropout)
        return context if self.layout is None else self.layout.unfold(context, query.shape[2])

    def _attend_at_once(self, folded: Tensor, weights: Tensor, dropout: float) -> Tensor:
        logits = folded @ self.keys.transpose(-1, -2) * weights
        if self.mask is not None:
            logits = logits + self.mask
        return F.dropout(logits.softmax(dim=-1), dropout) @ self.values

    def _attend_head_by_head(self, folded: Tensor, weights: Tensor) -> Tensor:
        """The same without gradient and dropout, in pieces that stay in a processor's cache."""
        context = torch.empty_like(folded)
        visuals, heads = folded.shape[:2]
        for visual in range(visuals):
            for head in range(heads):
                logits = folded[visual, head] @ self.keys[visual, head].t()
                logits.mul_(weights[visual, 0])
                if self.mask is not None:
                    logits.add_(self.mask[visual].flatten(0, -2))
                context[visual, head] = logits.softmax(dim=-1) @ self.values[visual, head]
        return context

    def attention_map(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities (pairs, heads, length, tokens), and the values they weight, per pair."""
        index = slice(None) if self.layout is None else self.layout.visual_index
        keys, values = self.keys[index], self.values[index]
        logits = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self.token_weights is not None:
            logits = logits * self.token_weights[:, None, None, :]
        if self.mask is not None:
            logits = logits + self.mask[index]
        return logits.softmax(dim=-1), values


class VisualMemory:
    """Visual inputs as the cross-modal encoder sees them.

    It may be passed to LAVIS's ``XBertEncoder`` wherever that takes ``encoder_hidden_states``.

    Args:
        states: (visuals, tokens, width); frames of a video concatenated along tokens.
        key_value_adapter: applied once, for all layers.
        mask: additive attention mask, broadcastable to (visuals, heads, queries, tokens).
    """

    def __init__(
        self,
        states: Tensor,
        key_value_adapter: KeyValueAdapter | None = None,
        mask: Tensor | None = None,
    ):
        self.states = states
        self.mask = mask
        self._deltas = (None, None) if key_value_adapter is None else key_value_adapter(states)
        self._projected: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        self._layout: PairLayout | None = None
        self._token_weights: Tensor | None = None

    def pairs(self, visual_index: Tensor, frame_weights: Tensor | None = None) -> VisualMemory:
        """The same memory as seen by a batch of texts; keys and values stay shared.

        Args:
            visual_index: (pairs,) the visual input that each text is paired with.
            frame_weights: (pairs, frames) factors of frame-aware attention, or None.
        """
        view = object.__new__(VisualMemory)
        view.__dict__.update(self.__dict__)
        view._layout = PairLayout(visual_index, len(self.states))
        if frame_weights is not None:
            view._token_weights = self._spread_over_tokens(frame_weights)
        return view

    def _spread_over_tokens(self, frame_weights: Tensor) -> Tensor:
        """(pairs, frames) to (pairs, tokens): each frame's weight on all its tokens but [CLS]."""
        pairs, frames = frame_weights.shape
        if self.states.shape[1] % frames:
            raise ValueError(
                f"{self.states.shape[1]} visual tokens cannot be {frames} frames of equal length."
            )
        per_frame = self.states.shape[1] // frames
        weights = frame_weights[:, :, None].repeat(1, 1, per_frame)
        weights[:, :, 0] = 1
        return weights.view(pairs, -1).to(self.states.dtype)

    def size(self) -> tuple[int, int, int]:
        """(pairs, tokens, width), which is what LAVIS's BertModel asks of encoder states."""
        pairs = len(self.states) if self._layout is None else len(self._layout.visual_index)
        return pairs, self.states.shape[1], self.states.shape[2]

    def for_layer(self, attention: nn.Module) -> LayerMemory:
        """Project for one cross-attention (LAVIS's BertSelfAttention), or reuse what was."""
        if attention not in self._projected:
            projections = []
            for linear, delta in zip((attention.key, attention.value), self._deltas, strict=True):
                projected = linear(self.states)
                if delta is not None:
                    projected = projected + delta
                # In one piece: matrix products would copy it, and keep the copy for backward.
                projections.append(attention.transpose_for_scores(projected).contiguous())
            self._projected[attention] = tuple(projections)
        keys, values = self._projected[attention]
        return LayerMemory(keys, values, self.mask, self._layout, self._token_weights)


def frame_aware_weights(text_feat: Tensor, frame_feat: Tensor) -> Tensor:
    """Parameter-free frame-aware attention: how much each frame matters to each text.

    UniAdapter, section 3.3: a softmax over frames, scaled so that it averages 1; no gradient.

    Args:
        text_feat: (pairs, embed_dim) unit vectors.
        frame_feat: (pairs, frames, embed_dim) unit vectors.

    Returns:
        (pairs, frames) weights, whose sum over frames is their number.
    """
    with torch.no_grad(), torch.autocast(text_feat.device.type, enabled=False):
        logits = torch.einsum("pd,ptd->pt", text_feat.float(), frame_feat.float()) / 4
        return logits.softmax(dim=-1) * frame_feat.shape[1]
