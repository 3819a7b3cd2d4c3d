"""The runner: LAVIS's ``runner_base``, on CPU and CUDA, in one process or several."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process, main_process
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset

from lavis_uniadapter.checkpoints import adapter_files
from lavis_uniadapter.checkpoints.identity import Identity
from lavis_uniadapter.common import lavis_versions, signals
from lavis_uniadapter.common.atomic import write_text
from lavis_uniadapter.common.distributed import largest
from lavis_uniadapter.common.errors import ConfigError
from lavis_uniadapter.common.signals import Interrupted, InterruptionWatch
from lavis_uniadapter.datasets.loading import BatchLoader, SamplesView, TrainingShard
from lavis_uniadapter.datasets.reading import EvaluationItems, TrainingItems
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.runners import run_checkpoints, run_folders, training_state
from lavis_uniadapter.runners.epoch import EpochProgress, TrainingEpoch
from lavis_uniadapter.runners.faults import FaultLog
from lavis_uniadapter.runners.precision import autocast
from lavis_uniadapter.runners.run_checkpoints import BEST, LATEST

logger = logging.getLogger(__name__)

BEST_ADAPTER = "adapter_best"
LATEST_ADAPTER = "adapter_latest"
COMPILE_BACKEND = "inductor"


@registry.register_runner("runner_uniadapter")
class RunnerUniAdapter(RunnerBase):
    """Train, validate each epoch, keep the best, test it (``lavis.runners.RunnerBase``).

    Beyond LAVIS's: CPU and gloo, bf16, the loss divided over accumulated batches, and the best
    epoch by ``agg_metrics`` of any sign. Training resumes from its checkpoints exactly, in the
    middle of an epoch too; SIGTERM, SIGINT and SIGHUP save one. Unreadable files and steps whose
    loss or gradient is not finite are skipped, counted and logged, up to a limit. The configuration
    is one that ``load_config`` has completed.
    """

    identity: Identity | None = None  # of the run, which the launcher sets

    def __init__(self, cfg, task, model, datasets, job_id):
        super().__init__(cfg, task, model, datasets, job_id)
        self.watch = InterruptionWatch()
        self.amp = cfg.run_cfg.amp
        # the value of the selection metric, and agg_metrics, of which more is better
        self.best = {"epoch": None, "value": None, "agg_metrics": float("-inf")}
        self.faults = FaultLog(self.output_dir)

    # --- set-up ---------------------------------------------------------------------------------

    def setup_output_dir(self) -> None:
        """``<output_dir>/<job_id>`` under the current folder; the same on every rank."""
        self.output_dir = Path.cwd() / self.config.run_cfg.output_dir / self.job_id
        self.result_dir = self.output_dir / "result"
        self.result_dir.mkdir(parents=True, exist_ok=True)
        # registry.register_path refuses a second run in the same process
        registry.mapping["paths"]["output_dir"] = str(self.output_dir)
        registry.mapping["paths"]["result_dir"] = str(self.result_dir)

    @property
    def model(self):
        """The model on its device, wrapped for distributed training if there is any."""
        if self._wrapped_model is None:
            self._model = self._wrapped_model = self._model.to(self.device)
            if self.config.run_cfg.compile:
                compile_visual_encoder(self._model)
            if self.use_distributed:
                # Queues and averages start alike, and every rank then computes them alike.
                for buffer in self._model.buffers():
                    dist.broadcast(buffer, src=0)
                self._wrapped_model = DistributedDataParallel(
                    self._model,
                    device_ids=[torch.cuda.current_device()] if self.cuda_enabled else None,
                    broadcast_buffers=False,
                )
        return self._wrapped_model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW; what decays is matrices, as in LAVIS, or all, as in the authors' released code."""
        if self._optimizer is None:
            run = self.config.run_cfg
            trained = [p for p in self.model.parameters() if p.requires_grad]
            min_axes = 0 if run.weight_decay_on == "all" else 2  # of what decays
            groups = [
                ([p for p in trained if p.ndim >= min_axes], run.weight_decay),
                ([p for p in trained if p.ndim < min_axes], 0.0),
            ]
            self._optimizer = torch.optim.AdamW(
                [{"params": p, "weight_decay": decay} for p, decay in groups if p],
                lr=run.init_lr,
                betas=(0.9, run.beta2),
                fused=True,  # so that the device can skip a step
            )
        return self._optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        if self._scaler is None and self.amp == "fp16":
            self._scaler = torch.amp.GradScaler(self.device.type)
        return self._scaler

    def create_loaders(self, datasets, is_trains, collate_fns, **_):
        """A `BatchLoader` for each split; items are sharded over ranks, in training shuffled."""
        splits = zip(datasets, is_trains, collate_fns, strict=True)
        return [self._create_loader(*split) for split in splits]

    def _create_loader(self, dataset, training, collate_fn) -> BatchLoader:
        if isinstance(dataset, list | tuple | IterableDataset):
            raise ConfigError("runner_uniadapter reads map-style datasets. Use runner_base.")
        run, rank, world = self.config.run_cfg, get_rank(), get_world_size()
        # LAVIS gives a split named train the training batch, also where it is only evaluated
        batch_size = run.batch_size_train if training else run.batch_size_eval
        if training:
            items = TrainingItems(dataset, run.num_workers, run.seed)
            sampler = TrainingShard(dataset, rank, world, run.seed)
            sampler.check_batch(batch_size)
        else:
            sections = self.config.datasets_cfg.values()
            allow_missing = any(section.get("allow_missing") for section in sections)
            items = EvaluationItems(dataset, run.num_workers, allow_missing)
            # LAVIS's own retrieval models score what their loader yields as if it were the gallery.
            scores_its_loader = hasattr(self._model, "compute_sim_matrix") and not isinstance(
                self._model, BlipUniAdapterRetrieval
            )
            if not self.use_dist_eval_sampler or scores_its_loader:
                rank, world = 0, 1
            # DistributedSampler would repeat items to give every rank as many.
            sampler = range(rank, len(dataset), world)
        return BatchLoader(
            items,
            sampler,
            batch_size=batch_size,
            num_workers=run.num_workers,
            collate_fn=collate_fn,
            timeout=run.data_timeout,
            poll=self.watch.check,
            drop_last=training,
            pin_memory=self.cuda_enabled,
        )

    # --- training -------------------------------------------------------------------------------

    def train(self) -> dict[str, dict[str, float]] | None:
        """Train and test; returns the metrics of the test splits (main process).

        Raises:
            Interrupted: after SIGTERM, SIGINT or SIGHUP, saying how to continue the run.
            FloatingPointError: if too many steps in a row, or all of them, had no finite loss and
                gradient.
            ConfigError: if the disk has no room for the states of the run.
            DatasetError: if too many items could not be read, or a data worker hung or died.
        """
        with signals.handled_by(self.watch.note):
            try:
                return self._train()
            except DatasetError:
                if not self.watch.requested_within(1.0):
                    raise
                cause = self.watch.requested
            except Interrupted as interrupted:
                cause = str(interrupted)
        latest = self.output_dir / LATEST
        if not latest.is_file():
            raise Interrupted(f"{cause}: the run was stopped before its first step was saved.")
        raise Interrupted(
            f"{cause}: the run was stopped before its end, and is saved in {latest}. The same "
            "command with run.resume=auto continues it."
        )

    def _train(self) -> dict[str, dict[str, float]] | None:
        progress = EpochProgress(epoch=0)
        if self.resume_ckpt_path is not None:
            progress = training_state.restore(self, self.resume_ckpt_path)
        self._check_space()
        self._begin_log(progress.epoch)
        while progress.epoch < self.max_epoch:
            progress = self._train_and_validate(progress)
        # AdamW does not count a step that it skips; those of earlier processes are in its state.
        if not any(moments["step"] for moments in self.optimizer.state.values()):
            raise FloatingPointError(
                "The run took no step: no loss and gradient were finite. Lower run.init_lr, set "
                "run.max_grad_norm, or set run.amp to null."
            )
        validates, last = bool(self.valid_splits), self.max_epoch - 1
        results = self.evaluate("best" if validates else last, skip_reload=not validates)
        if results and validates:  # the adapter that was tested, now with its test metrics
            self._save_adapter(BEST_ADAPTER, self.best["epoch"], results)
        elif results:
            self._save_adapter(LATEST_ADAPTER, last, results)
        return results

    def _train_and_validate(self, progress: EpochProgress) -> EpochProgress:
        """One epoch, or the rest of it; returns where the next one begins."""
        epoch, started = progress.epoch, time.perf_counter()
        stats = self.train_epoch(progress)
        stops = largest(int(self.watch.requested is not None))
        if self.valid_splits or stops:
            self.save_latest(progress)  # so that an interruption costs the validation alone
        if stops:
            raise Interrupted(self.watch.requested or "a signal to another rank")
        logs = {split: self.eval_epoch(split, cur_epoch=epoch) for split in self.valid_splits}
        progress = EpochProgress(epoch + 1, skipped_in_a_row=progress.skipped_in_a_row)
        self._end_epoch(progress, stats, logs, time.perf_counter() - started)
        dist.barrier()
        return progress

    def _end_epoch(self, progress: EpochProgress, stats: dict, logs: dict, seconds: float) -> None:
        """Log an epoch and save it; ``logs`` are of the validation splits (main process)."""
        epoch, metric, is_best = progress.epoch - 1, self._metric_name, False
        self.log_stats({**stats, "epoch": epoch}, "train")
        text = ", ".join(f"{k} {v:.3f}" for k, v in stats.items() if k.startswith("loss"))
        text = text or "no step was taken"
        for split, log in logs.items():
            if log is None:  # on the other ranks, and of LAVIS's tasks that measure nothing
                continue
            self.log_stats({**log, "epoch": epoch}, split)
            if split != self.valid_splits[0]:
                continue
            text += f", {split} {metric} {log[metric]:.2f}"
            if log["agg_metrics"] > self.best["agg_metrics"]:
                scores = {"value": log[metric], "agg_metrics": log["agg_metrics"]}
                self.best, is_best = {"epoch": epoch, **scores}, True
                text += " (best so far)"
        content = training_state.collect(self, progress)
        if content is not None:
            # The best one first: a state must not refer to a best one that is not on disk yet.
            if is_best:
                run_checkpoints.write(content, self.output_dir / BEST)
                self._save_adapter(BEST_ADAPTER, epoch)
            run_checkpoints.write(content, self.output_dir / LATEST)
            self._save_adapter(LATEST_ADAPTER, epoch)
        if is_main_process():
            logger.info("epoch %d/%d: %s (%.0f s)", epoch + 1, self.max_epoch, text, seconds)

    def train_epoch(self, progress: EpochProgress) -> dict[str, float]:
        return TrainingEpoch(self, progress).run()

    def losses(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a batch by name; the one to minimise is ``loss``."""
        with autocast(self.amp, self.device):
            return lavis_versions.losses(self.task, self.model, samples)

    # --- evaluation -----------------------------------------------------------------------------

    def evaluate(self, cur_epoch="best", skip_reload=False):
        if self.evaluate_only:
            self._begin_log(0)
        results = {}
        for split in self.test_splits:
            started = time.perf_counter()
            result = self.eval_epoch(split, cur_epoch=cur_epoch, skip_reload=skip_reload)
            if result is not None:
                results[split] = result
                self.log_stats({**result, "seconds": time.perf_counter() - started}, split)
        return results if is_main_process() else None

    @torch.no_grad()
    def eval_epoch(self, split_name, cur_epoch, skip_reload=False):
        """Metrics of a split on the main process (``RunnerBase.eval_epoch``, on any device)."""
        loader = self.dataloaders[split_name]
        model = self.unwrap_dist_model(self.model)
        if not skip_reload and cur_epoch == "best":
            path = self.output_dir / BEST
            content = run_checkpoints.read(path)
            training_state.load_model_state(model, content["model"], path)
            if content["epoch"] != self.best["epoch"]:
                logger.warning(
                    "'%s' is of epoch %d, and epoch %s was the best.",
                    *(path, content["epoch"], self.best["epoch"]),
                )
        model.eval()
        self.task.before_evaluation(model=model, dataset=self.datasets[split_name])
        if not getattr(self.task, "reads_batches", False):  # LAVIS's own
            loader = SamplesView(loader)
        with check_before_layers(model, self.watch.check), autocast(self.amp, self.device):
            results = self.task.evaluation(model, loader, cuda_enabled=self.cuda_enabled)
        if results is None:
            return None
        return self.task.after_evaluation(
            val_result=results, split_name=split_name, epoch=cur_epoch
        )

    # --- checkpoints ----------------------------------------------------------------------------

    @main_process
    def _check_space(self) -> None:
        """Raise ConfigError unless all states that are kept at a time fit on the disk."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        # weights with the optimizer's two moments of each, and averages and queues
        tensors = [*trained * 3, *self.model.buffers()]
        number = 4 if self.valid_splits else 3  # one is written beside the last two and the best
        needed = number * sum(tensor.nbytes for tensor in tensors)
        there = sum(path.stat().st_size for path in self.output_dir.glob("checkpoint_*.pth"))
        room = shutil.disk_usage(self.output_dir).free + there
        if room < needed:
            raise ConfigError(
                f"'{self.output_dir}' has room for {room / 1e9:.2f} GB, and the states of this run "
                f"take {needed / 1e9:.2f}. Free some space, or choose another run.output_dir."
            )

    def save_latest(self, progress: EpochProgress) -> None:
        content = training_state.collect(self, progress)
        if content is not None:
            run_checkpoints.write(content, self.output_dir / LATEST)

    def _save_adapter(self, name: str, epoch: int, results: dict | None = None) -> None:
        """Write the adapter, if the model has one, with the metrics that are known of it."""
        bank = getattr(self._model, "adapters", None)
        if bank is None or bank.active is None:
            return
        metrics = {"epoch": epoch}
        if name == BEST_ADAPTER:
            metrics[f"{self.valid_splits[0]}_{self._metric_name}"] = self.best["value"]
        for split, values in (results or {}).items():
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            metrics |= {f"{split}_{k}": v for k, v in numbers.items() if k != "agg_metrics"}
        adapter_files.save(self._model, self.output_dir / name, metrics, self.identity)

    # --- log ------------------------------------------------------------------------------------

    @property
    def _metric_name(self) -> str:
        return getattr(self.task, "selection_metric", "agg_metrics")

    @main_process
    def _begin_log(self, epoch: int) -> None:
        """Begin ``log.txt``; a run that resumes at an epoch keeps the lines of those before it.

        It also keeps the best epoch, on which it may not improve.
        """
        kept: list[str] = []
        if self.resume_ckpt_path is not None and not self.evaluate_only:
            source = Path(self.resume_ckpt_path).resolve().parent
            for line in run_folders.logged(source):
                if any(key.endswith("_epoch") and value < epoch for key, value in line.items()):
                    kept.append(json.dumps(line) + "\n")
            if source != self.output_dir.resolve() and (source / BEST).is_file():
                shutil.copy2(source / BEST, self.output_dir)
                if (source / BEST_ADAPTER).is_dir():
                    there = self.output_dir / BEST_ADAPTER
                    shutil.copytree(source / BEST_ADAPTER, there, dirs_exist_ok=True)
        write_text(self.output_dir / run_folders.LOG, "".join(kept))


@contextlib.contextmanager
def check_before_layers(model: torch.nn.Module, check: Callable[[], None]) -> Iterator[None]:
    """Inside, call a function before each layer of a model computes; it may raise.

    This reaches evaluations that LAVIS's tasks and models do in one call, too.
    """
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    layers = [each for layers in lists for each in layers if each._compiled_call_impl is None]
    hooks = [each.register_forward_pre_hook(lambda *_: check()) for each in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def compile_visual_encoder(model: torch.nn.Module) -> None:
    """Let ``torch.compile`` fuse what lies between the matrix products of each ViT block.

    Raises:
        ConfigError: for a model without ViT blocks.
    """
    blocks = getattr(getattr(model, "visual_encoder", None), "blocks", None)
    if blocks is None:
        raise ConfigError(
            f"run.compile is True, and {type(model).__name__} has no visual_encoder.blocks."
        )
    # Blocks share their code, and each is compiled several times: with averages swapped in, for
    # training, for evaluation, and for an incomplete last batch.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 * len(blocks))
    for block in blocks:
        block.compile(backend=COMPILE_BACKEND)
