"""Start runs: what ``train.py`` and ``evaluate.py`` call, and what Python code may call."""

from __future__ import annotations

import contextlib
import os
import random
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
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
from lavis.tasks.vqa import VQATask
from omegaconf import DictConfig
from torch.utils.data import Dataset
from tqdm import tqdm

from lavis_uniadapter.common import paths
from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import (
    destroy_process_group,
    init_process_group,
    on_main_process,
)
from lavis_uniadapter.common.errors import CheckpointError, ConfigError, nearest
from lavis_uniadapter.datasets.building import check_built, make_buildable
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.models.lavis_models import check_lavis_model, is_lavis_model
from lavis_uniadapter.processors.decoding import VideoDecodeError
from lavis_uniadapter.runners import precision, run_checkpoints, run_folders, stock_runners
from lavis_uniadapter.runners.console import (
    describe_start,
    log_to_console,
    log_to_file,
    logger,
    metrics_table,
)
from lavis_uniadapter.runners.epoch import AnotherRankFailed
from lavis_uniadapter.runners.resuming import choose_folder
from lavis_uniadapter.runners.signals import EXIT_INTERRUPTED, Interrupted
from lavis_uniadapter.runners.stock_runners import is_stock
from lavis_uniadapter.runners.training_state import momentum_parameters
from lavis_uniadapter.tasks.prediction import PredictionTask
from lavis_uniadapter.tasks.retrieval import UniAdapterRetrievalTask

SPLIT_KINDS = ("train_splits", "valid_splits", "test_splits")
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
# Errors of one rank alone; others are the same on every rank.
RANK_ERRORS = (VideoDecodeError, DatasetError, FloatingPointError)
# Seconds that a rank waits before it exits because of another one, which reports its error first.
EXIT_DELAY = 10


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        output_dir: the run folder.
        metrics: by test split, on the main process; None on the others.
        runner: with the model.
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
        options: ``section.key=value`` strings that override it.
        evaluate: test only.

    Raises:
        ConfigError, DatasetError, CheckpointError: before training, naming what is wrong.
        FolderInUse: if another process trains in the run's folder.
        Interrupted: after SIGTERM or SIGINT, when the state of training is saved.
    """
    started = time.perf_counter()
    config = load_config(cfg_path, [*options, "run.evaluate=True"] if evaluate else options)
    run_cfg = config.run_cfg
    init_process_group(run_cfg.device)
    run_cfg.distributed, run_cfg.world_size = get_world_size() > 1, get_world_size()
    asked = config.to_dict()  # before LAVIS's builders and runners fill it in
    if is_stock(run_cfg):
        stock_runners.prepare(run_cfg)
    folder, checkpoint = on_main_process(
        choose_folder, asked, errors=(ConfigError, CheckpointError, run_folders.FolderInUse)
    )
    if checkpoint is not None:
        run_cfg.resume_ckpt_path = str(checkpoint)
    with contextlib.ExitStack() as held:
        if is_main_process() and not run_cfg.evaluate:
            held.enter_context(run_folders.sole_user(folder))
            run_checkpoints.clean(folder)
        runner = _build(config, folder.name)
        if is_main_process():
            # of an earlier run in the folder
            (folder / run_folders.SUMMARY).unlink(missing_ok=True)
            if checkpoint is None:  # a resumed run has it
                write_json(folder / run_folders.CONFIG, asked)
        log_to_file(folder)
        describe_start(runner, config)
        metrics = runner.evaluate(skip_reload=True) if run_cfg.evaluate else runner.train()
        seconds = time.perf_counter() - started
        _write_summary(runner, config, metrics, seconds)
    return RunResult(folder, metrics, runner, seconds)


def _build(config: Config, job_id: str) -> RunnerBase:
    """The runner, with everything that can be checked before it starts checked."""
    run_cfg = config.run_cfg
    seed = run_cfg.seed
    runner_cls = registry.get_runner_class(run_cfg.runner)
    if is_stock(run_cfg):
        runner_cls = stock_runners.recording(runner_cls)
    set_cache_root(run_cfg)
    # The same on every rank while the model is built; different when batches are drawn.
    seed_everything(seed)
    precision.set_matmul_precision(run_cfg.matmul_precision)
    task, datasets = _build_datasets(config)
    model = task.build_model(config)
    # the last of the checks, as it opens every file
    check_built(datasets, config.datasets_cfg, run_cfg.check_files)
    seed_everything(seed + get_rank())
    runner = runner_cls(cfg=config, task=task, job_id=job_id, model=model, datasets=datasets)
    if run_cfg.evaluate and run_cfg.get("resume_ckpt_path"):
        model.load_checkpoint(run_cfg.resume_ckpt_path)
    return runner


def _build_datasets(config: Config) -> tuple[BaseTask, dict[str, dict[str, Dataset]]]:
    task = setup_task(config)
    _check_allow_missing(config, task)
    run_cfg = config.run_cfg
    kinds = ("test_splits",) if run_cfg.evaluate else SPLIT_KINDS
    splits = {kind: list(run_cfg[kind]) for kind in kinds}
    make_buildable(config.datasets_cfg, {name for names in splits.values() for name in names})
    datasets = task.build_datasets(config)
    available = sorted({split for by_split in datasets.values() for split in by_split})
    check_splits(splits, available, task)
    check_lavis_model(config)
    return task, datasets


def check(cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False) -> None:
    """Check the configuration and every data file of a run, and log what it would use.

    Builds no model and writes no run folder.

    Args:
        cfg_path: YAML file.
        options: ``section.key=value`` strings over it.
        evaluate: check what an evaluation needs.

    Raises:
        ConfigError, DatasetError, CheckpointError: as ``run`` raises them.
    """
    config = load_config(cfg_path, [*options, "run.evaluate=True"] if evaluate else options)
    set_cache_root(config.run_cfg)
    base = str(config.model_cfg.get("pretrained") or "")
    ours = not is_lavis_model(registry.get_model_class(config.model_cfg.arch))
    if ours and base and "://" not in base and paths.find(base) is None:
        raise CheckpointError(f"No checkpoint at '{base}' (model.pretrained).")
    _, datasets = _build_datasets(config)
    check_built(datasets, config.datasets_cfg, config.run_cfg.check_files)
    logger.info("model: %s, %s", config.model_cfg.arch, config.model_cfg.model_type)
    for name, by_split in datasets.items():
        sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in by_split.items())
        logger.info("dataset: %s, items: %s", name, sizes)
    logger.info("The configuration and the data files are valid.")


def check_splits(
    splits: Mapping[str, Sequence[str]], available: Sequence[str], task: BaseTask
) -> None:
    """Check that a run's splits exist, and that validation measures something.

    Args:
        splits: by key of ``run:``; only ``test_splits`` if the run does not train.
        available: the splits of the datasets.

    Raises:
        ConfigError: naming the split and what to set.
    """
    for kind, names in splits.items():
        for split in names:
            if split not in available:
                raise ConfigError(
                    f"run.{kind} names '{split}', and the datasets have {', '.join(available)}."
                    f"{nearest(split, available)}"
                )
    if not splits.get("train_splits", True):
        raise ConfigError("run.train_splits is empty, and run.evaluate is not True.")
    unmeasured = splits.get("valid_splits", ())
    if type(task) is VQATask:  # LAVIS's own
        unmeasured = [split for split in unmeasured if split not in task.ques_files]
    elif getattr(task, "report_metric", True):
        unmeasured = ()
    if unmeasured:
        raise ConfigError(
            f"run.valid_splits names '{unmeasured[0]}', of which run.task measures nothing (its "
            "annotations have no question and annotation file in COCO's layout, or "
            "run.report_metric is False), so it cannot select the best epoch. Set "
            "run.valid_splits=[]."
        )


def _check_allow_missing(config: Config, task: BaseTask) -> None:
    """Check that items that cannot be read can be scored as wrong."""
    names = [name for name, cfg in config.datasets_cfg.items() if cfg.get("allow_missing")]
    model_cls = registry.get_model_class(config.model_cfg.arch)
    scores_them = isinstance(task, PredictionTask) or (
        isinstance(task, UniAdapterRetrievalTask) and not is_lavis_model(model_cls)
    )
    if names and (is_stock(config.run_cfg) or not scores_them):
        raise ConfigError(
            f"datasets.{names[0]}.allow_missing is True, and run.task '{config.run_cfg.task}' with "
            f"model.arch '{config.model_cfg.arch}' and this run.runner cannot score what is "
            "missing. Use this package's own, or set allow_missing: False."
        )


def set_cache_root(run_cfg: DictConfig) -> None:
    """Set where LAVIS looks for data with relative paths; its default is its authors' folder.

    ``run.cache_root``, else the environment's ``LAVIS_CACHE_ROOT``, else ``./cache``.
    """
    root = run_cfg.cache_root or os.environ.get("LAVIS_CACHE_ROOT") or "cache"
    registry.mapping["paths"]["cache_root"] = str(Path(root).expanduser().absolute())


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@main_process
def _write_summary(runner: RunnerBase, config: Config, metrics: object, seconds: float) -> None:
    """Write ``summary.json``, which marks a run as finished; see ``run_folders``."""
    # momentum encoders are copies of what is trained, and no part of a model's size
    momentum = momentum_parameters(runner._model)
    parameters = [p for name, p in runner._model.named_parameters() if name not in momentum]
    trained = [] if config.run_cfg.evaluate else [p for p in parameters if p.requires_grad]
    best = asdict(runner.best)
    write_json(
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
                "score": None if best["epoch"] is None else best["metric"],
                "epoch": best["epoch"],
            },
            "seconds": seconds,
            "peak_bytes": run_folders.peak_bytes(torch.device(config.run_cfg.device)),
        },
    )


def run_and_report(
    cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False
) -> None:
    """``run``, and log the metrics. Keeps no reference to the run, so the process group can end."""
    result = run(cfg_path, options, evaluate)
    if result.metrics is not None:
        logger.info("%s", metrics_table(result.metrics))
        logger.info("results in %s (%.0f s)", result.output_dir, result.seconds)


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command; returns its exit status.

    Messages go to the console, and errors that a user can fix are printed in one line.
    """
    log_to_console()
    rank = int(os.environ.get("RANK", "0"))
    status = 0
    try:
        work()
    except USER_ERRORS as error:
        # Configurations fail alike on every rank; data and numbers on one.
        if rank == 0 or isinstance(error, RANK_ERRORS):
            tqdm.write(f"error: {f'rank {rank}: ' if rank else ''}{error}", file=sys.stderr)
        status = 2
    except Interrupted as interrupted:
        if rank == 0:
            tqdm.write(str(interrupted), file=sys.stderr)
        status = EXIT_INTERRUPTED
    except AnotherRankFailed:
        time.sleep(EXIT_DELAY)
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
