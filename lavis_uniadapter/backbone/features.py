"""Encoded batches, as they pass between a model and its evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisualFeatures:
    """A batch of images or videos, encoded; feats are unit vectors."""

    embeds: Tensor  # (batch, frames * tokens, width), what the cross-modal encoder attends to
    feat: Tensor  # (batch, embed_dim), from the mean over frames of [CLS]
    frame_feat: Tensor  # (batch, frames, embed_dim)


@dataclass(frozen=True)
class TextFeatures:
    """A batch of texts, encoded in text mode; feats are unit vectors."""

    input_ids: Tensor  # (batch, length)
    attention_mask: Tensor  # (batch, length)
    embeds: Tensor | None  # (batch, length, width); None where only matching follows
    feat: Tensor  # (batch, embed_dim)


def visual_input(samples: Mapping[str, Any] | Tensor) -> Tensor:
    """The images or videos of a batch: a tensor, or the ``image`` or ``video`` of a dict.

    Raises:
        ValueError: unless it is (batch, 3, H, W) or (batch, 3, frames, H, W).
    """
    x = samples if torch.is_tensor(samples) else samples.get("video", samples.get("image"))
    if x is None or x.ndim not in (4, 5) or x.shape[1] != 3:
        shape = "nothing" if x is None else tuple(x.shape)
        raise ValueError(
            "Expected samples['image'] of shape (batch, 3, H, W) or samples['video'] of shape "
            f"(batch, 3, frames, H, W); got {shape}."
        )
    return x
