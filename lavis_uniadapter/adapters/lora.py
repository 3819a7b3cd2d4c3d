"""LoRA: low-rank changes of the backbone's own matrices (arXiv 2106.09685)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from lavis_uniadapter.adapters.bank import AdapterSet, BackboneGeometry
from lavis_uniadapter.common.schema.methods import LoraConfig


class LowRank(nn.Module):
    """``scale · up(down(dropout(x)))`` for some rows of a matrix; zero at the start."""

    def __init__(self, in_width: int, rows: slice, config: LoraConfig):
        super().__init__()
        self.rows = rows
        self.scale = config.alpha / config.rank
        self.dropout = nn.Dropout(config.dropout)
        self.down = nn.Linear(in_width, config.rank, bias=False)
        self.up = nn.Linear(config.rank, rows.stop - rows.start, bias=False)
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.up(self.down(self.dropout(x)))


class LoraDelta(nn.ModuleDict):
    """The low-rank changes of one ``nn.Linear``, by role."""

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        for low_rank in self.values():
            change = low_rank(x)
            if change.shape == output.shape:
                output = output + change
            else:  # query, key and value in one matrix
                output[..., low_rank.rows] += change
        return output

    def fold_into(self, linear: nn.Linear) -> None:
        for low_rank in self.values():
            change = low_rank.scale * low_rank.up.weight @ low_rank.down.weight
            linear.weight[low_rank.rows] += change


class LoraSet(AdapterSet):
    """LoRA on every encoder (``tuning: lora``)."""

    KIND = "low-rank matrices"

    def build(self, config: LoraConfig, geometry: BackboneGeometry) -> None:
        for path, (module, roles) in geometry.modules.items():
            delta = LoraDelta()
            for i, role in enumerate(roles):
                if role in config.targets:
                    rows = module.out_features // len(roles)
                    part = slice(i * rows, (i + 1) * rows)
                    delta[role] = LowRank(module.in_features, part, config)
            if delta:
                self.deltas[path] = delta
