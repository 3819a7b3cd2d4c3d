"""BitFit: the backbone's biases alone (arXiv 2106.10199)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet, delta_key
from lavis_uniadapter.adapters.geometry import BackboneGeometry
from lavis_uniadapter.common.schema.methods import MethodConfig


class BiasDelta(nn.Module):
    """Added to a frozen bias; zero at the start.

    AdamW moves it as it would move the bias, since biases have no weight decay.

    Args:
        shape: of the bias as it is added to its module's output.
    """

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(shape[0]))
        self.shape = shape

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        return output + self.bias.to(output.dtype).view(self.shape)

    def fold_into(self, module: nn.Module) -> None:
        module.bias += self.bias


class BitFitSet(AdapterSet):
    """The biases of every encoder (``tuning: bitfit``)."""

    KIND = "biases"

    def build(self, config: MethodConfig, geometry: BackboneGeometry) -> None:
        for path, shape in geometry.biases.items():
            self.deltas[delta_key(path)] = BiasDelta(shape)
