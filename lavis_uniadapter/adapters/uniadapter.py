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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet
from lavis_uniadapter.adapters.geometry import BackboneGeometry
from lavis_uniadapter.common.schema.methods import AdapterConfig

SHARED = "shared"


class UniAdapter(nn.Module):
    """The adapter of one layer (or of one pair of layers, visual and textual, of equal width).

    Args:
        width: width of the hidden states.
        config: bottleneck, scale, and what the branches share.
        branches: which of ``visual``, ``textual`` and ``cross_modal`` this layer computes.
        norm_cross_modal: whether the cross-modal branch ends in a LayerNorm.
    """

    def __init__(
        self,
        width: int,
        config: AdapterConfig,
        branches: Sequence[str],
        norm_cross_modal: bool = True,
    ):
        super().__init__()
        self.scale = config.scale
        self.branches = tuple(branches)
        self.query_residual = config.query_residual and "textual" in branches
        share_down, share_up = config.share in ("down", "all"), config.share in ("up", "all")
        has_cross_modal = "cross_modal" in branches
        # A shared up-projection is W_c and W_t at once, so there is nothing to reuse.
        self.reuses_textual_up = (
            has_cross_modal and config.textual and config.reuse_textual_up and not share_up
        )
        ups = dict.fromkeys([*branches, *(["textual"] if self.reuses_textual_up else [])])
        self.norm_in = _one_each(branches, share_down, lambda: nn.LayerNorm(width))
        self.down = _one_each(branches, share_down, lambda: nn.Linear(width, config.bottleneck))
        self.dropout = nn.Dropout(config.dropout)
        self.up = _one_each(ups, share_up, lambda: nn.Linear(config.bottleneck, width))
        with_norm = has_cross_modal and norm_cross_modal
        self.norm_cross_modal = nn.LayerNorm(width) if with_norm else None

    def _bottleneck(self, x: Tensor, branch: str) -> Tensor:
        x = _of(self.norm_in, branch)(x)
        return self.dropout(F.relu(_of(self.down, branch)(x)))

    def _plain(self, x: Tensor, branch: str) -> Tensor | None:
        if branch not in self.branches:
            return None
        return self.scale * _of(self.up, branch)(self._bottleneck(x, branch))

    def visual(self, x: Tensor) -> Tensor | None:
        """Branch beside a ViT block's FFN; (batch, tokens, width), or None if it has none."""
        return self._plain(x, "visual")

    def textual(self, x: Tensor) -> Tensor | None:
        """Branch beside a BERT layer's FFN in text mode."""
        return self._plain(x, "textual")

    def cross_modal(self, after_self: Tensor, after_cross: Tensor) -> Tensor | None:
        """What a BERT layer adds beside its FFN in cross-modal mode.

        Args:
            after_self, after_cross: outputs of its self-attention and of its cross-attention.
        """
        residual = self.textual(after_self) if self.query_residual else None
        if "cross_modal" not in self.branches:
            return residual
        h = self._bottleneck(after_cross, "cross_modal")
        up = _of(self.up, "cross_modal")(h)
        if self.reuses_textual_up:
            up = up + self.up["textual"](h)
        if self.norm_cross_modal is not None:
            up = self.norm_cross_modal(up)
        return self.scale * up if residual is None else residual + self.scale * up

    def init_weights(self, init: str, zero_textual_up: bool) -> None:
        """Draw the initial weights; norms keep weight 1 and bias 0, biases are 0.

        Args:
            init: ``released`` or ``identity``, see AdapterConfig.
            zero_textual_up: for ``released``: as the retrieval script of the authors' code leaves
                the adapters (W_down uniform, W_t zero), or as its VQA script does (all normal).
        """
        for down in self.down.values():
            if init == "released" and not zero_textual_up:
                normal(down)
            else:
                uniform(down)
        has_norm = self.norm_cross_modal is not None
        for branch, up in self.up.items():
            # The norm of the cross-modal branch must not see zeros, where its gradient is
            # 1/sqrt(eps): released weights leave W_c (or a shared one) random, and identity makes
            # the branch zero through the gain of the norm.
            if init == "released":
                zero(up) if branch == "textual" and zero_textual_up else normal(up)
            else:
                uniform(up) if branch == "cross_modal" and has_norm else zero(up)
        if init == "identity" and has_norm:
            zero(self.norm_cross_modal)


def _one_each(
    branches: Sequence[str], shared: bool, build: Callable[[], nn.Module]
) -> nn.ModuleDict:
    """One module that all branches share, or one for each; none if there is no branch."""
    return nn.ModuleDict({key: build() for key in ([SHARED] if shared and branches else branches)})


def _of(modules: nn.ModuleDict, branch: str) -> nn.Module:
    return modules[SHARED] if SHARED in modules else modules[branch]


class LinearBottleneck(nn.Module):
    """``scale (W_up (W_down m + b) + b)``: no activation, learnable scalar starting at 1."""

    def __init__(self, in_width: int, out_width: int, bottleneck: int, init: str):
        super().__init__()
        self.down = nn.Linear(in_width, bottleneck)
        self.up = nn.Linear(bottleneck, out_width)
        self.scale = nn.Parameter(nn.init.ones_(self.up.weight.new_empty(1)))
        normal(self.down)
        (normal if init == "released" else zero)(self.up)

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


class UniAdapterSet(AdapterSet):
    """All adapters of a backbone: one UniAdapter a layer, and the key/value adapters.

    Where vision and text are equally wide, layer i of both is ``layers[i]``, so they can share.
    Where they are not (ViT-L: 1024 against 768) no matrix fits both, and each has its own.

    Args:
        norm_cross_modal: whether cross-modal branches end in a LayerNorm.
    """

    def __init__(
        self,
        heads: Mapping[str, nn.Module],
        config: AdapterConfig,
        geometry: BackboneGeometry,
        norm_cross_modal: bool = True,
    ):
        super().__init__(heads)
        self.frame_aware = config.frame_aware
        visual_depth = geometry.visual_depth if config.visual else 0
        text_depth = geometry.text_depth if config.textual or config.cross_modal else 0
        # The textual branch is computed in text mode and by the query residual; else it would be
        # declared to train and never get a gradient.
        has_textual = config.textual and (geometry.text_mode or config.query_residual)
        text_branches = [
            *(["textual"] if has_textual else []),
            *(["cross_modal"] if config.cross_modal else []),
        ]

        def build(width: int, visual: bool, text: bool) -> UniAdapter:
            branches = [*(["visual"] if visual else []), *(text_branches if text else [])]
            layer = UniAdapter(width, config, branches, norm_cross_modal)
            # The authors' retrieval script zeroes W_t anew, their VQA script does not; captioning,
            # which they have not released, has a decoder like VQA's.
            layer.init_weights(config.init, zero_textual_up=geometry.text_mode)
            return layer

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
        if config.kv_bottleneck:
            for name, width in geometry.memory_widths.items():
                self.key_value[name] = KeyValueAdapter(width, geometry.text_width, config)

    def layer(self, encoder: str, index: int) -> nn.Module | None:
        if index >= self._depths[encoder]:
            return None
        return getattr(self, self._names[encoder])[index]

    def layer_parameters(self) -> Iterator[nn.Parameter]:
        for name in dict.fromkeys(self._names.values()):
            yield from getattr(self, name).parameters()


def uniform(linear: nn.Linear) -> None:
    """Kaiming's uniform distribution with a = sqrt(5); bias zero."""
    nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
    nn.init.zeros_(linear.bias)


def normal(linear: nn.Linear) -> None:
    """BERT's and the ViT's N(0, 0.02), which the authors' constructors end with; bias zero."""
    nn.init.normal_(linear.weight, std=0.02)
    nn.init.zeros_(linear.bias)


def zero(module: nn.Linear | nn.LayerNorm) -> None:
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
