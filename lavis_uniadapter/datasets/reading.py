"""Items of a dataset in batches, whatever is wrong with some of their files.

A file that was whole when the run started may be gone or damaged an hour later. In training such
an item gives its place to another; in evaluation it is an error, or it is scored as wrong. Each is
named. What is random about an item (frames, crops) depends on the seed, the epoch and the item
alone, so that it does not matter how many workers there are, nor where a run began.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import re
import signal
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from decord import DECORDError
from lavis.common.dist_utils import get_world_size
from PIL import Image, ImageFile
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import default_collate

from lavis_uniadapter.common.errors import name_some
from lavis_uniadapter.datasets.layouts import layout_of
from lavis_uniadapter.datasets.preflight import DatasetError
from lavis_uniadapter.processors.extracted_frames import (
    EXTRACTED_SUFFIX,
    write_extracted_frames,
)

# What reading a damaged, vanished or foreign file raises (SyntaxError: Pillow, of a PNG).
READ_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    SyntaxError,
    EOFError,
    AssertionError,
    struct.error,
    zlib.error,
    DECORDError,
    Image.DecompressionBombError,
)
# A file on a network may be there again a moment later.
RETRY_AFTER = 0.5
# Other items that are tried in place of an unreadable one.
MOST_REPLACEMENTS = 16


@dataclass(frozen=True)
class Unreadable:
    """An item that could not be read.

    Attributes:
        index: in its dataset.
        file: its visual file.
        reason: what reading it said.
    """

    index: int
    file: str
    reason: str


@dataclass
class BatchReport:
    """Which items a batch was made from, and which of them could not be read.

    Attributes:
        indices: of the items, in their order.
        unreadable: of those that were asked for.
        failure: why there is no batch; None if there is one.
    """

    indices: list[int]
    unreadable: list[Unreadable] = field(default_factory=list)
    failure: str | None = None


@contextlib.contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Random numbers of Python, NumPy and torch (CPU) inside depend on ``entropy`` alone."""
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


@contextlib.contextmanager
def images_read_whole() -> Iterator[None]:
    """Inside, a truncated image is an error. (LAVIS lets Pillow fill it up with grey.)"""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class ReadingMonitor:
    """What each worker process is reading, known to the main process however a worker ends.

    Args:
        workers: their number; 0: items are read in the main process.
    """

    def __init__(self, workers: int):
        self._index = torch.full((max(workers, 1),), -1, dtype=torch.long).share_memory_()
        self._since = torch.zeros(max(workers, 1), dtype=torch.float64).share_memory_()

    @contextlib.contextmanager
    def reading(self, index: int) -> Iterator[None]:
        worker = get_worker_info().id if get_worker_info() else 0
        self._since[worker] = time.monotonic()
        self._index[worker] = index
        yield
        self._index[worker] = -1  # not after an error: the reader notes that one

    def done(self) -> None:
        """Nothing is being read by this worker."""
        self._index[get_worker_info().id if get_worker_info() else 0] = -1

    def in_progress(self) -> list[tuple[int, float]]:
        """(index, seconds) of the items that are being read, the longest first."""
        now = time.monotonic()
        items = zip(self._index.tolist(), self._since.tolist(), strict=True)
        return sorted(((i, now - t) for i, t in items if i >= 0), key=lambda item: -item[1])


class _Items(Dataset):
    """A dataset whose items are read batch by batch; its other attributes are the dataset's."""

    def __init__(self, dataset: Dataset, monitor: ReadingMonitor):
        self.dataset = dataset
        self.monitor = monitor

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not there yet, while being unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def _try(self, index: int, read: Callable[[int], Any]) -> tuple[Any, Unreadable | None]:
        """An item, or why it cannot be read at a second attempt either."""
        for attempt in range(2):
            try:
                with self.monitor.reading(index), images_read_whole():
                    return read(index), None
            except READ_ERRORS as error:
                self.monitor.done()
                if attempt:
                    reason = f"{type(error).__name__}: {error}"
                    return None, Unreadable(index, file_of(self.dataset, index), reason)
                time.sleep(RETRY_AFTER)
        raise AssertionError("unreachable")


class TrainingItems(_Items):
    """Training items; an unreadable one gives its place to another of its batch.

    Args:
        dataset: one of LAVIS's, or several of them concatenated.
        seed: of what is random about items.
        monitor: told what is being read.
    """

    def __init__(self, dataset: Dataset, seed: int, monitor: ReadingMonitor):
        super().__init__(dataset, monitor)
        self.seed = seed
        self.epoch = 0

    def __getitems__(self, indices: Sequence[int]) -> tuple[BatchReport, list[Any]]:
        """A batch (``torch.utils.data`` calls this where it is there)."""
        items, report = [], BatchReport(list(indices))
        for index in indices:
            item, fault = self._try(index, self._read)
            items.append(item)
            if fault is not None:
                report.unreadable.append(fault)
        for fault in report.unreadable:
            replacement = self._replacement(fault, report, items)
            if replacement is None:
                report.failure = (
                    f"No item of a batch can be read, and none of {MOST_REPLACEMENTS} others: is "
                    f"{os.path.dirname(fault.file)} still there? '{fault.file}': {fault.reason}"
                )
                return report, []
            place = report.indices.index(fault.index)
            items[place], report.indices[place] = replacement
        return report, items

    def _read(self, index: int) -> Any:
        with seeded(self.seed, self.epoch, index):
            return self.dataset[index]

    def _replacement(
        self, fault: Unreadable, report: BatchReport, items: list[Any]
    ) -> tuple[Any, int] | None:
        """Another item and its index: of the batch, or of the dataset if the batch has none."""
        draw = random.Random(f"{self.seed} {self.epoch} {fault.index}")
        bad = {other.index for other in report.unreadable}
        good = [i for i, index in enumerate(report.indices) if index not in bad]
        if good:
            place = draw.choice(good)
            return items[place], report.indices[place]
        for _ in range(MOST_REPLACEMENTS):
            index = draw.randrange(len(self.dataset))
            item, failure = self._try(index, self._read)
            if failure is None:
                return item, index
        return None


class EvaluationItems(_Items):
    """Evaluation items, read the same however often.

    Args:
        dataset: one of LAVIS's.
        stand_ins: folder for what is shown in place of an unreadable file; None: such a file is
            reported and the batch is empty.
        monitor: told what is being read.
    """

    def __init__(self, dataset: Dataset, stand_ins: Path | None, monitor: ReadingMonitor):
        super().__init__(dataset, monitor)
        self._blank = None if stand_ins is None else _write_stand_in(dataset, stand_ins)

    def __getitems__(self, indices: Sequence[int]) -> tuple[BatchReport, list[Any]]:
        """A batch (``torch.utils.data`` calls this where it is there)."""
        items, report = [], BatchReport(list(indices))
        for index in indices:
            item, fault = self._try(index, self._read)
            if fault is not None:
                report.unreadable.append(fault)
                if self._blank is None:
                    report.failure = (
                        f"'{fault.file}' cannot be read ({fault.reason}). Mend the file; or set "
                        "allow_missing: True of the dataset, and it is scored as wrong and counted."
                    )
                    return report, []
                item = self._read_stand_in(index)
            items.append(item)
        return report, items

    def _read(self, index: int) -> Any:
        with seeded(0, 0, index):
            return self.dataset[index]

    def _read_stand_in(self, index: int) -> Any:
        """The item as it is, but for what it shows."""
        annotation = self.dataset.annotation
        record = annotation[index]
        annotation[index] = {**record, layout_of(type(self.dataset)).visual_key: self._blank}
        try:
            return self._read(index)
        finally:
            annotation[index] = record


def _write_stand_in(dataset: Dataset, folder: Path) -> str:
    """A black picture, or a black clip of one frame; returns the name that is read."""
    folder.mkdir(parents=True, exist_ok=True)
    if layout_of(type(dataset)).visual_key == "image":
        path = folder / "blank.png"
        Image.new("RGB", (32, 32)).save(path)
    else:
        path = folder / "blank.mp4"
        frame = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
        write_extracted_frames(f"{path}{EXTRACTED_SUFFIX}", frame, source_frames=1)
    return str(path.absolute())


class ItemLoader(DataLoader):
    """Batches of `TrainingItems` or `EvaluationItems`.

    Attributes:
        report: of the batch that was handed out last.
        unreadable: what could not be read in this pass and has a stand-in, by index (evaluation).

    Args:
        items: what to read.
        timeout: seconds that a batch may take; 0: any. Needs workers.
        options: of ``torch.utils.data.DataLoader``.
    """

    def __init__(self, items: _Items, *, timeout: float = 0, collate_fn=None, **options):
        workers = options.get("num_workers", 0)
        super().__init__(
            items,
            timeout=timeout if workers else 0,
            collate_fn=_Collater(collate_fn or default_collate),
            # of its own, so that the run's random numbers do not depend on how often data are read
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_leave_interrupts_to_the_main_process,
            **options,
        )
        self.report = BatchReport([])
        self.unreadable: dict[int, Unreadable] = {}

    def start(self, epoch: int, first_step: int = 0) -> None:
        """The next pass is over a training epoch from a step on."""
        self.dataset.epoch = epoch
        self.sampler.start(epoch, first_step * self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Batches.

        Raises:
            DatasetError: if no item can be read, naming an evaluation item that cannot be read and
                has no stand-in, naming what a worker was reading when it hung or died, or naming
                the items of a batch that PyTorch could not pin in memory.
        """
        self.unreadable = {}
        batches = super().__iter__()
        deaths = _WorkerDeaths()
        for number in itertools.count():
            try:
                with deaths.raised():
                    self.report, samples = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                pinning = " in pin memory thread " in str(error)
                if not self.num_workers or not (pinning or _is_of_a_worker(error)):
                    raise
                # or else a later loader is told of the same death
                batches._shutdown_workers()
                what = self._describe_batch(number, error) if pinning else self._describe(error)
                raise DatasetError(what) from error
            if self.report.failure is not None:
                raise DatasetError(self.report.failure)
            if isinstance(self.dataset, EvaluationItems):
                self.unreadable.update({fault.index: fault for fault in self.report.unreadable})
            yield samples

    def _describe_batch(self, number: int, error: Exception) -> str:
        """A batch that could not be pinned; its report is lost with it."""
        indices = next(itertools.islice(self.batch_sampler, number, None))
        files = name_some(f"'{file_of(self.dataset.dataset, index)}'" for index in indices)
        said = re.findall(r"^[\w.]+: .*", str(error), re.MULTILINE) or [str(error)]
        return f"A batch could not be pinned in memory ({said[-1]}). Its items: {files}."

    def _describe(self, error: Exception) -> str:
        reading = self.dataset.monitor.in_progress()
        named = ", ".join(
            f"'{file_of(self.dataset.dataset, index)}' (for {seconds:.0f} s)"
            for index, seconds in reading
        )
        hung = "timed out" in str(error)
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        what = (
            f"A data worker gave nothing for {self.timeout:g} s (run.data_timeout)"
            if hung
            else f"A data worker died ({said})"
        )
        return (
            f"{what}. Being read: {named or 'nothing'}. Check such a file with python -m "
            "lavis_uniadapter.prepare check; if it does it again, take it out of the annotations."
        )


class _WorkerDeaths:
    """Where the death of a worker is an error: where its batches are awaited.

    PyTorch raises it from a signal handler, wherever the main process happens to be, which would
    leave an optimizer step half done. A signal to a whole process group ends the workers at once,
    and the main process after it has saved itself. Made after PyTorch has set its handler.
    """

    def __init__(self) -> None:
        self._awaited = False
        self._check = None
        if threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if isinstance(getattr(handler, "__self__", None), _WorkerDeaths):
            handler = handler.__self__._check  # of an earlier pass
        if callable(handler):
            self._check = handler
            signal.signal(signal.SIGCHLD, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        if self._awaited:
            self._check(number, frame)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Inside, a death is raised, one that came before included."""
        self._awaited = True
        try:
            if self._check is not None:
                self._check(signal.SIGCHLD, None)
            yield
        finally:
            self._awaited = False


def _is_of_a_worker(error: Exception) -> bool:
    # PyTorch raises plain RuntimeErrors of a worker's end, and the socket to it errors of its own;
    # "Caught ..." is an error that a worker raised itself
    if isinstance(error, RuntimeError):
        ends = ("DataLoader worker", "DataLoader timed out", "Pin memory thread")
        return str(error).startswith(ends)
    return not str(error).startswith("Caught")


class _Collater:
    """Collates the items of a batch, beside its report; None for an empty batch."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self._collate = collate

    def __call__(self, batch: tuple[BatchReport, list[Any]]) -> tuple[BatchReport, Any]:
        report, items = batch
        return report, self._collate(items) if items else None


def _leave_interrupts_to_the_main_process(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; what follows is the main process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def record_of(dataset: Dataset, index: int) -> tuple[Dataset, dict[str, Any]]:
    """The dataset that an index of one, or of several concatenated, leads to, and its record."""
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


def gather_unreadable(loader: DataLoader) -> dict[int, Unreadable]:
    """What no rank could read in its last pass over an evaluation loader, by index.

    Every rank must call it. LAVIS's own loaders know of none.
    """
    own = getattr(loader, "unreadable", {})
    if get_world_size() == 1:
        return dict(own)
    shares: list = [None] * get_world_size()
    dist.all_gather_object(shares, own)
    return {index: fault for share in shares for index, fault in share.items()}


def unreadable_mask(loader: DataLoader, device: torch.device) -> Tensor:
    """(items,) whether each item of an evaluation loader was unreadable; on every rank alike."""
    mask = torch.zeros(len(loader.dataset), dtype=torch.bool, device=device)
    mask[list(gather_unreadable(loader))] = True
    return mask
