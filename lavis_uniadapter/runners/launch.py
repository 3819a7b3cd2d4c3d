"""Start runs: what ``train.py`` and ``evaluate.py`` call, and what Python code may call."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import math
import os
import random
import re
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import lavis.common.optims  # noqa: F401  (registers the learning-rate schedules)
import lavis.runners  # noqa: F401  (registers LAVIS's runners)
import numpy as np
import torch
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process, main_process
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.tasks import setup_task
from lavis.tasks.base_task import BaseTask
from lavis.tasks.retrieval import RetrievalTask
from tqdm import tqdm

from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import (
    destroy_process_group,
    init_process_group,
    on_main_process,
)
from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.datasets.building import check_built, make_buildable
from lavis_uniadapter.datasets.preflight import DatasetError
from lavis_uniadapter.models.lavis_models import check_lavis_model
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.processors.video import VideoDecodeError
from lavis_uniadapter.runners import precision, run_checkpoints, run_folders, stock_runners
from lavis_uniadapter.runners.runner import (
    SPLIT_KINDS,
    AnotherRankFailed,
    check_splits,
    momentum_parameters,
)
from lavis_uniadapter.runners.signals import EXIT_INTERRUPTED, Interrupted
from lavis_uniadapter.runners.stock_runners import is_stock
from lavis_uniadapter.tasks.prediction import PredictionTask

logger = logging.getLogger("lavis_uniadapter")

# Errors whose message is all that a user needs; others keep their traceback.
USER_ERRORS = (
    ConfigError,
    CheckpointError,
    DatasetError,
    VideoDecodeError,
    FileExistsError,
    FloatingPointError,
    run_folders.FolderInUse,
)
# Those that one rank may meet alone.
RANK_ERRORS = (VideoDecodeError, DatasetError, FloatingPointError)
# How long a rank that stops because of another one waits for that one's error to be told first.
WAIT_FOR_THE_FIRST_ERROR = 10


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        output_dir: the run folder.
        metrics: by test split, on the main process; None on the others.
        runner: with the model, for whoever goes on in Python.
        seconds: wall-clock time, building included.
    """

    output_dir: Path
    metrics: dict[str, dict[str, float]] | None
    runner: RunnerBase
    seconds: float


def run(cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False) -> RunResult:
    """Train and test, or only test, what a configuration describes.

    Args:
        cfg_path: YAML file.
        options: ``section.key=value`` strings over it.
        evaluate: test only.

    Raises:
        ConfigError, DatasetError, CheckpointError: before training, naming what is wrong.
        FolderInUse: if another process trains in the run's folder.
        Interrupted: after SIGTERM or SIGINT, when the state of training is saved.
    """
    started = time.perf_counter()
    options = [*options, "run.evaluate=True"] if evaluate else list(options)
    config = load_config(cfg_path, options)
    init_process_group(config.run_cfg.device)
    config.config.run.distributed = get_world_size() > 1
    config.config.run.world_size = get_world_size()
    # before the checks below fill it in for LAVIS's builders
    config.as_asked = config.to_dict()
    set_cache_root(config)
    if is_stock(config.run_cfg):
        stock_runners.prepare(config.run_cfg)
    job_id, checkpoint = on_main_process(
        _choose_folder, config, errors=(ConfigError, CheckpointError, run_folders.FolderInUse)
    )
    folder = _folder_of(config, job_id)
    with contextlib.ExitStack() as held:
        if is_main_process() and not config.run_cfg.evaluate:
            held.enter_context(run_folders.sole_user(folder))
        if checkpoint is not None:
            config.config.run.resume_ckpt_path = str(checkpoint)
            if is_main_process():
                run_checkpoints.clean(folder)
        runner, metrics = _build_and_run(config, job_id)
        seconds = time.perf_counter() - started
        _write_summary(runner, config, metrics, seconds)
    return RunResult(Path(runner.output_dir), metrics, runner, seconds)


def _build_and_run(
    config: Config, job_id: str
) -> tuple[RunnerBase, dict[str, dict[str, float]] | None]:
    seed = int(config.run_cfg.seed)
    # Alike on every rank while the model is built; apart when batches and negatives are drawn.
    seed_everything(seed)
    precision.set_matmul_precision(config.run_cfg.matmul_precision)
    task = setup_task(config)
    _check_allow_missing(config, task)
    make_buildable(config.datasets_cfg, _splits_of(config))
    datasets = task.build_datasets(config)
    check_splits(config.run_cfg, task, datasets)
    check_lavis_model(config, datasets)
    model = task.build_model(config)
    # last of the checks, as it opens every file
    check_built(datasets, config.datasets_cfg, config.run_cfg.check_files)
    seed_everything(seed + get_rank())
    runner_cls = registry.get_runner_class(config.run_cfg.runner)
    if is_stock(config.run_cfg):
        runner_cls = stock_runners.recording(runner_cls)
    runner = runner_cls(cfg=config, task=task, job_id=job_id, model=model, datasets=datasets)
    if is_main_process():  # of an earlier run under the same name
        (Path(runner.output_dir) / run_folders.SUMMARY).unlink(missing_ok=True)
    log_to_file(Path(runner.output_dir))
    _report_start(runner, config)
    if not config.run_cfg.evaluate:
        return runner, runner.train()
    if config.run_cfg.resume_ckpt_path:
        model.load_checkpoint(config.run_cfg.resume_ckpt_path)
    return runner, runner.evaluate(skip_reload=True)


@main_process
def _write_summary(runner: RunnerBase, config: Config, metrics: object, seconds: float) -> None:
    """``summary.json``, by which a run is known to have finished; see ``run_folders``."""
    # copies of what is trained are no part of a model's size
    momentum = momentum_parameters(runner._model)
    parameters = [p for name, p in runner._model.named_parameters() if name not in momentum]
    trained = [] if config.run_cfg.evaluate else [p for p in parameters if p.requires_grad]
    run_folders.write_json(
        Path(runner.output_dir) / run_folders.SUMMARY,
        {
            "arch": config.model_cfg.arch,
            "tuning": config.model_cfg.get("tuning"),
            "task": config.run_cfg.task,
            "seed": int(config.run_cfg.seed),
            "device": str(config.run_cfg.device),
            "precision": precision.describe(config.run_cfg),
            "processes": get_world_size(),
            "parameters": {
                "trained": sum(p.numel() for p in trained),
                "total": sum(p.numel() for p in parameters),
            },
            "metrics": metrics,
            "best": {
                "score": _finite_or_none(getattr(runner, "best_metric", None)),
                "epoch": getattr(runner, "best_epoch", None),
            },
            "seconds": seconds,
            "peak_bytes": run_folders.peak_bytes(torch.device(config.run_cfg.device)),
        },
    )


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _splits_of(config: Config) -> set[str]:
    """The splits that a run reads."""
    run_cfg = config.run_cfg
    kinds = ("test_splits",) if run_cfg.evaluate else SPLIT_KINDS
    return {split for kind in kinds for split in run_cfg[kind]}


def _check_allow_missing(config: Config, task: BaseTask) -> None:
    """See that whoever scores knows what to do with items that could not be read."""
    names = [name for name, cfg in config.datasets_cfg.items() if cfg.allow_missing]
    model_cls = registry.get_model_class(config.model_cfg.arch)
    scores_them = isinstance(task, PredictionTask) or (
        isinstance(task, RetrievalTask) and issubclass(model_cls, BlipUniAdapterRetrieval)
    )
    if names and (is_stock(config.run_cfg) or not scores_them):
        raise ConfigError(
            f"datasets.{names[0]}.allow_missing is True, and run.task '{config.run_cfg.task}' with "
            f"model.arch '{config.model_cfg.arch}' and this run.runner cannot score what is "
            "missing. Take this package's own, or set allow_missing: False."
        )


def set_cache_root(config: Config) -> None:
    """Where LAVIS looks for data with relative paths; its default is a folder of its authors'.

    ``run.cache_root``, else the environment's ``LAVIS_CACHE_ROOT``, else ``./cache``.
    """
    root = config.run_cfg.cache_root or os.environ.get("LAVIS_CACHE_ROOT") or "cache"
    registry.mapping["paths"]["cache_root"] = str(Path(root).expanduser().absolute())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _folder_of(config: Config, job_id: str) -> Path:
    return Path.cwd() / config.run_cfg.output_dir / job_id


def _choose_folder(config: Config) -> tuple[str, Path | None]:
    """The run folder's name, and the checkpoint in it to go on from (``run.resume: auto``).

    The name is as configured, or that of an unfinished run of the same configuration, or the time.

    Raises:
        ConfigError: if training is to start anew where a run has left its checkpoints.
    """
    run_cfg = config.run_cfg
    of_lavis = is_stock(run_cfg)
    job_id = run_cfg.job_id or ""
    if run_cfg.evaluate:
        return job_id or _new_folder(config), None
    resumes = run_cfg.get("resume") == "auto"  # which runner_iter does not read
    if resumes and not job_id:
        output_dir = Path.cwd() / run_cfg.output_dir
        job_id = run_checkpoints.find_unfinished_run(output_dir, config.as_asked, of_lavis) or ""
    if not job_id:
        return _new_folder(config), None
    folder = _folder_of(config, job_id)
    with run_folders.sole_user(folder):
        checkpoint = run_checkpoints.newest_whole(folder, of_lavis)
    if checkpoint is not None and not resumes:
        raise ConfigError(
            f"'{folder}' holds a run already. Set run.resume=auto to go on with it; name another "
            "run.job_id or delete the folder to start anew."
        )
    return job_id, checkpoint


def _new_folder(config: Config) -> str:
    """Make a folder named by the time, which no other run has; returns its name."""
    now = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in itertools.count():
        job_id = f"{now}-{suffix}" if suffix else now
        try:
            _folder_of(config, job_id).mkdir(parents=True)
            return job_id
        except FileExistsError:
            continue  # another run took the name


def _report_start(runner: RunnerBase, config: Config) -> None:
    if not is_main_process():
        return
    model = runner._model
    run_cfg = config.run_cfg
    lines = [f"run folder {runner.output_dir}"]
    if not run_cfg.evaluate:
        batch = run_cfg.batch_size_train * get_world_size() * run_cfg.accum_grad_iters
        lines.append(
            f"{run_cfg.device}, {get_world_size()} process(es), global batch {batch}, "
            f"queue {getattr(model, 'queue_size', 'none')}"
        )
    lines.append(f"precision {precision.describe(run_cfg)}")
    if hasattr(model, "base_name"):
        lines.append(f"base checkpoint: {model.base_name} ({model.base_fingerprint[:8]})")
        if config.model_cfg.get("adapter_ckpt"):
            lines.append(f"adapter: {config.model_cfg.adapter_ckpt}")
        if model.randomly_initialised:
            lines.append(f"randomly initialised: {', '.join(model.randomly_initialised)}")
        lines.extend(model.adapter_summary().splitlines())
    for line in lines:
        logger.info("%s", line)


# --- console and log files ----------------------------------------------------------------------


class _TqdmHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def log_to_console() -> None:
    """This package's messages on the main process's console; LAVIS's go to the log file."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO if int(os.environ.get("RANK", 0)) == 0 else logging.ERROR)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    # LAVIS calls logging.info, which would otherwise give the root logger a console of its own.
    logging.getLogger().addHandler(logging.NullHandler())


def log_to_file(folder: Path) -> None:
    """All that LAVIS and this package log, in ``run.log`` (``run.rankN.log`` of other ranks)."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler)]:
        root.removeHandler(handler)
        handler.close()
    name = "run.log" if is_main_process() else f"run.rank{get_rank()}.log"
    handler = logging.FileHandler(folder / name)
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)


def metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    """The metrics of each split; of retrieval a line a direction."""
    lines = []
    for split, values in metrics.items():
        rows: dict[str, list[str]] = {}
        for name, value in values.items():
            if name == "agg_metrics" and len(values) > 1:
                continue
            found = re.match(r"([tvi]2[tvi])_(.+)", name)
            direction, metric = found.groups() if found else ("", name)
            rows.setdefault(direction, []).append(f"{metric} {value:.2f}")
        if not rows:
            lines.append(f"{split}: not measured; the predictions are in the folder result")
        lines += [f"{split} {row}".strip() + f": {'  '.join(rows[row])}" for row in rows]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None, *, evaluate: bool = False) -> int:
    """The command line of ``train.py`` and ``evaluate.py``; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Evaluate a model." if evaluate else "Train a model, then test it.",
    )
    parser.add_argument("--cfg-path", required=True, help="YAML file of the run")
    parser.add_argument(
        "--options",
        nargs="+",
        default=[],
        metavar="section.key=value",
        help="override the file, e.g. run.init_lr=1e-4 model.tuning=full",
    )
    if evaluate:
        parser.add_argument("--adapter", help="folder written by save_adapter to evaluate")
    args = parser.parse_args(argv)
    options = list(args.options)
    if evaluate and args.adapter:
        options.append(f"model.adapter_ckpt={args.adapter}")
    log_to_console()
    status = 0
    try:
        _run_and_report(args.cfg_path, options, evaluate)
    except USER_ERRORS as error:
        # Configurations fail alike on every rank; data and numbers on one.
        rank = int(os.environ.get("RANK", 0))
        if rank == 0 or isinstance(error, RANK_ERRORS):
            tqdm.write(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        status = 2
    except Interrupted as interrupted:
        if int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(str(interrupted), file=sys.stderr)
        status = EXIT_INTERRUPTED
    except AnotherRankFailed:
        time.sleep(WAIT_FOR_THE_FIRST_ERROR)
        status = 2
    except Exception:
        traceback.print_exc()
        status = 1
    if status and get_world_size() > 1:
        # Others may wait in a collective, so this rank can't leave the group with them: it ends
        # at once, which torchrun notices.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    destroy_process_group()
    return status


def _run_and_report(cfg_path: str, options: Sequence[str], evaluate: bool) -> None:
    """Keeps nothing of the run, so that the process group can end with it."""
    result = run(cfg_path, options, evaluate)
    if result.metrics is not None:
        logger.info("%s", metrics_table(result.metrics))
        logger.info("results in %s (%.0f s)", result.output_dir, result.seconds)


if __name__ == "__main__":
    sys.exit(main())
