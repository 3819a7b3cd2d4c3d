"""Start runs: what ``train.py`` and ``evaluate.py`` call, and what Python code may call."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lavis.common.optims  # noqa: F401  (registers the learning-rate schedules)
import lavis.runners  # noqa: F401  (registers LAVIS's runners)
import torch
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process, main_process
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.tasks import setup_task
from lavis.tasks.base_task import BaseTask
from lavis.tasks.vqa import VQATask
from omegaconf import DictConfig
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from transformers import set_seed

from lavis_uniadapter.checkpoints import adapter_files, identity
from lavis_uniadapter.checkpoints.identity import Identity
from lavis_uniadapter.common import signals
from lavis_uniadapter.common.atomic import write_json
from lavis_uniadapter.common.config import load_config
from lavis_uniadapter.common.distributed import (
    destroy_process_group,
    init_process_group,
    on_main_process,
)
from lavis_uniadapter.common.errors import CheckpointError, ConfigError, disk_problem, nearest
from lavis_uniadapter.datasets.building import check_built, make_buildable
from lavis_uniadapter.datasets.loading import TrainingShard
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.models.lavis_models import check_lavis_model, is_lavis_model
from lavis_uniadapter.processors.decoding import VideoDecodeError
from lavis_uniadapter.runners import console, precision, run_checkpoints, run_folders, stock_runners
from lavis_uniadapter.runners.console import log_to_console, logger
from lavis_uniadapter.runners.epoch import AnotherRankFailed
from lavis_uniadapter.runners.stock_runners import is_stock
from lavis_uniadapter.runners.training_state import momentum_parameters
from lavis_uniadapter.tasks.prediction import MeasuredTask
from lavis_uniadapter.tasks.retrieval import UniAdapterRetrievalTask

# Errors whose message is all that a user needs; others keep their traceback. The first kind is of
# one rank alone, the second is the same on every rank.
RANK_ERRORS = (VideoDecodeError, DatasetError, FloatingPointError, run_folders.CannotWrite)
USER_ERRORS = (
    *RANK_ERRORS,
    *(ConfigError, CheckpointError, FileExistsError, run_folders.FolderInUse),
)
# Seconds that a rank waits before it exits because of another one, which reports its error first.
EXIT_DELAY = 10


@dataclass(frozen=True)
class RunResult:
    """What a run leaves; ``metrics`` are by test split, on the main process, None on the others."""

    output_dir: Path
    metrics: dict[str, dict[str, float]] | None
    runner: RunnerBase
    seconds: float


def run(cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False) -> RunResult:
    """Train and test, or only test, what a configuration describes.

    Args:
        cfg_path: YAML file.
        options: ``section.key=value`` strings that override it.

    Raises:
        ConfigError, DatasetError, CheckpointError: before training, naming what is wrong.
        FolderInUse: if another process works in the run's folder.
        CannotWrite: if that folder cannot be written, or the disk is full.
        Interrupted: after SIGTERM, SIGINT or SIGHUP, when the state of training is saved.
    """
    started = time.perf_counter()
    config = load_config(cfg_path, [*options, "run.evaluate=True"] if evaluate else options)
    run_cfg = config.run_cfg
    init_process_group(run_cfg.device)
    run_cfg.distributed, run_cfg.world_size = get_world_size() > 1, get_world_size()
    asked = config.to_dict()  # before LAVIS's builders and runners fill it in
    if is_stock(run_cfg):
        stock_runners.prepare(run_cfg)
    folder, checkpoint = on_main_process(run_folders.choose_folder, asked, errors=USER_ERRORS)
    if checkpoint is not None:
        run_cfg.resume_ckpt_path = str(checkpoint)
    with run_folders.explained(folder), contextlib.ExitStack() as held:
        if is_main_process():
            held.enter_context(run_folders.run_in(folder))
            run_checkpoints.clean(folder)
            held.enter_context(console.logged_to_file(folder))
        runner = _build(config, folder.name)
        if is_main_process():
            # of an earlier run in the folder
            (folder / run_folders.SUMMARY).unlink(missing_ok=True)
            if checkpoint is None:  # a resumed run has it
                noted = {**asked, "identity": runner.identity.model_dump()}
                write_json(folder / run_folders.CONFIG, noted)
        if not is_main_process():  # which has made the folder by now
            held.enter_context(console.logged_to_file(folder))
        console.describe_start(runner, config)
        metrics = runner.evaluate(skip_reload=True) if run_cfg.evaluate else runner.train()
        seconds = time.perf_counter() - started
        _write_summary(runner, config, metrics, seconds)
        if metrics:  # the main process has them
            logger.info("%s", console.metrics_table(metrics))
        logger.info("results in %s (%.0f s)", folder, seconds)
    return RunResult(folder, metrics, runner, seconds)


def _build(config: Config, job_id: str) -> RunnerBase:
    """The runner, with everything that can be checked before it starts checked."""
    run_cfg = config.run_cfg
    runner_cls = registry.get_runner_class(run_cfg.runner)
    if is_stock(run_cfg):
        runner_cls = stock_runners.returning_metrics(runner_cls)
    set_cache_root(run_cfg)
    # The same on every rank while the model is built; different when batches are drawn.
    set_seed(run_cfg.seed)
    torch.set_float32_matmul_precision(run_cfg.matmul_precision)
    torch.backends.cudnn.allow_tf32 = run_cfg.matmul_precision == "high"
    task, datasets = _build_datasets(config)
    model = task.build_model(config)
    # the last of the checks, as it opens every file
    check_built(datasets, config.datasets_cfg, run_cfg.check_files)
    if run_cfg.evaluate and run_cfg.get("resume_ckpt_path"):
        model.load_checkpoint(run_cfg.resume_ckpt_path)
    known = identity.of_run(model, config, datasets)
    _check_identity(known, config)
    if _scores_a_start(model, config):
        logger.warning(
            "No trained adapter is given (--adapter, model.finetuned or run.resume_ckpt_path), so "
            "this scores the untrained start: '%s' on %s.",
            *(model.tuning, known.base),
        )
    set_seed(run_cfg.seed + get_rank())
    runner = runner_cls(cfg=config, task=task, job_id=job_id, model=model, datasets=datasets)
    runner.identity = known
    return runner


def _trained_parts(config: Config) -> list[str]:
    """The adapter folder and checkpoints that a run starts from, beyond its base."""
    model, run_cfg = config.model_cfg, config.run_cfg
    finetuned = model.get("finetuned") if model.get("load_finetuned") else None
    given = (model.get("adapter_ckpt"), finetuned, run_cfg.get("resume_ckpt_path"))
    return [path for path in given if path]


def _check_identity(known: Identity, config: Config) -> None:
    """Compare a run with what it continues, or with what it evaluates."""
    run_cfg, force = config.run_cfg, bool(config.model_cfg.get("force"))
    if not run_cfg.evaluate:
        if path := run_cfg.get("resume_ckpt_path"):
            identity.check(identity.of_checkpoint(path), known, path, force)
        return
    # the model has compared the rest when it loaded them
    processors = {k: v for k, v in known.processors.items() if k != identity.IMAGE_SIZE}
    for path in _trained_parts(config):
        folder = os.path.isdir(path)
        saved = adapter_files.read_about(path) if folder else identity.of_checkpoint(path)
        if saved.processors:
            now = Identity(processors=processors)
            identity.check(saved, now, path, force, identity.EVALUATION_MAY_DIFFER)


def _scores_a_start(model: Any, config: Config) -> bool:
    """Whether a run evaluates a tuning method whose weights are as they were drawn."""
    bank = getattr(model, "adapters", None)
    starts = config.run_cfg.evaluate and bank is not None and bank.active is not None
    return bool(starts) and not _trained_parts(config)


def _build_datasets(config: Config) -> tuple[BaseTask, dict[str, dict[str, Any]]]:
    task = setup_task(config)
    _check_allow_missing(config, task)
    run_cfg = config.run_cfg
    kinds = ("test_splits", *(() if run_cfg.evaluate else ("train_splits", "valid_splits")))
    make_buildable(config.datasets_cfg, {split for kind in kinds for split in run_cfg[kind]})
    datasets = task.build_datasets(config)
    available = {split for by_split in datasets.values() for split in by_split}
    for kind in kinds:
        if kind != "train_splits" and "train" in run_cfg[kind]:
            raise ConfigError(
                f"run.{kind} names 'train', whose records are for training. To measure on them, "
                "name their annotation file as a split: "
                "datasets.<name>.build_info.annotations.test.storage=FILE."
            )
        for split in set(run_cfg[kind]) - available:
            raise ConfigError(
                f"run.{kind} names '{split}', and the datasets have "
                f"{', '.join(sorted(available))}.{nearest(split, available)}"
            )
    if not run_cfg.evaluate:
        _check_training_splits(run_cfg, task)
    check_lavis_model(config, datasets)
    return task, datasets


def check(cfg_path: str | Path, options: Sequence[str] = (), evaluate: bool = False) -> None:
    """Check the configuration and every data file of a ``run``, and log what it would use.

    Builds no model and leaves no run folder.

    Raises:
        ConfigError, DatasetError, CheckpointError, FolderInUse, CannotWrite: as ``run`` does.
    """
    config = load_config(cfg_path, [*options, "run.evaluate=True"] if evaluate else options)
    set_cache_root(config.run_cfg)
    folder, _ = run_folders.choose_folder(config.to_dict())
    with run_folders.run_in(folder):  # which makes it, and removes it again
        pass
    _, datasets = _build_datasets(config)
    check_built(datasets, config.datasets_cfg, config.run_cfg.check_files)
    if training := [of["train"] for of in datasets.values() if "train" in of]:
        run_cfg = config.run_cfg
        shard = TrainingShard(ConcatDataset(training), 0, get_world_size(), run_cfg.seed)
        shard.check_batch(run_cfg.batch_size_train)
    logger.info("model: %s, %s", config.model_cfg.arch, config.model_cfg.model_type)
    for name, by_split in datasets.items():
        sizes = ", ".join(f"{split} {len(dataset)}" for split, dataset in by_split.items())
        logger.info("dataset: %s, items: %s", name, sizes)
    logger.info("The configuration and the data files are valid.")


def _check_training_splits(run_cfg: DictConfig, task: BaseTask) -> None:
    if not run_cfg.train_splits:
        raise ConfigError("run.train_splits is empty, and run.evaluate is not True.")
    measured = run_cfg.valid_splits if getattr(task, "report_metric", True) else ()
    if type(task) is VQATask:  # LAVIS's own, which needs questions and annotations in COCO's layout
        measured = task.ques_files
    for split in run_cfg.valid_splits:
        if split not in measured:
            raise ConfigError(
                f"run.valid_splits names '{split}', on which run.task measures nothing, so it "
                "cannot select the best epoch. Set run.valid_splits=[]."
            )


def _check_allow_missing(config: Config, task: BaseTask) -> None:
    """Check that items that cannot be read can be scored as wrong."""
    names = [name for name, cfg in config.datasets_cfg.items() if cfg.get("allow_missing")]
    scores_them = isinstance(task, MeasuredTask) and not is_stock(config.run_cfg)
    if isinstance(task, UniAdapterRetrievalTask):
        model_cls = registry.get_model_class(config.model_cfg.arch)
        scores_them = scores_them and not is_lavis_model(model_cls)
    if names and not scores_them:
        raise ConfigError(
            f"datasets.{names[0]}.allow_missing is True, and run.task '{config.run_cfg.task}' with "
            f"model.arch '{config.model_cfg.arch}' and this run.runner cannot score what is "
            "missing. Use this package's own, or set allow_missing: False."
        )


def set_cache_root(run_cfg: DictConfig) -> None:
    """Set where LAVIS looks for data with relative paths; its default is its authors' folder."""
    root = run_cfg.cache_root or os.environ.get("LAVIS_CACHE_ROOT") or "cache"
    registry.mapping["paths"]["cache_root"] = str(Path(root).expanduser().absolute())


def _best_of_log(folder: Path, run_cfg: DictConfig) -> dict[str, float | None]:
    """The best epoch of a stock runner, by its log, and its ``agg_metrics``."""
    score = f"{next(iter(run_cfg.valid_splits), None)}_agg_metrics"
    validated = [line for line in run_folders.logged(folder) if score in line]
    # LAVIS's runner forgets the best epoch when it resumes, and logs the one that it found since.
    found = [line.get("val_best_epoch") for line in validated]
    of_last = [line for line, epoch in zip(validated, found, strict=True) if epoch == found[-1]]
    best = max(of_last, key=lambda line: line[score], default={})
    epoch = next((v for k, v in best.items() if k.endswith("_epoch")), None)
    return {"agg_metrics": best.get(score), "epoch": epoch}


@main_process
def _write_summary(runner: RunnerBase, config: Config, metrics: object, seconds: float) -> None:
    """Write ``summary.json``, which marks a run as finished; see ``run_folders.read``."""
    run_cfg, folder = config.run_cfg, Path(runner.output_dir)
    # momentum encoders are copies of what is trained, and no part of a model's size
    momentum = momentum_parameters(runner._model)
    parameters = [p for name, p in runner._model.named_parameters() if name not in momentum]
    trained = [] if run_cfg.evaluate else [p for p in parameters if p.requires_grad]
    best = _best_of_log(folder, run_cfg) if is_stock(run_cfg) else runner.best
    write_json(
        folder / run_folders.SUMMARY,
        {
            "arch": config.model_cfg.arch,
            "tuning": config.model_cfg.get("tuning"),
            "task": run_cfg.task,
            "seed": run_cfg.seed,
            "device": run_cfg.device,
            "precision": precision.describe(run_cfg),
            "processes": get_world_size(),
            "parameters": {
                "trained": sum(p.numel() for p in trained),
                "total": sum(p.numel() for p in parameters),
            },
            "untrained": _scores_a_start(runner._model, config),
            "metrics": metrics,
            "best": {
                "score": None if best["epoch"] is None else best["agg_metrics"],
                "epoch": best["epoch"],
            },
            "seconds": seconds,
            "peak_bytes": _peak_bytes(run_cfg.device),
        },
    )


def _peak_bytes(device: str) -> int | None:
    """Most memory that this process has used so far; on CUDA, of its device."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return None
    import resource  # which Windows does not have

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def exit_status(work: Callable[[], object]) -> int:
    """Do the work of a command; returns its exit status.

    Messages go to the console, and errors that a user can fix are printed in one line.
    What ``work`` returns is dropped: a process group can't end while a run refers to it.
    """
    log_to_console()
    rank, status, message = int(os.environ.get("RANK", "0")), 0, None
    try:
        work()
    except RANK_ERRORS as error:
        status, message = 2, f"error: {f'rank {rank}: ' if rank else ''}{error}"
    except USER_ERRORS as error:
        status, message = 2, None if rank else f"error: {error}"
    except signals.Interrupted as interrupted:
        status, message = signals.EXIT_INTERRUPTED, None if rank else str(interrupted)
    except AnotherRankFailed:
        time.sleep(EXIT_DELAY)
        status = 2
    except KeyboardInterrupt as interrupt:
        status, said = signals.describe(interrupt)
        message = None if rank else said
    except Exception as error:
        if problem := disk_problem(error):
            status, message = 2, f"error: {problem}"
        else:
            traceback.print_exc()
            status = 1
    if message:
        tqdm.write(message, file=sys.stderr)
    if status and get_world_size() > 1:
        # Others may wait in a collective, so this rank can't leave the group with them: it ends
        # at once, which torchrun notices.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    destroy_process_group()
    return status
