"""Momentum encoders without a second backbone.

BLIP's contrastive targets come from a moving average of the model. Only what is trained moves, so
only that is averaged; everything else is shared with the model itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class MomentumAverage(nn.Module):
    """Exponential moving average of chosen parameters of a model.

    The averages are buffers, so that LAVIS's savers, which drop frozen parameters, keep them. A
    buffer has its parameter's name with slashes for dots.

    Args:
        model: owner of the parameters.
        groups: (parameter names, decay) pairs.
    """

    def __init__(self, model: nn.Module, groups: Iterable[tuple[Iterable[str], float]]):
        super().__init__()
        self._owners: list[tuple[nn.Module, str]] = []
        self._decays: list[tuple[slice, float]] = []
        for names, decay in groups:
            start = len(self._owners)
            for name in names:
                path, _, leaf = name.rpartition(".")
                owner = model.get_submodule(path)
                self.register_buffer(name.replace(".", "/"), getattr(owner, leaf).detach().clone())
                self._owners.append((owner, leaf))
            self._decays.append((slice(start, len(self._owners)), decay))

    def averages(self) -> list[Tensor]:
        return list(self.buffers())

    def current(self) -> list[Tensor]:
        return [owner._parameters[leaf] for owner, leaf in self._owners]

    @torch.no_grad()
    def reset(self) -> None:
        """Start again from the model's present parameters."""
        for average, parameter in zip(self.averages(), self.current(), strict=True):
            average.copy_(parameter)

    @torch.no_grad()
    def update(self) -> None:
        """``average = decay * average + (1 - decay) * parameter``, once a step."""
        averages, current = self.averages(), self.current()
        for group, decay in self._decays:
            if averages[group]:
                torch._foreach_lerp_(averages[group], current[group], 1 - decay)

    @contextlib.contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model computes with the averages inside; no gradient flows there."""
        current = self.current()
        with torch.no_grad():
            try:
                self._put(self.averages())
                yield
            finally:
                self._put(current)

    def _put(self, tensors: list[Tensor]) -> None:
        for (owner, leaf), tensor in zip(self._owners, tensors, strict=True):
            owner._parameters[leaf] = tensor
