"""UniAdapter: one bottleneck per layer, shared by vision, text and their fusion.

Equations of arXiv 2302.06605, sections 3.2 and 3.3, with ``x`` of shape (batch, tokens, width):

    h       = dropout(relu(W_down LN_in(x) + b_down))       shared, width -> bottleneck
    visual  = s (W_v h + b_v)
    textual = s (W_t h + b_t)
    cross   = s LN_c(W_c h + b_c + W_t h + b_t)             reuses the textual up-projection

In cross-modal mode a layer adds ``textual`` of its self-attention's output, the query residual, and
``cross`` of its cross-attention's output.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet, BackboneGeometry
from lavis_uniadapter.common.schema.methods import AdapterConfig, BottleneckConfig


class UniAdapter(nn.Module):
    """The adapter of one layer, or of a visual and a textual layer of equal width.

    ``branches`` are those that it computes, of ``visual`` (beside a ViT block's FFN), ``textual``
    and ``cross_modal`` (beside a BERT layer's).
    """

    def __init__(
        self,
        width: int,
        config: AdapterConfig,
        branches: Collection[str],
        norm_cross_modal: bool = True,
    ):
        super().__init__()
        self.scale = config.scale
        self.branches = tuple(branches)
        self.query_residual = config.query_residual
        share_down, share_up = config.share in ("down", "all"), config.share in ("up", "all")
        # A shared up-projection is W_c and W_t at once, so there is nothing to reuse.
        may_reuse = config.textual and config.reuse_textual_up and not share_up
        self.reuses_textual_up = may_reuse and "cross_modal" in branches
        ups = dict.fromkeys([*branches, *["textual"] * self.reuses_textual_up])
        self.norm_in = PerBranch(lambda: nn.LayerNorm(width), branches, share_down)
        self.down = PerBranch(lambda: nn.Linear(width, config.bottleneck), branches, share_down)
        self.dropout = nn.Dropout(config.dropout)
        self.up = PerBranch(lambda: nn.Linear(config.bottleneck, width), ups, share_up)
        has_norm = norm_cross_modal and "cross_modal" in branches
        self.norm_cross_modal = nn.LayerNorm(width) if has_norm else nn.Identity()

    def forward(self, x: Tensor, branch: str) -> Tensor:
        """One branch for states (batch, tokens, width)."""
        h = self.dropout(F.relu(self.down(self.norm_in(x, branch), branch)))
        up = self.up(h, branch)
        if branch == "cross_modal":
            if self.reuses_textual_up:
                up = up + self.up(h, "textual")
            up = self.norm_cross_modal(up)
        return self.scale * up

    def visual(self, x: Tensor) -> Tensor:
        return self(x, "visual")

    def textual(self, a: Tensor) -> Tensor | int:
        return self(a, "textual") if "textual" in self.branches else 0

    def cross_modal(self, a: Tensor, c: Tensor) -> Tensor | int:
        residual = self.textual(a) if self.query_residual else 0
        return residual + (self(c, "cross_modal") if "cross_modal" in self.branches else 0)

    def init_weights(self, init: str, zero_textual_up: bool) -> None:
        """Draw the initial weights: ``identity`` makes all branches 0.

        ``released`` starts like the authors' retrieval script with ``zero_textual_up`` (W_down
        uniform, W_t zero), and like their VQA script without it (all normal).
        """
        released = init == "released"
        has_norm = isinstance(self.norm_cross_modal, nn.LayerNorm)
        for down in self.down.values():
            (normal if released and not zero_textual_up else uniform)(down)
        for branch, up in self.up.items():
            if released:
                (zero if branch == "textual" and zero_textual_up else normal)(up)
            else:
                # The norm of the cross-modal branch must not see zeros, where its gradient is
                # 1/sqrt(eps): that branch is made zero through the gain of the norm.
                (uniform if branch == "cross_modal" and has_norm else zero)(up)
        if has_norm and not released:
            zero(self.norm_cross_modal)


class PerBranch(nn.ModuleDict):
    """A module for each branch, or one that all branches share."""

    def __init__(self, build: Callable[[], nn.Module], branches: Iterable[str], shared: bool):
        names = ["shared"] if shared and branches else branches
        super().__init__({name: build() for name in names})

    def forward(self, x: Tensor, branch: str) -> Tensor:
        return self["shared" if "shared" in self else branch](x)


class KeyValueAdapter(nn.Module):
    """``scale (W_up (W_down m + b) + b)``, added to the keys or the values of every layer.

    From the authors' released code. ``m`` is what cross-attention attends to; ``scale`` is learned.
    """

    def __init__(self, in_width: int, out_width: int, config: AdapterConfig):
        super().__init__()
        self.down = nn.Linear(in_width, config.kv_bottleneck)
        self.up = nn.Linear(config.kv_bottleneck, out_width)
        self.scale = nn.Parameter(torch.ones(1))
        normal(self.down)
        (normal if config.init == "released" else zero)(self.up)

    def forward(self, m: Tensor) -> Tensor:
        up = self.up(self.down(m))
        # Under autocast the float32 scale would make float32 of it.
        return (self.scale * up).to(up.dtype)


class UniAdapterSet(AdapterSet):
    """One UniAdapter a layer, and the key/value adapters.

    Where vision and text are equally wide, layer i of both share ``layers[i]``. Where they are not
    (ViT-L: 1024 against 768) no matrix fits both: the visual layers come first, then the textual.
    """

    norm_cross_modal = True

    def build(self, config: AdapterConfig, geometry: BackboneGeometry) -> None:
        self.frame_aware = config.frame_aware
        # Without text mode and the query residual nothing computes the textual branch, and its
        # parameters would never get a gradient.
        has_textual = config.textual and (geometry.text_mode or config.query_residual)
        text = ("textual",) * has_textual + ("cross_modal",) * config.cross_modal
        visual_depth = geometry.visual_depth if config.visual else 0
        first = 0 if geometry.visual_width == geometry.text_width else visual_depth
        end = first + (geometry.text_depth if config.textual or config.cross_modal else 0)
        self._places = {"visual": range(visual_depth), "text": range(first, end)}
        self.layers = nn.ModuleList()
        for i in range(max(visual_depth, end)):
            width = geometry.visual_width if i < visual_depth else geometry.text_width
            branches = ("visual",) * (i < visual_depth) + text * (first <= i < end)
            layer = UniAdapter(width, config, branches, self.norm_cross_modal)
            # Captioning, which the authors have not released, has a decoder like VQA's.
            layer.init_weights(config.init, zero_textual_up=geometry.text_mode)
            self.layers.append(layer)
        if config.kv_bottleneck:
            for name, width in geometry.memory_widths.items():
                sizes = width, geometry.text_width
                self.key_value[name] = nn.ModuleDict(
                    {part: KeyValueAdapter(*sizes, config) for part in ("key", "value")}
                )

    def layer(self, encoder: str, index: int) -> nn.Module | None:
        places = self._places[encoder]
        return self.layers[places[index]] if index < len(places) else None


class SeparateAdapterSet(UniAdapterSet):
    """A bottleneck of its own for each modality, nothing shared: the baseline of section 4."""

    norm_cross_modal = False

    def build(self, config: BottleneckConfig, geometry: BackboneGeometry) -> None:
        separate = {"share": "none", "reuse_textual_up": False, "query_residual": False}
        options = {**config.model_dump(), **separate, "kv_bottleneck": 0}
        super().build(AdapterConfig(**options), geometry)


def draw(initialise: Callable[[Tensor], Tensor], module: Any) -> None:
    """Draw a module's weight; its bias is 0."""
    initialise(module.weight)
    nn.init.zeros_(module.bias)


uniform = partial(draw, partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
normal = partial(draw, partial(nn.init.normal_, std=0.02))  # BERT's and the ViT's
zero = partial(draw, nn.init.zeros_)
