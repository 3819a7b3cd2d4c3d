"""What went wrong in a run without ending it: unreadable files and steps that were not taken."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import get_rank
from torch.utils.data import Dataset

from lavis_uniadapter.datasets.reading import BatchReport, Unreadable, file_of, record_of

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable.jsonl"
SKIPPED_STEPS = "skipped_steps.jsonl"
# Faults of a kind that are told one by one; the rest is in the files.
MOST_TOLD = 20


class FaultLog:
    """Notes faults in a run's folder, a JSON line each, and tells of the first of them.

    Every rank has files of its own: ``unreadable.jsonl``, ``unreadable.rank1.jsonl``, ...
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._told = 0

    def unreadable(self, faults: Iterable[Unreadable], epoch: int, step: int) -> None:
        """Training items that gave their places to others."""
        for fault in faults:
            line = {"epoch": epoch, "step": step, "index": fault.index}
            self._note(UNREADABLE, {**line, "file": fault.file, "reason": fault.reason})
            self._tell(
                f"'{fault.file}' cannot be read and is replaced in its batch: {fault.reason}"
            )

    def skipped_step(
        self,
        epoch: int,
        step: int,
        losses: Mapping[str, float],
        reports: Iterable[BatchReport],
        dataset: Dataset,
    ) -> Path:
        """A step that was not taken, and the items it was about; returns the file."""
        indices = [index for report in reports for index in report.indices]
        items = [describe_item(dataset, index) for index in indices]
        line = {"epoch": epoch, "step": step, "losses": {k: str(v) for k, v in losses.items()}}
        self._tell(
            f"step {step} of epoch {epoch + 1}: loss or gradient not finite, the step is skipped"
        )
        return self._note(SKIPPED_STEPS, {**line, "items": items})

    def _note(self, name: str, line: Mapping[str, Any]) -> Path:
        if get_rank():
            name = name.replace(".jsonl", f".rank{get_rank()}.jsonl")
        with open(self._folder / name, "a") as file:
            file.write(json.dumps(line) + "\n")
        return self._folder / name

    def _tell(self, message: str) -> None:
        self._told += 1
        if self._told <= MOST_TOLD:
            logger.warning("%s", message)
        elif self._told == MOST_TOLD + 1:
            logger.warning("more faults are noted in %s alone", self._folder)


def describe_item(dataset: Dataset, index: int) -> dict[str, Any]:
    """An item by its index, file and what else identifies its record."""
    _, record = record_of(dataset, index)
    kept = {k: v for k, v in record.items() if k in ("caption", "question_id", "image_id")}
    return {"index": index, "file": file_of(dataset, index), **kept}
