"""The folder of a run: a new one, or that of a run to continue."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from lavis_uniadapter.common.errors import ConfigError, name_some
from lavis_uniadapter.runners import run_checkpoints, run_folders

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
    output_dir, folder = Path.cwd() / run["output_dir"], None
    if run["job_id"]:
        folder = output_dir / run["job_id"]
    elif run.get("resume") and not run["evaluate"]:
        folder = find_unfinished_run(output_dir, config)
    if folder is None:
        folder = output_dir / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        folder.mkdir(parents=True)
        return folder, None
    if run["evaluate"]:
        return folder, None
    with run_folders.sole_user(folder):
        checkpoint = run_checkpoints.newest_whole(folder)
    if checkpoint is not None and not run.get("resume"):
        raise ConfigError(
            f"'{folder}' holds a run already. Set run.resume=auto to continue it; use another "
            "run.job_id or delete the folder to start anew."
        )
    return folder, checkpoint


def find_unfinished_run(output_dir: Path, config: Mapping[str, Any]) -> Path | None:
    """The newest folder below ``output_dir`` with an unfinished run of a configuration."""
    folders = [path.parent for path in output_dir.glob(f"*/{run_folders.CONFIG}")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if run_folders.is_finished(folder) or not run_checkpoints.states(folder):
            continue
        try:
            with run_folders.sole_user(folder):
                noted = json.loads((folder / run_folders.CONFIG).read_text())
        except run_folders.FolderInUse as error:
            logger.info("%s It is left alone.", error)
            continue
        differences = _differences(noted, config)
        if not differences:
            return folder
        logger.info(
            "'%s' is unfinished and not this run: it has another %s.",
            *(folder, name_some(differences, 3)),
        )
    return None


def _differences(noted: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Names of the settings that change what is computed."""
    return [
        f"{section}.{key}"
        for section in ("datasets", "model", "run")
        for key in sorted({*noted[section], *config[section]})
        if noted[section].get(key) != config[section].get(key)
        and not (section == "run" and key in MAY_DIFFER)
    ]
