"""Which training items a rank reads, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized

from torch.utils.data import DistributedSampler


class TrainingShard(DistributedSampler):
    """A rank's items of an epoch in random order, from the start or from further on.

    The order depends on the seed and the epoch alone. Items that do not fill all ranks alike are
    left out of the epoch, as in LAVIS.
    """

    def __init__(self, dataset: Sized, rank: int, world: int, seed: int):
        super().__init__(dataset, world, rank, shuffle=True, seed=seed, drop_last=True)
        self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Make the next iteration one over an epoch's order, without the rank's first items."""
        self.set_epoch(epoch)
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.first, None)
