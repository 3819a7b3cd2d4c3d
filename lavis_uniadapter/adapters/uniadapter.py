"""UniAdapter: one bottleneck per layer, shared by vision, text and their fusion.

Equations of arXiv 2302.06605, section 3.2 and 3.3, with ``x`` of shape (batch, tokens, width):

    h       = dropout(relu(W_down LN_in(x) + b_down))       shared, width -> bottleneck
    visual  = s (W_v h + b_v)
    textual = s (W_t h + b_t)
    cross   = s LN_c(W_c h + b_c + W_t h + b_t)             reuses the textual up-projection

In cross-modal mode a layer adds ``textual`` of its self-attention's output, the query residual, and
``cross`` of its cross-attention's output.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lavis_uniadapter.adapters.bottleneck import (
    LayeredSet,
    SeparateAdapters,
    add,
    init_down,
    zero,
)
from lavis_uniadapter.adapters.config import AdapterConfig
from lavis_uniadapter.adapters.geometry import BackboneGeometry


class UniAdapter(nn.Module):
    """The adapter of one layer (or of one pair of layers, visual and textual, of equal width).

    Args:
        width: width of the hidden states.
        config: bottleneck, scale, dropout and initialisation.
        visual, textual, cross_modal: which branches this layer has.
    """

    def __init__(
        self, width: int, config: AdapterConfig, *, visual: bool, textual: bool, cross_modal: bool
    ):
        super().__init__()
        self.scale = config.scale
        self.query_residual = config.query_residual
        self.norm_in = nn.LayerNorm(width)
        self.down = nn.Linear(width, config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up_visual = nn.Linear(config.bottleneck, width) if visual else None
        self.up_textual = nn.Linear(config.bottleneck, width) if textual else None
        self.up_cross_modal = nn.Linear(config.bottleneck, width) if cross_modal else None
        self.norm_cross_modal = nn.LayerNorm(width) if cross_modal else None
        self._init_weights(config.init)

    def _init_weights(self, init: str) -> None:
        init_down(self.down)
        if self.up_textual is not None:
            zero(self.up_textual)
        if init == "released":
            return
        if self.up_visual is not None:
            zero(self.up_visual)
        if self.norm_cross_modal is not None:
            # The branch starts at zero through the affine of its norm. Were it W_c that is zero,
            # the norm would see an all-zero input, where its gradient is 1/sqrt(eps).
            zero(self.norm_cross_modal)

    def _bottleneck(self, x: Tensor) -> Tensor:
        return self.dropout(F.relu(self.down(self.norm_in(x))))

    def visual(self, x: Tensor) -> Tensor | None:
        """Branch beside a ViT block's FFN; (batch, tokens, width), or None if it has none."""
        if self.up_visual is None:
            return None
        return self.scale * self.up_visual(self._bottleneck(x))

    def textual(self, x: Tensor) -> Tensor | None:
        """Branch beside a BERT layer's FFN in text mode."""
        if self.up_textual is None:
            return None
        return self.scale * self.up_textual(self._bottleneck(x))

    def cross_modal(self, after_self: Tensor, after_cross: Tensor) -> Tensor | None:
        """What a BERT layer adds beside its FFN in cross-modal mode.

        Args:
            after_self, after_cross: outputs of its self-attention and of its cross-attention.
        """
        residual = self.textual(after_self) if self.query_residual else None
        if self.up_cross_modal is None:
            return residual
        h = self._bottleneck(after_cross)
        up = self.up_cross_modal(h)
        if self.up_textual is not None:
            up = up + self.up_textual(h)
        return add(residual, self.scale * self.norm_cross_modal(up))


class LinearBottleneck(nn.Module):
    """``scale (W_up (W_down m + b) + b)``: no activation, learnable scalar starting at 1."""

    def __init__(self, in_width: int, out_width: int, bottleneck: int, init: str):
        super().__init__()
        self.down = nn.Linear(in_width, bottleneck)
        self.up = nn.Linear(bottleneck, out_width)
        self.scale = nn.Parameter(nn.init.ones_(self.up.weight.new_empty(1)))
        if init == "identity":
            zero(self.up)

    def forward(self, m: Tensor) -> Tensor:
        up = self.up(self.down(m))
        # Under autocast the float32 scale would make float32 of it.
        return (self.scale * up).to(up.dtype)


class KeyValueAdapter(nn.Module):
    """Adapter of the cross-attention's keys and values, one for all layers.

    It is in the authors' released code and not in the paper. Applied to the states ``m`` of shape
    (batch, tokens, in_width) that cross-attention attends to, its two outputs, of shape
    (batch, tokens, out_width), are added to the keys and to the values of every layer.
    """

    def __init__(self, in_width: int, out_width: int, config: AdapterConfig):
        super().__init__()
        self.key = LinearBottleneck(in_width, out_width, config.kv_bottleneck, config.init)
        self.value = LinearBottleneck(in_width, out_width, config.kv_bottleneck, config.init)

    def forward(self, m: Tensor) -> tuple[Tensor, Tensor]:
        return self.key(m), self.value(m)


class UniAdapterSet(LayeredSet):
    """All adapters of a backbone: one UniAdapter a layer, and the key/value adapters."""

    def __init__(
        self, heads: Mapping[str, nn.Module], config: AdapterConfig, geometry: BackboneGeometry
    ):
        super().__init__(heads, config, geometry)
        self.frame_aware = config.frame_aware
        if config.kv_bottleneck:
            for name, width in geometry.memory_widths.items():
                self.key_value[name] = KeyValueAdapter(width, geometry.text_width, config)

    def build_layer(self, width, config, **branches) -> UniAdapter | SeparateAdapters:
        if config.shared:
            return UniAdapter(width, config, **branches)
        return SeparateAdapters(
            width,
            config,
            **branches,
            query_residual=config.query_residual,
            norm_cross_modal=True,
        )

    def uses_textual(self, config: AdapterConfig, geometry: BackboneGeometry) -> bool:
        reused = config.shared and config.cross_modal
        return geometry.text_mode or config.query_residual or reused
