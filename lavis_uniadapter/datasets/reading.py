"""Items of a dataset, whatever is wrong with some of their files.

In training an unreadable item is replaced by another; in evaluation it is an error, or it is scored
as wrong. What is random about an item (frames, crops) depends on the seed, the epoch and the item
alone, not on the number of workers or on where the run began.
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
from lavis_uniadapter.processors.decoding import visual_problem
from lavis_uniadapter.processors.extracted_frames import clip_file
from lavis_uniadapter.processors.images import images_read_whole
from lavis_uniadapter.processors.media_files import is_machine_fault

# What reading a damaged, missing or foreign file raises (SyntaxError: Pillow, of a PNG).
READ_ERRORS = (
    *(OSError, RuntimeError, ValueError, SyntaxError, EOFError, AssertionError),
    *(struct.error, zlib.error, DECORDError, Image.DecompressionBombError),
)
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


class TrainingItems(Dataset):
    """A dataset read a batch at a time; an unreadable item is replaced by one drawn at random.

    Args:
        workers: number of processes that read.
        seed: of what is random about items.
    """

    allow_missing = False

    def __init__(self, dataset: Dataset, workers: int, seed: int = 0):
        self.dataset = dataset
        self.seed = seed
        self.epoch = 0
        # What each worker is reading, in memory that outlives the worker: the index of an item, or
        # -1, and since when.
        self._reading = torch.full((max(workers, 1), 2), -1.0, dtype=torch.float64).share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> tuple[list[Any], list[int], list[Unreadable]]:
        """Items, their indices, and what was unreadable; PyTorch calls it for a batch."""
        items, read, unreadable = [], [], []
        for index in indices:
            item, fault = self.try_to_read(index)
            if fault is not None:
                unreadable.append(fault)
                index, item = self.replace(fault)
            items.append(item)
            read.append(index)
        return items, read, unreadable

    def try_to_read(self, index: int) -> tuple[Any, Unreadable | None]:
        """An item, or why it could not be read in two attempts.

        Raises:
            DatasetError: for a fault of the machine, which another item would only hide.
        """
        worker = get_worker_info()
        reading = self._reading[worker.id if worker else 0]
        for wait in (RETRY_AFTER, 0):
            reading[1] = time.monotonic()
            reading[0] = index
            try:
                if problem := file_problem_of(self.dataset, index):
                    raise ValueError(problem)
                with images_read_whole():
                    return self.read(index), None
            except (MemoryError, *READ_ERRORS) as error:
                reason = f"{type(error).__name__}: {error}".removesuffix(": ")
                allowed = self.allow_missing and isinstance(error, PermissionError)
                if is_machine_fault(error) and not allowed:
                    raise DatasetError(
                        f"'{file_of(self.dataset, index)}' cannot be read ({reason}). Its content "
                        "may be sound: correct its permissions, or free memory and open files."
                    ) from error
            finally:
                reading[0] = -1
            time.sleep(wait)
        return None, Unreadable(index, file_of(self.dataset, index), reason)

    def read(self, index: int) -> Any:
        with seeded(self.seed, self.epoch, index):
            return self.dataset[index]

    def in_progress(self) -> list[tuple[int, float]]:
        """(index, seconds) of the items that are being read, the longest first."""
        now = time.monotonic()
        items = [(int(index), now - since) for index, since in self._reading.tolist() if index >= 0]
        return sorted(items, key=lambda item: -item[1])

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

    An unreadable one is an error or, with ``allow_missing``, shows the picture or clip of another,
    to be scored as wrong.
    """

    def __init__(self, dataset: Dataset, workers: int, allow_missing: bool = False):
        super().__init__(dataset, workers)
        self.allow_missing = allow_missing

    def replace(self, fault: Unreadable) -> tuple[int, Any]:
        item = self._read_with_another_visual(fault.index) if self.allow_missing else None
        if item is not None:
            return fault.index, item
        raise DatasetError(
            f"'{fault.file}' cannot be read ({fault.reason}). Replace the file; or set "
            "allow_missing: True of the dataset, and its items are scored as wrong and counted, as "
            "long as others can be read."
        )

    def _read_with_another_visual(self, index: int) -> Any:
        annotation = getattr(self.dataset, "annotation", None)
        record = annotation[index] if annotation else {}
        key = "video" if "video" in record else "image"
        if key not in record:
            return None
        # many questions may be about one clip
        names = dict.fromkeys(other[key] for other in [*annotation[index:], *annotation[:index]])
        try:
            for name in list(names)[1 : MAX_REPLACEMENTS + 1]:
                annotation[index] = {**record, key: name}
                item, failure = self.try_to_read(index)
                if failure is None:
                    return item
        finally:
            annotation[index] = record
        return None


def file_of(dataset: Dataset, index: int) -> str:
    """The visual file of an item."""
    return describe_item(dataset, index)["file"]


def describe_item(dataset: Dataset, index: int) -> dict[str, Any]:
    """The index and the visual file of an item, and what else identifies its record."""
    part, about = _record_of(dataset, index)
    name = about.get("video", about.get("image"))
    file = f"item {index}" if name is None else os.path.join(getattr(part, "vis_root", ""), name)
    identity = {k: about[k] for k in ("caption", "question_id", "image_id") if k in about}
    return {"index": index, "file": file, **identity}


def file_problem_of(dataset: Dataset, index: int) -> str | None:
    """Say why the visual file of an item must not be opened, or None; LAVIS opens anything."""
    part, about = _record_of(dataset, index)
    name = about.get("video", about.get("image"))
    if name is None or not hasattr(part, "vis_root"):
        return None
    path, is_video = os.path.join(part.vis_root, name), "video" in about
    if not os.path.lexists(clip_file(path) if is_video else path):
        return None  # some of LAVIS's records name part of a file's name
    return visual_problem(path, is_video)


def _record_of(dataset: Dataset, index: int) -> tuple[Dataset, dict[str, Any]]:
    """The dataset that an item of joined datasets comes from, and the item's record."""
    while isinstance(dataset, ConcatDataset):
        number = int(np.searchsorted(dataset.cumulative_sizes, index, side="right"))
        index -= dataset.cumulative_sizes[number - 1] if number else 0
        dataset = dataset.datasets[number]
    return dataset, dataset.annotation[index] if hasattr(dataset, "annotation") else {}
