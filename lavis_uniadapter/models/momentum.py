"""Momentum encoders without a second backbone.

BLIP's contrastive targets come from a moving average of the model. Only what is trained moves, so
only that is averaged; everything else is shared with the model itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class MomentumAverage(nn.Module):
    """Exponential moving average of some parameters of a model, with decays by their names.

    The averages are buffers, so that LAVIS's savers, which drop frozen parameters, keep them. A
    buffer has its parameter's name with slashes for dots.
    """

    def __init__(self, model: nn.Module, decays: Mapping[str, float]):
        super().__init__()
        self._owners: list[tuple[nn.Module, str]] = []
        self._decays = list(decays.values())
        for name in decays:
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            self.register_buffer(name.replace(".", "/"), getattr(owner, leaf).detach().clone())
            self._owners.append((owner, leaf))

    def _current(self) -> list[Tensor]:
        return [owner._parameters[leaf] for owner, leaf in self._owners]

    @torch.no_grad()
    def update(self) -> None:
        """``average = decay * average + (1 - decay) * parameter``, once a step."""
        pairs = list(zip(self.buffers(), self._current(), self._decays, strict=True))
        for decay in set(self._decays):
            averages, current, _ = zip(*(p for p in pairs if p[2] == decay), strict=True)
            torch._foreach_lerp_(averages, current, 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the averages inside; no gradient flows there."""
        current = self._current()
        with torch.no_grad():
            try:
                self._put(list(self.buffers()))
                yield
            finally:
                self._put(current)

    def _put(self, tensors: list[Tensor]) -> None:
        for (owner, leaf), tensor in zip(self._owners, tensors, strict=True):
            owner._parameters[leaf] = tensor
