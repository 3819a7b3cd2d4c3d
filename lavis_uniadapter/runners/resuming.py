"""The folder of a run: a new one, or that of a run to continue."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.errors import ConfigError, name_some
from lavis_uniadapter.runners import run_checkpoints, run_folders
from lavis_uniadapter.runners.run_folders import CONFIG
from lavis_uniadapter.runners.stock_runners import is_stock

logger = logging.getLogger(__name__)

# Keys of ``run:`` that may change when a run continues: they affect where it computes, not what.
MAY_DIFFER = frozenset(
    "resume resume_ckpt_path job_id num_workers device log_freq cache_root checkpoint_freq "
    "data_timeout check_files unreadable_threshold max_skipped_steps feature_memory rerank_batch "
    "batch_size_eval compile".split()
)


def choose_folder(config: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint in it to continue from (``run.resume: auto``).

    The folder is named ``run.job_id``; else it is that of an unfinished run of the same
    configuration, or a new one named by the time.

    Args:
        config: the sections of the configuration, as plain containers.

    Raises:
        ConfigError: if a new run would overwrite the checkpoints of another.
    """
    run = config["run"]
    of_lavis = is_stock(run)
    output_dir = Path.cwd() / run["output_dir"]
    job_id = run["job_id"]
    if not job_id and run.get("resume") and not run["evaluate"]:
        job_id = find_unfinished_run(output_dir, config, of_lavis)
    if not job_id:
        return _new_folder(output_dir), None
    folder = output_dir / job_id
    if run["evaluate"]:
        return folder, None
    with run_folders.sole_user(folder):
        checkpoint = run_checkpoints.newest_whole(folder, of_lavis)
    if checkpoint is not None and not run.get("resume"):
        raise ConfigError(
            f"'{folder}' holds a run already. Set run.resume=auto to continue it; use another "
            "run.job_id or delete the folder to start anew."
        )
    return folder, checkpoint


def _new_folder(output_dir: Path) -> Path:
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in itertools.count():
        folder = output_dir / (f"{now}-{suffix}" if suffix else now)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue  # another run took the name


def find_unfinished_run(
    output_dir: Path, config: Mapping[str, Any], of_lavis: bool = False
) -> str | None:
    """Name of the newest unfinished run of a configuration below ``output_dir``."""
    folders = [path.parent for path in output_dir.glob(f"*/{CONFIG}")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if run_folders.is_finished(folder) or not run_checkpoints.states(folder, of_lavis):
            continue
        if run_folders.is_in_use(folder):
            logger.info("'%s' is in use and is left alone.", folder)
            continue
        noted = json.loads((folder / CONFIG).read_text())
        if differences := list(_differences(noted, config)):
            logger.info(
                "'%s' is unfinished and not this run: it has another %s.",
                *(folder, name_some(differences, 3)),
            )
            continue
        return folder.name
    return None


def _differences(noted: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """Names of the settings that change what is computed."""
    for section in sorted({*noted, *config}):
        theirs, ours = noted.get(section) or {}, config.get(section) or {}
        for key in sorted({*theirs, *ours}):
            may_differ = section == "run" and key in MAY_DIFFER
            if not may_differ and theirs.get(key) != ours.get(key):
                yield f"{section}.{key}"
