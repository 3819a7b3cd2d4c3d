"""Linear probing: the heads alone, on a frozen backbone."""

from __future__ import annotations

import copy
from collections import OrderedDict

from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet, BackboneGeometry
from lavis_uniadapter.common.schema.methods import MethodConfig


class Replacement(nn.Module):
    """A trained copy of a module of the backbone, computed in its place."""

    def __init__(self, module: nn.Module):
        super().__init__()
        # without the forward hook that calls this replacement
        self.module = copy.deepcopy(module, {id(module._forward_hooks): OrderedDict()})

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return self.module(x)

    def fold_into(self, module: nn.Module) -> None:
        module.load_state_dict(self.module.state_dict())


class LinearSet(AdapterSet):
    """The heads (``tuning: linear``); without heads, the layer before the vocabulary."""

    KIND = "layer before the vocabulary"

    def build(self, config: MethodConfig, geometry: BackboneGeometry) -> None:
        for path, (module, roles) in geometry.modules.items():
            if roles == ("word_transform",) and not self.heads:
                self.deltas[path] = Replacement(module)
