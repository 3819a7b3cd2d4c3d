"""Encoded batches, and the checks of what is encoded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Self


@dataclass(frozen=True)
class Features:
    """A batch of encoded inputs; feats are unit vectors."""

    # TunedBlip.adapter_state when they were encoded; None: not known, and not checked.
    adapter: str | None = field(default=None, kw_only=True)

    def __getitem__(self, index: Tensor | slice) -> Self:
        """Some items of the batch."""
        tensors = {name: x[index] for name, x in vars(self).items() if torch.is_tensor(x)}
        return replace(self, **tensors)


@dataclass(frozen=True)
class VisualFeatures(Features):
    """A batch of images or videos, encoded."""

    embeds: Tensor  # (batch, frames * tokens, width), what the cross-modal encoder attends to
    feat: Tensor  # (batch, embed_dim), from the mean over frames of [CLS]
    frame_feat: Tensor  # (batch, frames, embed_dim)


@dataclass(frozen=True)
class TextFeatures(Features):
    """A batch of texts, encoded in text mode."""

    input_ids: Tensor  # (batch, length)
    attention_mask: Tensor  # (batch, length)
    embeds: Tensor | None  # (batch, length, width); None where only matching follows
    feat: Tensor  # (batch, embed_dim)

    def cut(self, length: int) -> TextFeatures:
        """Without padding, beyond so many tokens."""
        ids, mask = self.input_ids[:, :length], self.attention_mask[:, :length]
        return TextFeatures(ids, mask, None, self.feat, adapter=self.adapter)


def visual_input(samples: Mapping[str, Any] | Tensor) -> Tensor:
    """The images or videos of a batch: a tensor, or the ``image`` or ``video`` of a dict.

    Raises:
        TypeError: unless it is a tensor of floating-point numbers.
        ValueError: unless it is (batch, 3, H, W) or (batch, 3, frames, H, W).
    """
    name, x = "samples", samples
    if isinstance(samples, Mapping):
        given = [key for key in ("image", "video") if samples.get(key) is not None]
        if len(given) != 1:
            raise ValueError("samples must have either 'image' or 'video'.")
        name, x = f"samples[{given[0]!r}]", samples[given[0]]
    if not torch.is_tensor(x) or not x.is_floating_point():
        raise TypeError(
            f"{name} must be a tensor of images or videos, in floating point, as the visual "
            f"processors make it; got {x.dtype if torch.is_tensor(x) else type(x).__name__}."
        )
    is_video = name == "samples['video']"
    if x.ndim != 5 and (is_video or x.ndim != 4) or x.shape[1] != 3 or not x.numel():
        shapes = "(batch, 3, frames, H, W)" if is_video else "(batch, 3, [frames,] H, W)"
        raise ValueError(f"{name} must have the shape {shapes}; got {tuple(x.shape)}.")
    return x


def text_list(texts: Any, name: str) -> list[str]:
    """Several texts as a list; TypeError for anything else, ValueError for none."""
    if isinstance(texts, str | Mapping | Set) or not isinstance(texts, Iterable):
        raise TypeError(f"{name} must be a list of strings; got {texts!r}.")
    texts = list(texts)
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise TypeError(f"{name} must be a list of strings; it has {wrong[0]!r}.")
    if not texts:
        raise ValueError(f"{name} is empty.")
    return texts


def texts_of(samples: Mapping[str, Any], key: str = "text_input") -> list[str]:
    """Texts of a batch, of which a string is one; raises as ``text_list``."""
    if not isinstance(samples, Mapping) or key not in samples:
        raise TypeError(f"samples must be a dict that has {key!r}.")
    texts = samples[key]
    return text_list([texts] if isinstance(texts, str) else texts, f"samples[{key!r}]")


def check_lengths(**lengths: int) -> None:
    """ValueError unless all lengths are equal, naming them."""
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(f"These must have the same length: {found}.")
