"""Items of a dataset, whatever is wrong with some of their files.

A file that was whole when a run started may be gone or damaged an hour later. In training such an
item is replaced by another; in evaluation it is an error, or it is scored as wrong. What is random
about an item (frames, crops) depends on the seed, the epoch and the item alone, and so neither on
the number of workers nor on where the run began.
"""

from __future__ import annotations

import contextlib
import os
import random
import struct
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from decord import DECORDError
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, get_worker_info

from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.processors.decoding import images_read_whole

# What reading a damaged, missing or foreign file raises (SyntaxError: Pillow, of a PNG).
_OF_PYTHON = (OSError, RuntimeError, ValueError, SyntaxError, EOFError, AssertionError)
_OF_LIBRARIES = (struct.error, zlib.error, DECORDError, Image.DecompressionBombError)
READ_ERRORS = _OF_PYTHON + _OF_LIBRARIES
RETRY_AFTER = 0.5  # seconds; a file on a network may be back a moment later
MAX_REPLACEMENTS = 16  # other items tried in place of an unreadable one


@dataclass(frozen=True)
class Unreadable:
    """An item that could not be read: its index, its visual file and the error."""

    index: int
    file: str
    reason: str


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Inside, random numbers of Python, NumPy and torch (CPU) depend on ``entropy`` alone."""
    first, second, third = np.random.SeedSequence(entropy).generate_state(3, np.uint64).tolist()
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(first)
    np.random.seed(second % 2**32)
    torch.default_generator.manual_seed(third % 2**63)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class ReadingMonitor:
    """What each data worker is reading, in memory that outlives the worker."""

    def __init__(self, workers: int):
        # (workers, 2): the index of an item, or -1, and since when
        self._state = torch.full((max(workers, 1), 2), -1.0, dtype=torch.float64).share_memory_()

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        worker = get_worker_info()
        state = self._state[worker.id if worker else 0]
        state[1] = time.monotonic()
        state[0] = index
        try:
            yield
        finally:
            state[0] = -1

    def in_progress(self) -> list[tuple[int, float]]:
        """(index, seconds) of the items that are being read, the longest first."""
        now = time.monotonic()
        items = [(int(index), now - since) for index, since in self._state.tolist() if index >= 0]
        return sorted(items, key=lambda item: -item[1])


class TrainingItems(Dataset):
    """A dataset read a batch at a time; an unreadable item is replaced by one drawn at random.

    Args:
        dataset: one of LAVIS's, or several of them concatenated.
        monitor: notes what is being read.
        seed: of what is random about items.
    """

    def __init__(self, dataset: Dataset, monitor: ReadingMonitor, seed: int = 0):
        self.dataset = dataset
        self.monitor = monitor
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Any], list[int], list[Unreadable]]:
        """Items, their indices, and what was unreadable.

        (``torch.utils.data`` calls this, where it exists, in place of ``__getitem__``.)

        Raises:
            DatasetError: for an unreadable item without replacement.
        """
        items, read, unreadable = [], [], []
        for index in indices:
            item, fault = self.try_to_read(index)
            if fault is not None:
                unreadable.append(fault)
                index, item = self.replace(fault)
            items.append(item)
            read.append(index)
        return items, read, unreadable

    def try_to_read(self, *what: int) -> tuple[Any, Unreadable | None]:
        """An item, by the arguments of ``read``, or why it could not be read in two attempts."""
        for again in (True, False):
            try:
                with self.monitor.reading(what[0]), images_read_whole():
                    return self.read(*what), None
            except READ_ERRORS as error:
                reason = f"{type(error).__name__}: {error}"
            if again:
                time.sleep(RETRY_AFTER)
        return None, Unreadable(what[0], file_of(self.dataset, what[0]), reason)

    def read(self, index: int) -> Any:
        with seeded(self.seed, self.epoch, index):
            return self.dataset[index]

    def replace(self, fault: Unreadable) -> tuple[int, Any]:
        """An index and an item to use in place of an unreadable one."""
        draw = random.Random(f"{self.seed} {self.epoch} {fault.index}")
        for _ in range(MAX_REPLACEMENTS):
            index = draw.randrange(len(self))
            item, failure = self.try_to_read(index)
            if failure is None:
                return index, item
        raise DatasetError(
            f"An item of a batch cannot be read, and none of {MAX_REPLACEMENTS} others: is "
            f"{os.path.dirname(fault.file)} still there? '{fault.file}': {fault.reason}"
        )


class EvaluationItems(TrainingItems):
    """Items that are the same at every reading.

    Args:
        dataset, monitor: as of `TrainingItems`.
        allow_missing: an unreadable item shows the picture or clip of another, to be scored as
            wrong; otherwise it is an error.
    """

    def __init__(self, dataset: Dataset, monitor: ReadingMonitor, allow_missing: bool = False):
        super().__init__(dataset, monitor)
        self.allow_missing = allow_missing

    def read(self, index: int, shown: int | None = None) -> Any:
        if shown is None:
            return super().read(index)
        annotation = self.dataset.annotation
        record = annotation[index]
        key = "video" if "video" in record else "image"
        annotation[index] = {**record, key: annotation[shown][key]}
        try:
            return super().read(index)
        finally:
            annotation[index] = record

    def replace(self, fault: Unreadable) -> tuple[int, Any]:
        tried = {fault.file}
        for step in range(1, len(self)) if self.allow_missing else ():
            shown = (fault.index + step) % len(self)
            if (file := file_of(self.dataset, shown)) in tried:
                continue  # many questions may be about one clip
            item, failure = self.try_to_read(fault.index, shown)
            if failure is None:
                return fault.index, item
            tried.add(file)
            if len(tried) > MAX_REPLACEMENTS:
                break
        raise DatasetError(
            f"'{fault.file}' cannot be read ({fault.reason}). Replace the file; or set "
            "allow_missing: True of the dataset, and its items are scored as wrong and counted, as "
            "long as others can be read."
        )


def record_of(dataset: Dataset, index: int) -> tuple[Dataset, dict[str, Any]]:
    """The dataset, of several concatenated ones, that an index belongs to, and its record."""
    if isinstance(dataset, ConcatDataset):
        part = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
        before = dataset.cumulative_sizes[part - 1] if part else 0
        return record_of(dataset.datasets[part], index - before)
    annotation = getattr(dataset, "annotation", None)
    return dataset, {} if annotation is None else annotation[index]


def file_of(dataset: Dataset, index: int) -> str:
    """The visual file of an item."""
    part, record = record_of(dataset, index)
    name = record.get("video", record.get("image"))
    return f"item {index}" if name is None else os.path.join(getattr(part, "vis_root", ""), name)
