"""The runner: LAVIS's ``runner_base``, on CPU and CUDA, in one process or several."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process, main_process
from lavis.common.registry import registry
from lavis.datasets.data_utils import apply_to_sample
from lavis.runners.runner_base import RunnerBase
from lavis.tasks.base_task import BaseTask
from lavis.tasks.vqa import VQATask
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from tqdm import tqdm

from lavis_uniadapter.checkpoints.blip_files import describe_mismatch
from lavis_uniadapter.common import lavis_versions
from lavis_uniadapter.common.distributed import Votes, gather_to_main
from lavis_uniadapter.common.errors import CheckpointError, ConfigError, nearest
from lavis_uniadapter.datasets.preflight import DatasetError
from lavis_uniadapter.datasets.reading import (
    BatchReport,
    EvaluationItems,
    ItemLoader,
    ReadingMonitor,
    TrainingItems,
    gather_unreadable,
)
from lavis_uniadapter.datasets.sampling import EvaluationShard, TrainingShard
from lavis_uniadapter.models.retrieval import BlipUniAdapterRetrieval
from lavis_uniadapter.runners import run_checkpoints, run_folders
from lavis_uniadapter.runners.faults import FaultLog
from lavis_uniadapter.runners.precision import AMP_DTYPES
from lavis_uniadapter.runners.run_checkpoints import BEST, LATEST, PREVIOUS
from lavis_uniadapter.runners.signals import Interrupted, InterruptionWatch
from lavis_uniadapter.runners.updates import Updates

logger = logging.getLogger(__name__)

BEST_ADAPTER = "adapter_best"
LATEST_ADAPTER = "adapter_latest"
COMPILE_BACKEND = "inductor"
SPLIT_KINDS = ("train_splits", "valid_splits", "test_splits")
# What a rank may want of all: to go on, to save and stop, to stop for want of data.
_GO_ON, _SAVE_AND_STOP, _CANNOT_GO_ON = range(3)


class AnotherRankFailed(RuntimeError):
    """A rank stops because another one had to; that one says why."""


@dataclass
class EpochProgress:
    """How far this rank is in an epoch; saved, so that the epoch can go on from there.

    Attributes:
        epoch: counted from 0.
        step: batches done.
        sums, counts: of each finite loss.
        seconds: that earlier sessions spent on the epoch.
        unreadable: items that gave their places to others.
        skipped: steps that were not taken.
        skipped_in_a_row: of them, since the last one taken; goes on through epochs.
    """

    epoch: int
    step: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    unreadable: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count a batch's losses, where they are numbers."""
        for name, value in losses.items():
            value = value.detach().float()
            finite = torch.isfinite(value)
            counted = torch.where(finite, value, torch.zeros_like(value))
            self.sums[name] = self.sums[name] + counted if name in self.sums else counted
            self.counts[name] = self.counts[name] + finite if name in self.counts else finite.int()

    def means(self) -> dict[str, float]:
        """Mean losses of all ranks so far; every rank must call it."""
        if not self.sums:
            return {}
        both = torch.stack(
            [torch.stack(list(self.sums.values())), torch.stack(list(self.counts.values())).float()]
        )
        dist.all_reduce(both)
        means = (both[0] / both[1]).tolist()  # of no finite loss: not a number
        return dict(zip(self.sums, means, strict=True))


@registry.register_runner("runner_uniadapter")
class RunnerUniAdapter(RunnerBase):
    """Train, validate each epoch, keep the best, test it (``lavis.runners.RunnerBase``).

    Beyond LAVIS's: CPU and gloo, output under the current folder, a progress bar, the loss divided
    over accumulated batches, ``amp: auto | bf16 | fp16 | null``, and the best epoch chosen by
    ``agg_metrics`` of any sign. From its checkpoints, in the middle of an epoch too, training goes
    on as if it had not stopped; SIGTERM and SIGINT save one. Files that cannot be read and steps
    whose loss or gradient is not finite are passed over, counted and named, up to a limit.
    """

    def __init__(self, cfg, task, model, datasets, job_id):
        super().__init__(cfg, task, model, datasets, job_id)
        # The selection metric's value as it is, and as agg_metrics, of which more is better.
        self.best_value: float | None = None
        self.best_metric = float("-inf")
        self.best_epoch: int | None = None
        check_splits(cfg.run_cfg, task, datasets)
        self.amp = cfg.run_cfg.amp
        self._watch = InterruptionWatch()
        self._faults = FaultLog(self.output_dir)
        self._votes = Votes()
        self._saved_at = 0

    # --- set-up ---------------------------------------------------------------------------------

    def setup_output_dir(self) -> None:
        """``<output_dir>/<job_id>`` under the current folder; the same on every rank."""
        self.output_dir = Path.cwd() / self.config.run_cfg.output_dir / self.job_id
        self.result_dir = self.output_dir / "result"
        self.result_dir.mkdir(parents=True, exist_ok=True)
        # registry.register_path refuses a second run in the same process.
        registry.mapping["paths"]["output_dir"] = str(self.output_dir)
        registry.mapping["paths"]["result_dir"] = str(self.result_dir)

    @property
    def use_distributed(self) -> bool:
        return get_world_size() > 1

    @property
    def model(self):
        """The model on its device, wrapped for distributed training if there is any."""
        if self._wrapped_model is None:
            self._model = self._model.to(self.device)
            self._wrapped_model = self._model
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

    def unwrap_dist_model(self, model):
        return model.module if isinstance(model, DistributedDataParallel) else model

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over what trains.

        Weights decay as ``run.weight_decay_on`` says: ``matrices`` as in LAVIS, or ``all`` trained
        tensors as in the authors' released code.
        """
        if self._optimizer is None:
            run = self.config.run_cfg
            trained = [
                p for p in self.unwrap_dist_model(self.model).parameters() if p.requires_grad
            ]
            least = 0 if run.weight_decay_on == "all" else 2  # axes of what decays
            groups = [
                ([p for p in trained if p.ndim >= least], run.weight_decay),
                ([p for p in trained if p.ndim < least], 0.0),
            ]
            self._optimizer = torch.optim.AdamW(
                [{"params": p, "weight_decay": decay} for p, decay in groups if p],
                lr=run.init_lr,
                betas=(0.9, run.beta2),
                fused=True,  # so that the device can leave out a step
            )
        return self._optimizer

    @property
    def scaler(self) -> torch.amp.GradScaler | None:
        if self._scaler is None and self.amp == "fp16":
            self._scaler = torch.amp.GradScaler(self.device.type)
        return self._scaler

    def _autocast(self):
        if self.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[self.amp])

    def create_loaders(
        self, datasets, num_workers, batch_sizes, is_trains, collate_fns, dataset_ratios=None
    ) -> list[ItemLoader]:
        """One loader a split; items are sharded over ranks, and in training shuffled by epoch."""
        loaders = []
        for dataset, batch_size, is_train, collate_fn in zip(
            datasets, batch_sizes, is_trains, collate_fns, strict=True
        ):
            if isinstance(dataset, list | tuple | IterableDataset):
                raise ConfigError("runner_uniadapter reads map-style datasets. Use runner_base.")
            monitor = ReadingMonitor(num_workers)
            if is_train:
                seed = self.config.run_cfg.seed
                items = TrainingItems(dataset, seed, monitor)
                sampler = TrainingShard(items, get_rank(), get_world_size(), seed)
                if len(sampler) < batch_size:
                    raise ConfigError(
                        f"The training split gives each process {len(sampler)} items, fewer than "
                        f"run.batch_size_train {batch_size}. Make the batch smaller."
                    )
            else:
                stand_ins = self.output_dir / "stand_ins"
                allowed = getattr(dataset, "allow_missing", False)
                items = EvaluationItems(dataset, stand_ins if allowed else None, monitor)
                shard = (get_rank(), get_world_size()) if self._shards_evaluation() else (0, 1)
                sampler = EvaluationShard(items, *shard)
            loaders.append(
                ItemLoader(
                    items,
                    batch_size=batch_size,
                    sampler=sampler,
                    num_workers=num_workers,
                    collate_fn=collate_fn,
                    drop_last=is_train,
                    pin_memory=self.cuda_enabled,
                    timeout=self.config.run_cfg.data_timeout,
                )
            )
        return loaders

    def _shards_evaluation(self) -> bool:
        # LAVIS's own retrieval models score what their loader gives as if it were the gallery
        scores_its_loader = hasattr(self._model, "compute_sim_matrix") and not isinstance(
            self._model, BlipUniAdapterRetrieval
        )
        return self.use_dist_eval_sampler and not scores_its_loader

    # --- training -------------------------------------------------------------------------------

    def train(self) -> dict[str, dict[str, float]] | None:
        """Train and test; returns the metrics of the test splits (main process).

        Raises:
            Interrupted: after SIGTERM or SIGINT, saying where the run can go on.
            FloatingPointError: if too many steps in a row had no finite loss and gradient.
            DatasetError: if too many items could not be read, or a data worker hung or died.
        """
        with self._watch:
            try:
                try:
                    return self._train()
                except DatasetError:
                    # a signal to the whole process group may have ended the data workers first
                    if self._watch.requested_within(1.0):
                        raise Interrupted(self._watch.requested) from None
                    raise
            except Interrupted as interrupted:
                raise Interrupted(self._describe_interruption(str(interrupted))) from None

    def _train(self) -> dict[str, dict[str, float]] | None:
        progress = EpochProgress(epoch=0)
        if self.resume_ckpt_path is not None:
            progress = self._load_checkpoint(self.resume_ckpt_path)
        self._start_log(progress.epoch)
        while progress.epoch < self.max_epoch:
            epoch, started = progress.epoch, time.perf_counter()
            with self._watch.deferred():
                stats = self.train_epoch(progress)
                stops = self._votes.largest(int(self._watch.requested is not None))
                if self.valid_splits or stops:
                    # an interruption from here on costs the validation alone
                    self._save_latest(progress)
                if stops:
                    raise Interrupted(self._watch.requested or "a signal to another rank")
            logs = {split: self.eval_epoch(split, cur_epoch=epoch) for split in self.valid_splits}
            with self._watch.deferred():
                self.log_stats({**stats, "epoch": epoch}, "train")
                logs = {split: log for split, log in logs.items() if log is not None}
                for split, log in logs.items():
                    self.log_stats({**log, "epoch": epoch}, split)
                first_log = next(iter(logs.values()), None)
                is_best = first_log is not None and first_log["agg_metrics"] > self.best_metric
                if is_best:
                    self.best_metric, self.best_epoch = first_log["agg_metrics"], epoch
                    self.best_value = first_log[self._metric_name]
                progress = EpochProgress(epoch + 1, skipped_in_a_row=progress.skipped_in_a_row)
                self._save_epoch(progress, is_best)
                seconds = time.perf_counter() - started
                self._announce_epoch(epoch, stats, first_log, is_best, seconds)
                dist.barrier()
        self._stop_if_interrupted()
        tested = "best" if self.valid_splits else self.max_epoch - 1
        results = self.evaluate(cur_epoch=tested, skip_reload=not self.valid_splits)
        with self._watch.deferred():
            if results and self._has_adapter():
                # the adapter that was tested, with what the test gave
                name = BEST_ADAPTER if self.valid_splits else LATEST_ADAPTER
                epoch = self.best_epoch if self.valid_splits else tested
                self._save_adapter(name, epoch, results)
        return results

    def evaluate(self, cur_epoch="best", skip_reload=False):
        if self.evaluate_only:
            self._start_log(0)
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
        loader = self.dataloaders[split_name]  # which also sorts self.datasets by split
        model = self.unwrap_dist_model(self.model)
        if not skip_reload and cur_epoch == "best":
            model = self._reload_best_model(model)
        model.eval()
        self.task.before_evaluation(model=model, dataset=self.datasets[split_name])
        with self._autocast():
            results = self.task.evaluation(model, loader, cuda_enabled=self.cuda_enabled)
        self._note_unreadable(split_name, loader)
        if results is None:
            return None
        return self.task.after_evaluation(
            val_result=results, split_name=split_name, epoch=cur_epoch
        )

    def _note_unreadable(self, split: str, loader: ItemLoader) -> None:
        """Keep a list of what was scored as wrong because it could not be read."""
        unreadable = gather_unreadable(loader)
        if not unreadable or not is_main_process():
            return
        path = self.result_dir / f"unreadable_{split}.json"
        run_folders.write_json(path, [asdict(fault) for _, fault in sorted(unreadable.items())])
        logger.warning(
            "%s: %d of %d items cannot be read and are scored as wrong (allow_missing): %s",
            *(split, len(unreadable), len(loader.dataset), path),
        )

    def train_epoch(self, progress: EpochProgress) -> dict[str, float]:
        """One pass over the training split, or the rest of it; returns what ``log.txt`` is told.

        Args:
            progress: where to begin; changed as the epoch advances.

        Raises:
            FloatingPointError, DatasetError, Interrupted: see ``train``.
        """
        self.model.train()
        loader = self.train_loader
        loader.start(progress.epoch, progress.step)
        self._updates = self._new_updates()
        steps, accumulate = len(loader), self.accum_grad_iters
        started = time.perf_counter() - progress.seconds
        self._saved_at = progress.step
        reports: list[BatchReport] = []
        total = torch.zeros((), device=self.device)
        batches = iter(loader)
        bar = tqdm(
            desc=f"epoch {progress.epoch + 1}/{self.max_epoch}",
            total=steps,
            initial=progress.step,
            disable=not is_main_process(),
            leave=False,
            mininterval=0.5,
        )
        for i in range(progress.step, steps):
            # The last batches of an epoch may be fewer than those that are usually accumulated.
            first = i - i % accumulate
            window = min(accumulate, steps - first)
            progress.seconds = time.perf_counter() - started
            samples = self._next_batch(batches, progress, may_save=i == first)
            reports.append(loader.report)
            samples = apply_to_sample(lambda x: x.to(self.device, non_blocking=True), samples)
            samples.update(epoch=progress.epoch, iters=i, num_iters_per_epoch=steps)
            self.lr_scheduler.step(cur_epoch=progress.epoch, cur_step=i)
            updates = i + 1 == first + window
            with self._no_sync(unless=updates):
                losses = self._losses(samples)
                loss = losses["loss"] / window
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            total = total + loss.detach()
            progress.add(losses)
            progress.step = i + 1
            if updates:
                self._updates.take(progress, total, losses, reports)
                total, reports = torch.zeros_like(total), []
                progress.seconds = time.perf_counter() - started
                self._save_now_and_then(progress, steps)
            bar.update()
            if i % self.log_freq == 0 or i + 1 == steps:
                bar.set_postfix(
                    {k: f"{float(v / progress.counts[k]):.3f}" for k, v in progress.sums.items()}
                )
        bar.close()
        self._updates.settle(progress)
        progress.seconds = time.perf_counter() - started
        faults = torch.tensor([progress.unreadable, progress.skipped], device=self.device)
        dist.all_reduce(faults)
        unreadable, skipped = faults.tolist()
        return {
            **progress.means(),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": progress.seconds,
            "unreadable": unreadable,
            "skipped_steps": skipped // get_world_size(),
        }

    def _next_batch(
        self, batches: Iterator[dict[str, Any]], progress: EpochProgress, may_save: bool
    ) -> dict[str, Any]:
        """The next batch, unless a rank is to stop or can't read its own: then all stop here."""
        samples = failure = None
        try:
            samples = next(batches)
            self._count_unreadable(progress)
        except DatasetError as error:
            # a signal to the whole process group may have ended the workers first
            if not self._watch.requested_within(1.0):
                failure = error
        if failure is not None:
            wish = _CANNOT_GO_ON
        elif self._watch.requested and (may_save or samples is None):
            wish = _SAVE_AND_STOP
        else:
            wish = _GO_ON
        verdict = self._votes.largest(wish)
        if verdict == _GO_ON:
            return samples
        if may_save:
            self._updates.settle(progress)
            self._save_latest(progress)
        if failure is not None:
            raise failure
        if verdict == _CANNOT_GO_ON:
            raise AnotherRankFailed("Another rank cannot read its data.")
        raise Interrupted(self._watch.requested or "a signal to another rank")

    def _count_unreadable(self, progress: EpochProgress) -> None:
        loader = self.train_loader
        faults = loader.report.unreadable
        self._faults.unreadable(faults, progress.epoch, progress.step)
        number = progress.unreadable + len(faults)
        threshold = self.config.run_cfg.unreadable_threshold
        items = len(loader) * loader.batch_size
        if faults and number > threshold * items:
            raise DatasetError(
                f"{number} of the {items} items of this epoch could not be read, more "
                f"than run.unreadable_threshold {threshold:g} allows; the last: "
                f"'{faults[-1].file}' ({faults[-1].reason}). All are in {self.output_dir}. Is the "
                "disk there? python -m lavis_uniadapter.prepare check looks through a folder."
            )
        progress.unreadable = number

    def _new_updates(self) -> Updates:
        return Updates(
            self.optimizer,
            self.scaler,
            self.config.run_cfg.max_grad_norm,
            faults=self._faults,
            dataset=self.train_loader.dataset.dataset,
            most_in_a_row=self.config.run_cfg.max_skipped_steps,
        )

    def _losses(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        with self._autocast():
            return lavis_versions.losses(self.task, self.model, samples)

    def _no_sync(self, unless: bool):
        if unless or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    # --- checkpoints ----------------------------------------------------------------------------

    def _save_now_and_then(self, progress: EpochProgress, steps: int) -> None:
        frequency = self.config.run_cfg.checkpoint_freq
        if not frequency or progress.step - self._saved_at < frequency or progress.step == steps:
            return
        self._updates.settle(progress)
        if progress.skipped_in_a_row:
            return  # the weights may be what is wrong; the states on disk are better
        self._saved_at = progress.step
        self._save_latest(progress)

    def _save_latest(self, progress: EpochProgress) -> None:
        """Write the newest state; every rank takes part."""
        content = self._state(progress)
        if content is not None:
            run_checkpoints.write_latest(content, self.output_dir)

    def _save_epoch(self, progress: EpochProgress, is_best: bool) -> None:
        """Write the state after an epoch, the best beside it, and their adapters."""
        content = self._state(progress)
        if content is None:
            return
        epoch = progress.epoch - 1
        # The best one first: whoever resumes from the latest must find the best that it speaks of.
        if is_best:
            run_checkpoints.write(content, self.output_dir / BEST)
            if self._has_adapter():
                self._save_adapter(BEST_ADAPTER, epoch)
        run_checkpoints.write_latest(content, self.output_dir)
        if self._has_adapter():
            self._save_adapter(LATEST_ADAPTER, epoch)

    def _state(self, progress: EpochProgress) -> dict[str, Any] | None:
        """All that a run needs to go on, on the main process; None on the others.

        None there too if the weights are not finite.
        """
        ranks = gather_to_main(
            {"rng": run_checkpoints.rng_state(self.device), "progress": _to_cpu(asdict(progress))}
        )
        if ranks is None:
            return None
        model = self.unwrap_dist_model(self.model)
        unchanged = _unchanged_by_training(model)
        if not all(torch.isfinite(p).all() for p in model.parameters() if p.requires_grad):
            logger.warning("The weights are not finite; the states on disk are kept as they are.")
            return None
        return {
            "model": {k: v for k, v in model.state_dict().items() if k not in unchanged},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "config": self.config.to_dict(),
            # LAVIS's meaning: the last epoch that is done
            "epoch": progress.epoch - 1,
            "steps_per_epoch": len(self.train_loader),
            "best": {
                "metric": self.best_metric,
                "value": self.best_value,
                "epoch": self.best_epoch,
            },
            "ranks": ranks,
        }

    def _has_adapter(self) -> bool:
        bank = getattr(self._model, "adapters", None)
        return bank is not None and bank.active is not None

    def _save_adapter(self, name: str, epoch: int, results: dict | None = None) -> None:
        """Write the adapter beside its checkpoint, with the metrics known of it."""
        metrics = {"epoch": epoch}
        if name == BEST_ADAPTER:
            metrics[f"{self.valid_splits[0]}_{self._metric_name}"] = self.best_value
        for split, values in (results or {}).items():
            numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
            metrics.update({f"{split}_{k}": v for k, v in numbers.items() if k != "agg_metrics"})
        self._model.save_adapter(self.output_dir / name, metrics)

    def _load_checkpoint(self, path) -> EpochProgress:
        """Go on where a checkpoint stopped: weights, averages, queues, optimizer, RNG, best.

        Checkpoints of LAVIS's runner will do, which lack some of it.

        Returns:
            How far this rank is.
        """
        content = run_checkpoints.read(path)
        theirs, ours = (
            section.get("model", {}).get("tuning")
            for section in (content.get("config") or {}, self.config.to_dict())
        )
        if theirs != ours:
            raise CheckpointError(
                f"'{path}' is of a run with model.tuning '{theirs}', and this one has "
                f"'{ours}'. Set model.tuning: {theirs} to go on with it."
            )
        progress = self._progress_in(content, path)
        self._load_model_state(content["model"], path)
        for group in content["optimizer"]["param_groups"]:
            group["fused"] = True  # other runners' optimizers are not
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        best = content.get("best") or {}
        self.best_metric = best.get("metric", float("-inf"))
        self.best_value = best.get("value")
        self.best_epoch = best.get("epoch")
        self._take_over_best(Path(path).parent)
        where = f"step {progress.step} of epoch" if progress.step else "epoch"
        logger.info("Resumed from %s: %s %d follows.", path, where, progress.epoch + 1)
        return progress

    def _progress_in(self, content: Mapping[str, Any], path) -> EpochProgress:
        """This rank's progress, its random numbers restored.

        Raises:
            CheckpointError: if the state is of the middle of an epoch that this run divides into
                other batches.
        """
        ranks = content.get("ranks") or []
        if len(ranks) == get_world_size():
            state = ranks[get_rank()]
            progress = EpochProgress(**state["progress"])
            progress.sums, progress.counts = (
                {k: v.to(self.device) for k, v in tensors.items()}
                for tensors in (progress.sums, progress.counts)
            )
            run_checkpoints.restore_rng(state["rng"], self.device)
        else:
            progress = EpochProgress(content["epoch"] + 1)
            logger.warning(
                "'%s' has the random numbers of %d process(es) and not of %d: they begin anew.",
                *(path, len(ranks), get_world_size()),
            )
        in_the_middle = any(state["progress"]["step"] for state in ranks)
        steps = content.get("steps_per_epoch")
        if in_the_middle and (len(ranks) != get_world_size() or steps != len(self.train_loader)):
            raise CheckpointError(
                f"'{path}' is of the middle of an epoch of {steps} steps on {len(ranks)} "
                f"process(es), and this run has {len(self.train_loader)} on {get_world_size()}. "
                "Start it with the same number of processes, run.batch_size_train and data."
            )
        return progress

    @main_process
    def _take_over_best(self, folder: Path) -> None:
        """Copy the best so far from the resumed run's folder: this run may not improve on it."""
        if folder.resolve() == self.output_dir.resolve():
            return
        if (folder / BEST).is_file():
            shutil.copy2(folder / BEST, self.output_dir / BEST)
        if (folder / BEST_ADAPTER).is_dir():
            shutil.copytree(
                folder / BEST_ADAPTER, self.output_dir / BEST_ADAPTER, dirs_exist_ok=True
            )

    def _reload_best_model(self, model):
        path = self.output_dir / BEST
        content = run_checkpoints.read(path, checked=False)
        self._load_model_state(content["model"], path)
        if content["epoch"] != self.best_epoch:
            logger.warning(
                "'%s' is of epoch %d, and epoch %s was the best.",
                *(path, content["epoch"], self.best_epoch),
            )
        return model

    def _load_model_state(self, state: dict[str, Tensor], source) -> None:
        model = self.unwrap_dist_model(self.model)
        # What is frozen is not in a runner's checkpoints.
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        own = {k: v for k, v in model.state_dict().items() if k not in frozen or k in state}
        if problems := describe_mismatch(own, state):
            raise CheckpointError(f"'{source}' does not fit {type(model).__name__}: {problems}.")
        model.load_state_dict(state, strict=False)
        # LAVIS's own models keep momentum encoders, which its runner does not save.
        if momentum := momentum_parameters(model).difference(state):
            model.copy_params()
            logger.warning(
                "'%s' holds no momentum encoders (%d tensors): they start from the model.",
                *(source, len(momentum)),
            )

    # --- telling people -------------------------------------------------------------------------

    @main_process
    def _announce_epoch(self, epoch, stats, val_log, is_best, seconds) -> None:
        losses = ", ".join(f"{k} {v:.3f}" for k, v in stats.items() if k.startswith("loss"))
        chosen = ""
        if val_log is not None:
            name = self._metric_name
            chosen = f", {self.valid_splits[0]} {name} {val_log[name]:.2f}"
        logger.info(
            "epoch %d/%d: %s%s%s (%.0f s)",
            epoch + 1,
            self.max_epoch,
            losses,
            chosen,
            " (best so far)" if is_best else "",
            seconds,
        )

    @property
    def _metric_name(self) -> str:
        return getattr(self.task, "selection_metric", "agg_metrics")

    @main_process
    def log_stats(self, stats, split_name) -> None:
        """Add a JSON line to ``log.txt``, keys prefixed by the split as in LAVIS."""
        line = {f"{split_name}_{key}": value for key, value in stats.items()}
        with open(self.output_dir / "log.txt", "a") as file:
            file.write(json.dumps(line) + "\n")

    @main_process
    def _start_log(self, epoch: int) -> None:
        """Note the configuration; ``log.txt`` keeps what it says of the epochs before this one."""
        path = self.output_dir / run_folders.LOG
        lines = path.read_text().splitlines() if path.is_file() else []
        kept = []
        for line in lines if self.resume_ckpt_path is not None else ():
            noted = [v for k, v in json.loads(line).items() if k.endswith("_epoch")]
            if noted and noted[0] < epoch:
                kept.append(line)
        path.write_text("".join(f"{line}\n" for line in kept))
        asked = getattr(self.config, "as_asked", None) or self.config.to_dict()
        run_folders.write_json(self.output_dir / run_checkpoints.CONFIG, asked)

    # --- interruptions --------------------------------------------------------------------------

    def _stop_if_interrupted(self) -> None:
        """Act on a signal that came where it was only noted."""
        if self._watch.requested:
            raise Interrupted(self._watch.requested)

    def _describe_interruption(self, signal_name: str) -> str:
        saved = [name for name in (LATEST, PREVIOUS) if (self.output_dir / name).is_file()]
        if not saved:
            return f"{signal_name}: the run ended before its first step was saved."
        return (
            f"{signal_name}: the run ended before it was done, and is saved in "
            f"{self.output_dir / saved[0]}. The same command with run.resume=auto goes on."
        )


def _to_cpu(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _to_cpu(v) for k, v in value.items()}
    return value.cpu() if torch.is_tensor(value) else value


def momentum_parameters(model: torch.nn.Module) -> set[str]:
    """Parameters of momentum encoders, which LAVIS's models keep beside what they follow."""
    momentum = {id(p) for pair in getattr(model, "model_pairs", ()) for p in pair[1].parameters()}
    return {name for name, p in model.named_parameters() if id(p) in momentum}


def _unchanged_by_training(model: torch.nn.Module) -> set[str]:
    """Parameters that are what they were when the model was built."""
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    return frozen - momentum_parameters(model)


def compile_visual_encoder(model: torch.nn.Module) -> None:
    """Let ``torch.compile`` fuse what lies between the matrix products of each ViT block.

    State-dict names stay as they are.

    Raises:
        ConfigError: for a model without ViT blocks.
    """
    blocks = getattr(getattr(model, "visual_encoder", None), "blocks", None)
    if blocks is None:
        raise ConfigError(
            f"run.compile is True, and {type(model).__name__} has no visual_encoder.blocks."
        )
    # Blocks share their code, and each is compiled by itself: with averages swapped in, for
    # training and for evaluation, and again for an incomplete last batch.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 8 * len(blocks))
    for block in blocks:
        block.compile(backend=COMPILE_BACKEND)


def check_splits(run_cfg, task: BaseTask, datasets: dict[str, dict[str, Any]]) -> None:
    """See that a run's splits exist, and that those of validation can be measured.

    Raises:
        ConfigError: naming the split and what to set.
    """
    available = sorted({split for splits in datasets.values() for split in splits})
    for kind in ("test_splits",) if run_cfg.evaluate else SPLIT_KINDS:
        for split in run_cfg[kind]:
            if split not in available:
                raise ConfigError(
                    f"run.{kind} names '{split}', and the datasets have "
                    f"{', '.join(available)}.{nearest(split, available)}"
                )
    if run_cfg.evaluate:
        return
    if not run_cfg.train_splits:
        raise ConfigError("run.train_splits is empty, and run.evaluate is not True.")
    valid_splits = run_cfg.valid_splits
    unmeasured = ()
    if type(task) is VQATask:  # LAVIS's own
        unmeasured = [split for split in valid_splits if split not in task.ques_files]
    elif not getattr(task, "report_metric", True):
        unmeasured = valid_splits
    if unmeasured:
        raise ConfigError(
            f"run.valid_splits names '{unmeasured[0]}', of which run.task measures nothing (its "
            "annotations have no question and annotation file in COCO's layout, or "
            "run.report_metric is False), so it cannot pick the best epoch. Set "
            "run.valid_splits=[]."
        )
