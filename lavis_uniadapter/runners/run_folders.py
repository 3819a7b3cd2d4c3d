"""Run folders: a new one or that of a run to continue, and what a finished run left in it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lavis_uniadapter.checkpoints.identity import RUN_CONFIG
from lavis_uniadapter.common.atomic import no_empty_folders
from lavis_uniadapter.common.errors import DISK_IS_FULL, ConfigError, name_some
from lavis_uniadapter.common.schema.compare import named
from lavis_uniadapter.runners import run_checkpoints

logger = logging.getLogger(__name__)

CONFIG = RUN_CONFIG
SUMMARY = "summary.json"
LOCK = ".lock"
LOG = "log.txt"
# What each query contributes to the metrics of a split, in the run's folder ``result``.
OUTCOMES = "outcomes_{split}.json"
LAVIS_RESULTS = "evaluate.txt"
# Of network file systems that are mounted without locks.
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP}
# LAVIS's names of metrics, and how many of our units one of LAVIS's is.
LAVIS_METRICS = {
    "cider": ("CIDEr", 100),
    "bleu_4": ("Bleu_4", 100),
    "meteor": ("METEOR", 100),
    "rouge_l": ("ROUGE_L", 100),
}
# This task's accuracy is a fraction; that of LAVIS's question answering is in percent.
CLASSIFICATION = "multimodal_classification"
# LAVIS names retrieval by what is found: images for a text, texts for an image.
LAVIS_DIRECTIONS = {"t2v_": "img_", "t2i_": "img_", "v2t_": "txt_", "i2t_": "txt_"}

# Keys of ``run:`` that may change when a run continues: they affect where it computes, not what.
MAY_DIFFER = frozenset(
    "resume resume_ckpt_path job_id num_workers device log_freq cache_root checkpoint_freq "
    "data_timeout check_files unreadable_threshold max_skipped_steps feature_memory rerank_batch "
    "batch_size_eval compile".split()
)


@dataclass(frozen=True)
class RunSummary:
    """What a comparison reads of a run; None where the folder does not say.

    Attributes:
        metrics: by our names and LAVIS's; those of a split other than ``test`` start with its
            name, as in ``val_t2v_r1``.
        best: the highest ``agg_metrics`` of validation.
        seconds: of training and evaluation, in all processes that worked on the run.
        peak_bytes: most memory of the main process; on CUDA, of its device.
        outcomes: of the same names, what each query contributes; see ``MeasuredTask.write``.
        precision: the number format, such as float32 or bf16.
        untrained: whether it scored a tuning method's starting weights.
    """

    seed: int | None
    metrics: Mapping[str, float]
    best: float | None = None
    trained_parameters: int | None = None
    total_parameters: int | None = None
    seconds: float | None = None
    peak_bytes: int | None = None
    outcomes: Mapping[str, Sequence[Sequence[float]]] = field(default_factory=dict)
    precision: str | None = None
    untrained: bool = False


class FolderInUse(RuntimeError):
    """Another process works in a folder."""


class CannotWrite(RuntimeError):
    """A folder cannot be written, or not any longer."""


@contextlib.contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Make a folder and lock it until the end of the block, unless its file system has no locks.

    Raises:
        FolderInUse: if another process holds it.
        CannotWrite: if it cannot be made or written.
    """
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FileLock(folder / LOCK, blocking=False))
        except Timeout:
            raise FolderInUse(f"Another process is using '{folder}'.") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise CannotWrite(
                    f"The folder '{folder}' cannot be written: {error.strerror}. Name another one."
                ) from error
            logger.warning("'%s' cannot be locked: let no other process work in it.", folder)
        yield


@contextlib.contextmanager
def run_in(folder: Path) -> Iterator[None]:
    """Be the sole user of a run's folder; one made here is removed if nothing was run in it."""
    is_new = not os.path.lexists(folder)
    with no_empty_folders(folder), sole_user(folder):
        try:
            yield
        finally:
            written = (path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
            before_the_run = all(path.name == CONFIG or path.suffix == ".log" for path in written)
            if is_new and before_the_run:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
    """Inside, the error of a full disk becomes CannotWrite, which says what a run has saved."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        message = (
            f"'{error.filename or folder}' cannot be written: {error.strerror}. Free some space"
        )
        for state in run_checkpoints.states(folder)[:1]:
            message += f", then continue with run.resume=auto from the last whole state, '{state}'"
        raise CannotWrite(f"{message}.") from error


def is_finished(folder: Path) -> bool:
    """Whether a run of this package has done all that its configuration asked for."""
    return (folder / SUMMARY).is_file()


def logged(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``log.txt``, without LAVIS's header and a line that a killed run cut."""
    path = folder / LOG
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.startswith('{"') and line.endswith("}")]


def choose_folder(config: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint in it to continue from (``run.resume: auto``).

    The folder is named ``run.job_id``; else it is that of an unfinished run of the same
    configuration, or a new one named by the time. ConfigError if a new run would overwrite another.
    """
    run = config["run"]
    output_dir, folder = Path.cwd() / run["output_dir"], None
    if run["job_id"]:
        folder = output_dir / run["job_id"]
    elif run.get("resume") and not run["evaluate"]:
        folder = find_unfinished_run(output_dir, config)
    if folder is None:
        return output_dir / datetime.now().strftime("%Y%m%d-%H%M%S-%f"), None
    if run["evaluate"] or not folder.exists():
        return folder, None
    with sole_user(folder):
        checkpoint = run_checkpoints.newest_whole(folder)
    if checkpoint is not None and not run.get("resume"):
        raise ConfigError(
            f"'{folder}' holds a run already. Set run.resume=auto to continue it; use another "
            "run.job_id or delete the folder to start anew."
        )
    return folder, checkpoint


def find_unfinished_run(output_dir: Path, config: Mapping[str, Any]) -> Path | None:
    """The newest folder below ``output_dir`` with an unfinished run of a configuration."""
    folders = [path.parent for path in output_dir.glob(f"*/{CONFIG}")]
    for folder in sorted(folders, key=lambda path: path.stat().st_mtime, reverse=True):
        if is_finished(folder) or not run_checkpoints.states(folder):
            continue
        try:
            with sole_user(folder):
                noted = json.loads((folder / CONFIG).read_text())
            changed = differences(noted, config)
        except (FolderInUse, CannotWrite) as error:
            logger.info("%s It is left alone.", error)
            continue
        except (ValueError, TypeError, AttributeError, KeyError):
            logger.info("'%s' is not a run of this package: its %s is different.", folder, CONFIG)
            continue
        if not changed:
            return folder
        logger.info(
            "'%s' is unfinished and not this run: it has another %s.",
            *(folder, name_some(changed, 3)),
        )
    return None


def differences(noted: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Names of the settings that change what is computed."""
    return [
        f"{section}.{key}"
        for section in ("datasets", "model", "run")
        for key in sorted({*noted[section], *config[section]})
        if noted[section].get(key) != config[section].get(key)
        and not (section == "run" and key in MAY_DIFFER)
        and (section, key) != ("model", "force")
    ]


def read(folder: Path) -> RunSummary:
    """Read a run folder of this package, or one of LAVIS's, which has only metrics.

    Raises:
        FileNotFoundError: if it holds no result of a finished run.
    """
    if not is_finished(folder):
        return RunSummary(None, _read_lavis_metrics(folder))
    summary = json.loads((folder / SUMMARY).read_text())
    metrics: dict[str, float] = {}
    outcomes: dict[str, Sequence[Sequence[float]]] = {}
    for split, measured in (summary["metrics"] or {}).items():
        if summary.get("task") == CLASSIFICATION:
            measured = _in_percent(measured)
        path = folder / "result" / OUTCOMES.format(split=split)
        contributed = json.loads(path.read_text()) if path.is_file() else {}
        metrics |= {named(split, name): v for name, v in _with_our_names(measured).items()}
        outcomes |= {named(split, name): v for name, v in contributed.items()}
    seconds = sum(v for line in logged(folder) for k, v in line.items() if k.endswith("_seconds"))
    return RunSummary(
        seed=summary.get("seed"),
        metrics=metrics,
        best=summary["best"]["score"],
        trained_parameters=summary["parameters"]["trained"],
        total_parameters=summary["parameters"]["total"],
        seconds=seconds or summary["seconds"],
        peak_bytes=summary["peak_bytes"],
        outcomes=outcomes,
        precision=summary.get("precision"),
        untrained=summary.get("untrained", False),
    )


def _read_lavis_metrics(folder: Path) -> Mapping[str, Any]:
    """The last line that a LAVIS task wrote."""
    path = folder / LAVIS_RESULTS
    if not path.is_file():
        raise FileNotFoundError(
            f"'{folder}' holds neither {SUMMARY} nor {LAVIS_RESULTS}: no finished run of this "
            "package's runner or of LAVIS's. Give the folder with checkpoint_best.pth in it."
        )
    try:
        last = json.loads(path.read_text().strip().splitlines()[-1])
        # captioning and classification name the split
        measured = _in_percent(last["test"]) if "test" in last else last
        numbers = {name: v for name, v in measured.items() if isinstance(v, int | float)}
        return _with_our_names(numbers)
    except (ValueError, IndexError, TypeError, AttributeError) as error:
        raise FileNotFoundError(
            f"'{path}' does not end in a result of one of LAVIS's tasks ({error}). Evaluate again."
        ) from error


def _with_our_names(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Metrics of a split; LAVIS's also have our names and units."""
    ours = {
        name: factor * metrics[theirs]
        for name, (theirs, factor) in LAVIS_METRICS.items()
        if theirs in metrics
    }
    ours |= {
        way + name.removeprefix(theirs): value
        for way, theirs in LAVIS_DIRECTIONS.items()
        for name, value in metrics.items()
        if name.startswith(theirs)
    }
    both = {**ours, **metrics}
    of_other_tasks = (*LAVIS_METRICS, *LAVIS_DIRECTIONS)
    if "agg_metrics" not in both or any(name.startswith(of_other_tasks) for name in both):
        return both
    # LAVIS's question answering has no other name for its accuracy.
    return {"accuracy": both["agg_metrics"], **both}


def _in_percent(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Metrics with the accuracy of a classification task in percent, under our name."""
    return {**metrics, "accuracy": 100 * metrics["acc"]} if "acc" in metrics else metrics
