"""What goes wrong in a run without ending it: unreadable files and skipped steps."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import get_rank
from torch import Tensor
from torch.utils.data import Dataset

from lavis_uniadapter.datasets.reading import Unreadable, file_of, record_of

logger = logging.getLogger(__name__)

UNREADABLE = "unreadable.jsonl"
SKIPPED_STEPS = "skipped_steps.jsonl"
MAX_WARNINGS = 20  # of a run; further faults are in the files alone


class FaultLog:
    """Writes faults to a run's folder, one JSON line each, and warns of the first ones.

    Every rank has files of its own: ``unreadable.jsonl``, ``unreadable.rank1.jsonl``, ...
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._warnings = 0

    def unreadable(self, faults: Iterable[Unreadable], epoch: int, step: int) -> None:
        """Log training items that were replaced by others."""
        for fault in faults:
            self._log(
                UNREADABLE,
                {"epoch": epoch, "step": step, **asdict(fault)},
                f"'{fault.file}' cannot be read and is replaced in its batch: {fault.reason}",
            )

    def skipped_step(
        self,
        dataset: Dataset,
        epoch: int,
        step: int,
        losses: Mapping[str, Tensor],
        indices: Iterable[int],
    ) -> Path:
        """Log a skipped step and the items of its batches; returns the file."""
        items = []
        for index in indices:
            _, record = record_of(dataset, index)
            identity = {k: record[k] for k in ("caption", "question_id", "image_id") if k in record}
            items.append({"index": index, "file": file_of(dataset, index), **identity})
        numbers = {name: str(float(value)) for name, value in losses.items()}
        return self._log(
            SKIPPED_STEPS,
            {"epoch": epoch, "step": step, "losses": numbers, "items": items},
            f"step {step} of epoch {epoch + 1}: loss or gradient not finite, the step is skipped",
        )

    def _log(self, name: str, line: Mapping[str, Any], message: str) -> Path:
        rank = f".rank{get_rank()}" if get_rank() else ""
        path = self._folder / name.replace(".jsonl", f"{rank}.jsonl")
        with open(path, "a") as file:
            file.write(json.dumps(line) + "\n")
        self._warnings += 1
        if self._warnings <= MAX_WARNINGS:
            logger.warning("%s", message)
        elif self._warnings == MAX_WARNINGS + 1:
            logger.warning("further faults are logged only in %s", self._folder)
        return path
