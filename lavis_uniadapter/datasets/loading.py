"""Batches of items, read by worker processes."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler
from torch.utils.data.dataloader import default_collate

from lavis_uniadapter.common import signals
from lavis_uniadapter.common.distributed import gather
from lavis_uniadapter.common.errors import ConfigError, name_some
from lavis_uniadapter.datasets.reading import TrainingItems, Unreadable, file_of
from lavis_uniadapter.datasets.records import DatasetError

POLL = 1.0  # seconds between two looks at the workers while a batch is awaited
PINNING = "in pin memory thread"  # in PyTorch's messages


@dataclass(frozen=True)
class Batch:
    """What a loader yields.

    Attributes:
        samples: collated items, as LAVIS's models take them.
        indices: of the items in their dataset, in the order of the batch.
        unreadable: items that could not be read. In training others are in their place; in
            evaluation they show another item's picture or clip, and count as wrong.
    """

    samples: dict[str, Any]
    indices: Sequence[int]
    unreadable: Sequence[Unreadable] = ()


class TrainingShard(DistributedSampler):
    """A rank's items of an epoch in random order, from the start or from further on.

    The order depends on the seed and the epoch alone.
    """

    def __init__(self, dataset: Sized, rank: int, world: int, seed: int):
        super().__init__(dataset, world, rank, shuffle=True, seed=seed, drop_last=True)
        self.first = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Make the next iteration one over an epoch's order, without the rank's first items."""
        self.set_epoch(epoch)
        self.first = first

    def check_batch(self, batch_size: int) -> None:
        """ConfigError if the rank has fewer items than a batch."""
        if len(self) < batch_size:
            raise ConfigError(
                f"The training split gives each process {len(self)} items, fewer than "
                f"run.batch_size_train {batch_size}. Make the batch smaller."
            )

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), self.first, None)


class BatchLoader:
    """Yields a `Batch` at a time.

    Args:
        timeout: seconds that the workers may take for a batch; 0: any.
        poll: called every second while a batch is awaited, and when it is there; it may raise.
        options: of ``torch.utils.data.DataLoader``: ``batch_size``, ``drop_last``, ``pin_memory``.
    """

    def __init__(
        self,
        items: TrainingItems,
        sampler: TrainingShard | range,
        *,
        num_workers: int = 0,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        timeout: float = 0,
        poll: Callable[[], object] = lambda: None,
        **options: Any,
    ):
        self.dataset = items.dataset
        self._items = items
        self._timeout = timeout or float("inf")
        self._poll = poll
        self._loader = DataLoader(
            items,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=partial(_collate, collate_fn or default_collate),
            # its own, so that the run's random numbers do not depend on how often data are read
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=signals.leave_to_main_process,
            timeout=min(POLL, self._timeout) if num_workers else 0,
            **options,
        )
        self.batch_size = self._loader.batch_size

    def __len__(self) -> int:
        return len(self._loader)

    def start(self, epoch: int, first_step: int = 0) -> None:
        """Make the next pass one over a training epoch, from a step on."""
        self._items.epoch = epoch
        self._loader.sampler.start(epoch, first_step * self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Batches.

        Raises:
            DatasetError: naming what cannot be read, or what a worker read when it hung or died.
        """
        batches = from_workers(self._loader, self._timeout, self._poll)
        for number in itertools.count():
            try:
                read = next(batches)
            except StopIteration:
                return
            except DatasetError as error:
                # PyTorch puts the traceback of a worker before the message
                raise DatasetError(str(error).rpartition("DatasetError: ")[2].strip()) from None
            except (RuntimeError, OSError, EOFError) as error:
                # "Caught" by a worker: an error in the code that reads
                by_worker = str(error).startswith("Caught") and PINNING not in str(error)
                if by_worker or not self._loader.num_workers:
                    raise
                raise DatasetError(self._describe(error, number)) from error
            yield Batch(*read)

    def _describe(self, error: Exception, number: int) -> str:
        """The failure of a batch, by its number in this pass."""
        if PINNING in str(error):
            indices = next(itertools.islice(self._loader.batch_sampler, number, None))
            files = name_some(f"'{file_of(self.dataset, index)}'" for index in indices)
            said = re.findall(r"^[\w.]+: .*", str(error), re.MULTILINE) or [str(error)]
            return f"A batch could not be pinned in memory ({said[-1]}). Its items: {files}."
        reading = ", ".join(
            f"'{file_of(self.dataset, index)}' (for {seconds:.0f} s)"
            for index, seconds in self._items.in_progress()
        )
        if "timed out" in str(error):
            what = f"A data worker returned no batch for {self._timeout:g} s (run.data_timeout)"
        else:
            said = (str(error).strip() or type(error).__name__).splitlines()[-1]
            what = f"A data worker died ({said})"
        return (
            f"{what}. Files being read: {reading or 'none'}. Check such a file with uniadapter "
            "prepare check; if it fails again, remove it from the annotations."
        )


def from_workers(
    loader: DataLoader, timeout: float, poll: Callable[[], object] = lambda: None
) -> Iterator[Any]:
    """What a loader's workers read; a death is raised here, while this process waits for them.

    PyTorch looks for dead workers each time that the loader's own ``timeout`` ends, so that must be
    short (`POLL`). Its handler of SIGCHLD would raise a death wherever this process is, in an
    optimizer step too, so it is removed.

    Args:
        loader: its workers call `signals.leave_to_main_process` first.
        timeout: seconds without anything read, after which RuntimeError is raised.
        poll: called every `POLL` seconds while something is awaited, and when it is there.
    """
    with signals.held_back():
        batches = iter(loader)
    until = time.monotonic() + timeout
    while True:
        try:
            read = next(batches)
        except StopIteration:
            return
        except RuntimeError as error:
            timed_out = str(error).startswith("DataLoader timed out")
            if not timed_out or time.monotonic() >= until:
                raise
            poll()
            continue
        poll()
        yield read
        until = time.monotonic() + timeout


def _collate(collate: Callable, read: tuple[list[Any], list[int], list[Unreadable]]) -> tuple:
    items, indices, unreadable = read
    return collate(items), indices, unreadable


def samples_of(
    batches: Iterable[Batch | dict[str, Any]], unreadable: dict[int, Unreadable]
) -> Iterator[dict[str, Any]]:
    """The samples of batches; adds what could not be read to ``unreadable``, by index."""
    for batch in batches:  # or samples, which are what LAVIS's own loaders yield
        if isinstance(batch, Batch):
            unreadable.update({fault.index: fault for fault in batch.unreadable})
            batch = batch.samples
        yield batch


def gather_unreadable(unreadable: dict[int, Unreadable]) -> dict[int, Unreadable]:
    """What no rank could read, by index, on every rank; every rank must call it."""
    return {i: fault for share in gather(unreadable) for i, fault in share.items()}


class SamplesView:
    """A loader as LAVIS's tasks and models use it: an iterable of samples."""

    def __init__(self, loader: BatchLoader):
        self.dataset = loader.dataset
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return samples_of(self._loader, {})
