"""Encoded batches, as they pass between a model and its evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class VisualFeatures:
    """A batch of images or videos, encoded.

    Attributes:
        embeds: (batch, frames * tokens, width), what the cross-modal encoder attends to.
        feat: (batch, embed_dim) unit vectors, from the mean over frames of [CLS].
        frame_feat: (batch, frames, embed_dim) unit vectors.
    """

    embeds: Tensor
    feat: Tensor
    frame_feat: Tensor


@dataclass(frozen=True)
class TextFeatures:
    """A batch of texts, tokenised and encoded without looking at anything visual.

    Attributes:
        input_ids, attention_mask: (batch, length).
        embeds: (batch, length, width); None where only matching is to follow.
        feat: (batch, embed_dim) unit vectors.
    """

    input_ids: Tensor
    attention_mask: Tensor
    embeds: Tensor | None
    feat: Tensor
