"""Read numbers of the device on the host without stalling the device."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """An asynchronous copy of a tensor to the host.

    ``tensor.item()`` waits for all work that is queued on the device. This waits for one tensor
    alone, and only when its numbers are read.
    """

    def __init__(self, tensor: Tensor):
        self._copy = tensor.detach().to("cpu", non_blocking=True)
        self._arrived = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        """The numbers, as ``Tensor.tolist`` gives them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
