"""Checkpoints of a run's folder: written whole, read whole, the last two kept.

The newest state is ``checkpoint_latest.pth``, the one before ``checkpoint_previous.pth``; at least
one of them is whole at any moment, whenever the run is killed. Nothing but tensors and plain
containers is unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lavis_uniadapter.common.errors import CheckpointError, name_some
from lavis_uniadapter.runners import run_folders

logger = logging.getLogger(__name__)

BEST = "checkpoint_best.pth"
LATEST = "checkpoint_latest.pth"
PREVIOUS = "checkpoint_previous.pth"
CONFIG = "config.json"
# Settings of a run that may change while it goes on: they decide where it computes, not what.
MAY_DIFFER = {
    "resume",
    "resume_ckpt_path",
    "job_id",
    "num_workers",
    "device",
    "log_freq",
    "cache_root",
    "checkpoint_freq",
    "data_timeout",
    "check_files",
    "unreadable_threshold",
    "max_skipped_steps",
    "feature_memory",
    "rerank_batch",
    "batch_size_eval",
    "compile",
}


def write(content: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint; under its name there is a whole file at any moment, old or new."""
    os.replace(_write_beside(content, path), path)
    _flush_folder(path.parent)


def write_latest(content: Mapping[str, Any], folder: Path) -> None:
    """Write the newest state of a run; the one before stays beside it."""
    temporary = _write_beside(content, folder / LATEST)
    if (folder / LATEST).is_file():
        os.replace(folder / LATEST, folder / PREVIOUS)
    os.replace(temporary, folder / LATEST)
    _flush_folder(folder)


def _write_beside(content: Mapping[str, Any], path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    return temporary


def read(path: str | os.PathLike, checked: bool = True) -> dict[str, Any]:
    """Read a checkpoint of a runner, of this package's or LAVIS's.

    Args:
        checked: compare every byte with the file's checksums first.

    Raises:
        CheckpointError: if there is none, or it is not whole.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"No checkpoint at '{path}' (run.resume_ckpt_path).")
    try:
        if checked and zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"'{damaged}' in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        content["model"], content["optimizer"], content["epoch"]
    except Exception as error:
        raise CheckpointError(f"'{path}' is not a whole checkpoint of a runner: {error}") from error
    return content


def states(folder: Path, of_lavis: bool = False) -> list[Path]:
    """The files of a run's folder that the run can go on from, the newest first.

    Args:
        of_lavis: the run is one of LAVIS's runners, which save the best epoch or, where nothing is
            validated, every epoch.
    """
    if of_lavis:
        return sorted(folder.glob("checkpoint_*.pth"), key=lambda p: -p.stat().st_mtime)
    return [folder / name for name in (LATEST, PREVIOUS) if (folder / name).is_file()]


def newest_whole(folder: Path, of_lavis: bool = False) -> Path | None:
    """The newest state of a run that is whole; None if the run saved none.

    A torn file is put aside as ``<name>.torn``, so that the next save does not take the place of
    the whole one beside it.

    Raises:
        CheckpointError: if there are checkpoints, and none of them is whole.
    """
    torn = []
    for path in states(folder, of_lavis):
        try:
            read(path)
        except CheckpointError as error:
            logger.warning("%s The one before is taken.", error)
            torn.append(path)
            continue
        for other in torn:
            os.replace(other, other.with_name(f"{other.name}.torn"))
        return path
    if torn:
        raise CheckpointError(
            f"No whole checkpoint is left in '{folder}' ({', '.join(p.name for p in torn)} are "
            "damaged). Delete the folder, or start anew under another run.job_id."
        )
    return None


def clean(folder: Path) -> None:
    """Remove what a killed run was in the middle of writing."""
    for path in folder.glob(".checkpoint_*.tmp"):
        path.unlink()
    for path in folder.glob(".adapter_*-*"):
        shutil.rmtree(path)


def find_unfinished_run(
    output_dir: Path, config: Mapping[str, Any], of_lavis: bool = False
) -> str | None:
    """Name of the newest run below a folder that stopped before its end and is the same run.

    Args:
        output_dir: of ``run.output_dir``.
        config: the run's configuration, as it is noted in its folder.
    """
    folders = [path.parent for path in output_dir.glob(f"*/{CONFIG}")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if run_folders.is_finished(folder) or not states(folder, of_lavis):
            continue
        if run_folders.is_in_use(folder):
            logger.info("'%s' is at work and is left alone.", folder)
            continue
        try:
            noted = json.loads((folder / CONFIG).read_text())
        except ValueError:  # killed while it was written
            continue
        if differences := list(_differences(noted, config)):
            logger.info(
                "'%s' is unfinished and not this run: it has another %s.",
                folder,
                name_some(differences, 3),
            )
            continue
        return folder.name
    return None


def _differences(noted: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Names of what would be computed otherwise."""
    for section in sorted({*noted, *config}):
        theirs, ours = noted.get(section) or {}, config.get(section) or {}
        for key in sorted({*theirs, *ours}):
            if section == "run" and key in MAY_DIFFER:
                continue
            if theirs.get(key) != ours.get(key):
                yield f"{section}.{key}"


def _flush_folder(folder: Path) -> None:
    """Make renames in a folder last through a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- random numbers -----------------------------------------------------------------------------


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of all generators of this process, as tensors and plain containers."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def restore_rng(state: Mapping[str, Any], device: torch.device) -> None:
    """Set all generators of this process to what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
