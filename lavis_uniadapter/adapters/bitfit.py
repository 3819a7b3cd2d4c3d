"""BitFit: the backbone's biases alone (arXiv 2106.10199)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet, BackboneGeometry
from lavis_uniadapter.common.schema.methods import MethodConfig


class BiasDelta(nn.Module):
    """Added to a module's frozen bias; zero at the start.

    AdamW moves it as it would move the bias, since biases have no weight decay.
    """

    def __init__(self, module: Any):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(len(module.bias)))
        self.shape = (-1, 1, 1) if isinstance(module, nn.Conv2d) else (-1,)

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return output + self.bias.to(output.dtype).view(self.shape)

    def fold_into(self, module: Any) -> None:
        module.bias += self.bias


class BitFitSet(AdapterSet):
    """The biases of every encoder (``tuning: bitfit``)."""

    KIND = "biases"

    def build(self, config: MethodConfig, geometry: BackboneGeometry) -> None:
        for path, (module, roles) in geometry.modules.items():
            # A bias of keys adds the same to all logits of a query and cannot matter.
            if getattr(module, "bias", None) is not None and roles != ("key",):
                self.deltas[path] = BiasDelta(module)
