"""The plain adapter: a bottleneck of its own for each modality, nothing shared.

It is the baseline that UniAdapter's sharing is measured against (arXiv 2302.06605, section 4), and
UniAdapter's own ablation "without sharing".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet
from lavis_uniadapter.adapters.config import BottleneckConfig
from lavis_uniadapter.adapters.geometry import BackboneGeometry


class Bottleneck(nn.Module):
    """``s W_up relu(W_down LN(x))``, or ``s LN_out(W_up relu(W_down LN(x)))``; biases included.

    It starts at zero, through its last matrix or the affine of its last norm.

    Args:
        width: of the hidden states (batch, tokens, width).
        config: bottleneck, scale and dropout.
        norm_out: whether there is a LayerNorm after the up-projection.
    """

    def __init__(self, width: int, config: BottleneckConfig, norm_out: bool = False):
        super().__init__()
        self.scale = config.scale
        self.norm_in = nn.LayerNorm(width)
        self.down = nn.Linear(width, config.bottleneck)
        self.dropout = nn.Dropout(config.dropout)
        self.up = nn.Linear(config.bottleneck, width)
        self.norm_out = nn.LayerNorm(width) if norm_out else None
        init_down(self.down)
        zero(self.up if self.norm_out is None else self.norm_out)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up(self.dropout(F.relu(self.down(self.norm_in(x)))))
        return self.scale * (up if self.norm_out is None else self.norm_out(up))


class SeparateAdapters(nn.Module):
    """The adapters of one layer, each with its own bottleneck.

    Args:
        width: width of the hidden states.
        config: bottleneck, scale and dropout.
        visual, textual, cross_modal: which branches this layer has.
        query_residual: whether cross-modal mode adds the textual branch.
        norm_cross_modal: whether the cross-modal branch ends in a LayerNorm.
    """

    def __init__(
        self,
        width: int,
        config: BottleneckConfig,
        *,
        visual: bool,
        textual: bool,
        cross_modal: bool,
        query_residual: bool = False,
        norm_cross_modal: bool = False,
    ):
        super().__init__()
        self.of_visual = Bottleneck(width, config) if visual else None
        self.of_textual = Bottleneck(width, config) if textual else None
        self.of_cross_modal = Bottleneck(width, config, norm_cross_modal) if cross_modal else None
        self.query_residual = query_residual

    def visual(self, x: Tensor) -> Tensor | None:
        return None if self.of_visual is None else self.of_visual(x)

    def textual(self, x: Tensor) -> Tensor | None:
        return None if self.of_textual is None else self.of_textual(x)

    def cross_modal(self, after_self: Tensor, after_cross: Tensor) -> Tensor | None:
        residual = self.textual(after_self) if self.query_residual else None
        own = None if self.of_cross_modal is None else self.of_cross_modal(after_cross)
        return add(residual, own)


class LayeredSet(AdapterSet):
    """A set with one adapter module a layer, beside its FFN.

    Where vision and text are equally wide, layer i of both is ``layers[i]``, so they can share.
    Where they are not (ViT-L: 1024 against 768) no matrix fits both, and each has its own. A
    subclass says in ``build_layer`` what a layer's adapter is.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        config: BottleneckConfig,
        geometry: BackboneGeometry,
    ):
        super().__init__(heads)
        visual_depth = geometry.visual_depth if config.visual else 0
        text_depth = geometry.text_depth if config.textual or config.cross_modal else 0

        def build(width: int, visual: bool, text: bool) -> nn.Module:
            branches = {
                "visual": visual and config.visual,
                "textual": text and config.textual and self.uses_textual(config, geometry),
                "cross_modal": text and config.cross_modal,
            }
            # A bottleneck that leads nowhere would be declared to train and never get a gradient.
            build_layer = self.build_layer if any(branches.values()) else SeparateAdapters
            return build_layer(width, config, **branches)

        if geometry.visual_width == geometry.text_width:
            self.layers = nn.ModuleList(
                build(geometry.text_width, i < visual_depth, i < text_depth)
                for i in range(max(visual_depth, text_depth))
            )
            visual_layers = text_layers = self.layers
        else:
            visual_layers = self.visual_layers = nn.ModuleList(
                build(geometry.visual_width, True, False) for _ in range(visual_depth)
            )
            text_layers = self.text_layers = nn.ModuleList(
                build(geometry.text_width, False, True) for _ in range(text_depth)
            )
        self._depths = {"visual": visual_depth, "text": text_depth}
        self._names = {
            "visual": next(n for n, m in self.named_children() if m is visual_layers),
            "text": next(n for n, m in self.named_children() if m is text_layers),
        }

    def build_layer(
        self,
        width: int,
        config: BottleneckConfig,
        *,
        visual: bool,
        textual: bool,
        cross_modal: bool,
    ) -> nn.Module:
        raise NotImplementedError

    def uses_textual(self, config: BottleneckConfig, geometry: BackboneGeometry) -> bool:
        """Whether anything computes the textual branch; if not, it must not be trained."""
        return geometry.text_mode

    def layer(self, encoder: str, index: int) -> nn.Module | None:
        if index >= self._depths[encoder]:
            return None
        return getattr(self, self._names[encoder])[index]

    def layer_parameters(self) -> Iterator[nn.Parameter]:
        for name in dict.fromkeys(self._names.values()):
            yield from getattr(self, name).parameters()


class BottleneckAdapterSet(LayeredSet):
    """A bottleneck of its own for each modality (``tuning: adapter``)."""

    def build_layer(self, width, config, **branches) -> SeparateAdapters:
        return SeparateAdapters(width, config, **branches)


def add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of what is there."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def init_down(down: nn.Linear) -> None:
    """The released code's initialisation of a down-projection."""
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
    nn.init.zeros_(down.bias)


def zero(module: nn.Linear | nn.LayerNorm) -> None:
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
