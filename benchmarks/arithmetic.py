"""GFLOP that BLIP's parts need, from their shapes: two per multiply-add of matrix products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """Sizes of BLIP's text encoder or decoder (BERT base with cross-attention)."""

    width: int = 768
    depth: int = 12
    mlp: int = 3072
    vocabulary: int = 30524

    def keys_and_values(self, tokens: int, memory_width: int = 768) -> float:
        """Projecting one visual input (or question) for the cross-attention of every layer."""
        return self.depth * 2 * 2 * tokens * memory_width * self.width / 1e9

    def key_value_adapter(self, tokens: int, bottleneck: int = 64) -> float:
        """The key/value adapter on one visual input."""
        return 2 * 2 * 2 * tokens * self.width * bottleneck / 1e9

    def attend(self, length: int, memory_tokens: int) -> float:
        """A text of `length` tokens through all layers, keys and values of its memory given."""
        linear = 2 * length * (6 * self.width**2 + 2 * self.width * self.mlp)
        attention = 2 * 2 * length * (length + memory_tokens) * self.width
        return self.depth * (linear + attention) / 1e9

    def adapters(self, length: int, bottleneck: int = 128) -> float:
        """Textual and cross-modal adapters of a text, in cross-modal mode."""
        query_residual = 2 * 2 * length * self.width * bottleneck
        cross_modal = 3 * 2 * length * self.width * bottleneck
        return self.depth * (query_residual + cross_modal) / 1e9

    def words(self, positions: int) -> float:
        """The language modelling head."""
        return 2 * positions * self.width * (self.width + self.vocabulary) / 1e9


@dataclass(frozen=True)
class Vision:
    """Sizes of BLIP's visual encoder (ViT base, patches of 16 pixels)."""

    width: int = 768
    depth: int = 12
    patch: int = 16

    def tokens(self, image_size: int) -> int:
        return (image_size // self.patch) ** 2 + 1

    def encode(self, image_size: int) -> float:
        """One frame."""
        tokens = self.tokens(image_size)
        linear = 2 * tokens * 12 * self.width**2
        attention = 2 * 2 * tokens**2 * self.width
        patches = 2 * (tokens - 1) * 3 * self.patch**2 * self.width
        return (self.depth * (linear + attention) + patches) / 1e9
