"""What goes wrong in a run without ending it: unreadable files and skipped steps."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import get_rank

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

    def add(self, name: str, message: str, **line: Any) -> Path:
        """Add a line to a file; returns its path."""
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
