"""Checkpoint files of a run folder: written atomically, checked when read, the last two kept.

The newest state is ``checkpoint_latest.pth``, the one before ``checkpoint_previous.pth``; whenever
the run is killed, at least one of them is whole.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lavis_uniadapter.checkpoints import pickled
from lavis_uniadapter.common.atomic import atomic, flush
from lavis_uniadapter.common.errors import CheckpointError

logger = logging.getLogger(__name__)

BEST = "checkpoint_best.pth"
LATEST = "checkpoint_latest.pth"
PREVIOUS = "checkpoint_previous.pth"


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; a latest one becomes the previous one."""
    with atomic(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # PyTorch's, raised while it handles the error of the disk
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        flush(temporary)
        if path.name == LATEST and path.is_file():
            os.replace(path, path.with_name(PREVIOUS))


def read(path: str | os.PathLike) -> dict[str, Any]:
    """Read a checkpoint of this runner or of LAVIS's; CheckpointError if it is damaged."""
    if not Path(path).is_file():
        raise CheckpointError(f"No checkpoint at '{path}' (run.resume_ckpt_path).")
    content = pickled.load(path, "Name another (run.resume_ckpt_path).")
    if not isinstance(content, dict) or not {"model", "optimizer", "epoch"} <= set(content):
        raise CheckpointError(f"'{path}' is not a whole checkpoint of a runner.")
    return content


def states(folder: Path) -> list[Path]:
    """The files that a run can continue from, the newest first."""
    ours = [folder / name for name in (LATEST, PREVIOUS) if (folder / name).is_file()]
    # LAVIS's runners save the best epoch or, without validation, every epoch.
    return ours or sorted(folder.glob("checkpoint_*.pth"), key=lambda p: -p.stat().st_mtime)


def newest_whole(folder: Path) -> Path | None:
    """The newest undamaged state of a run; None if the run saved none.

    A damaged file is renamed to ``<name>.torn``, so that the next save does not replace the good
    one before it.

    Raises:
        CheckpointError: if there are checkpoints, and all are damaged.
    """
    torn = []
    for path in states(folder):
        try:
            read(path)
        except CheckpointError as error:
            logger.warning("%s The one before is used.", error)
            torn.append(path)
            continue
        for other in torn:
            os.replace(other, other.with_name(f"{other.name}.torn"))
        return path
    if torn:
        raise CheckpointError(
            f"No whole checkpoint is left in '{folder}' ({', '.join(p.name for p in torn)} are "
            "damaged). Delete the folder, or use another run.job_id."
        )
    return None


def clean(folder: Path) -> None:
    """Remove what a killed run was writing."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)
