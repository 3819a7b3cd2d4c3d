"""Numbers of the device that the host needs, read without holding the device up."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCopy:
    """A copy of a tensor that the device sends to the host when it gets there.

    ``tensor.item()`` waits until the device has done everything that it was given, and the device
    then waits for the host. Here the host waits for this one tensor, and only when it asks for it;
    what it has given to the device since goes on meanwhile.
    """

    def __init__(self, tensor: Tensor):
        self._copy = tensor.detach().to("cpu", non_blocking=True)
        self._arrived = None
        if tensor.is_cuda:
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[float]:
        """The numbers of the tensor, as ``Tensor.tolist`` gives them."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._copy.tolist()
