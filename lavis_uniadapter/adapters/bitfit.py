"""BitFit: the backbone's biases alone (arXiv 2106.10199)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet, delta_key
from lavis_uniadapter.adapters.geometry import BackboneGeometry, BiasSite
from lavis_uniadapter.common.schema.methods import MethodConfig


class BiasDelta(nn.Module):
    """What is added to a bias; zero at the start, so the bias itself may stay frozen.

    AdamW moves it as it would move the bias: biases have no weight decay.
    """

    def __init__(self, site: BiasSite):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(site.shape[0]))
        self.shape = site.shape

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return output + self.bias.to(output.dtype).view(self.shape)

    @torch.no_grad()
    def fold_into(self, module: nn.Module) -> None:
        module.bias += self.bias


class BitFitSet(AdapterSet):
    """The biases of every encoder (``tuning: bitfit``)."""

    KIND = "biases"

    def __init__(
        self, heads: Mapping[str, nn.Module], config: MethodConfig, geometry: BackboneGeometry
    ):
        super().__init__(heads)
        for site in geometry.biases:
            self.deltas[delta_key(site.module)] = BiasDelta(site)
