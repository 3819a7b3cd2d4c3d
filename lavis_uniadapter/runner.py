"""The runner: LAVIS's ``runner_base``, on CPU and CUDA, in one process or several."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
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
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset
from tqdm import tqdm

from lavis_uniadapter import lavis_versions
from lavis_uniadapter.checkpoint import describe_mismatch
from lavis_uniadapter.config import AMP_DTYPES
from lavis_uniadapter.errors import CheckpointError, ConfigError, nearest

logger = logging.getLogger(__name__)

BEST = "checkpoint_best.pth"
LATEST = "checkpoint_latest.pth"
BEST_ADAPTER = "adapter_best"
LATEST_ADAPTER = "adapter_latest"
COMPILE_BACKEND = "inductor"
SPLIT_KINDS = ("train_splits", "valid_splits", "test_splits")


@registry.register_runner("runner_uniadapter")
class RunnerUniAdapter(RunnerBase):
    """Train, validate each epoch, keep the best, test it (``lavis.runners.RunnerBase``).

    Beyond LAVIS's: CPU and gloo, output under the current folder, a progress bar, the loss divided
    over accumulated batches, ``amp: bf16 | fp16 | null``, atomic checkpoints from which training
    goes on as if it had not stopped, and the best epoch chosen by ``agg_metrics`` of any sign.
    """

    def __init__(self, cfg, task, model, datasets, job_id):
        super().__init__(cfg, task, model, datasets, job_id)
        # The selection metric's value as it is, and as agg_metrics, of which more is better.
        self.best_value: float | None = None
        self.best_metric = float("-inf")
        self.best_epoch: int | None = None
        check_splits(cfg.run_cfg, task, datasets)
        amp = cfg.run_cfg.get("amp") or None
        # LAVIS's True is fp16.
        self.amp = "fp16" if amp is True else amp

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
            if self.config.run_cfg.get("compile", False):
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
        """AdamW over what trains; weight decay on matrices alone, as in LAVIS."""
        if self._optimizer is None:
            run = self.config.run_cfg
            trained = [
                p for p in self.unwrap_dist_model(self.model).parameters() if p.requires_grad
            ]
            self._optimizer = torch.optim.AdamW(
                [
                    {
                        "params": [p for p in trained if p.ndim >= 2],
                        "weight_decay": float(run.weight_decay),
                    },
                    {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
                ],
                lr=float(run.init_lr),
                betas=(0.9, float(run.get("beta2", 0.999))),
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
    ) -> list[DataLoader]:
        """One DataLoader a split; samplers are sharded over ranks and seeded by epoch."""
        loaders = []
        for dataset, batch_size, is_train, collate_fn in zip(
            datasets, batch_sizes, is_trains, collate_fns, strict=True
        ):
            if isinstance(dataset, list | tuple | IterableDataset):
                raise ConfigError("runner_uniadapter reads map-style datasets. Use runner_base.")
            sharded = is_train or self.use_dist_eval_sampler
            sampler = DistributedSampler(
                dataset,
                num_replicas=get_world_size() if sharded else 1,
                rank=get_rank() if sharded else 0,
                shuffle=is_train,
                seed=int(self.config.run_cfg.seed),
                drop_last=is_train,
            )
            if is_train and len(sampler) < batch_size:
                raise ConfigError(
                    f"The training split gives each process {len(sampler)} items, fewer than "
                    f"run.batch_size_train {batch_size}. Make the batch smaller."
                )
            loaders.append(
                DataLoader(
                    dataset,
                    batch_size=batch_size,
                    sampler=sampler,
                    num_workers=num_workers,
                    collate_fn=collate_fn,
                    drop_last=is_train,
                    pin_memory=self.cuda_enabled,
                )
            )
        return loaders

    # --- training -------------------------------------------------------------------------------

    def train(self) -> dict[str, dict[str, float]] | None:
        """Train and test; returns the metrics of the test splits (main process)."""
        self._start_log()
        if self.resume_ckpt_path is not None:
            self._load_checkpoint(self.resume_ckpt_path)
        for epoch in range(self.start_epoch, self.max_epoch):
            started = time.perf_counter()
            stats = self.train_epoch(epoch)
            self.log_stats({**stats, "epoch": epoch}, "train")
            first_log = None
            for split in self.valid_splits:
                val_log = self.eval_epoch(split_name=split, cur_epoch=epoch)
                if val_log is not None:
                    first_log = first_log or val_log
                    self.log_stats({**val_log, "epoch": epoch}, split)
            is_best = first_log is not None and first_log["agg_metrics"] > self.best_metric
            if is_best:
                self.best_metric, self.best_epoch = first_log["agg_metrics"], epoch
                self.best_value = first_log[self._metric_name]
            self._save_checkpoint(epoch, is_best=is_best)
            self._announce_epoch(epoch, stats, first_log, is_best, time.perf_counter() - started)
            dist.barrier()
        tested = "best" if self.valid_splits else self.max_epoch - 1
        results = self.evaluate(cur_epoch=tested, skip_reload=not self.valid_splits)
        if results and self._has_adapter():
            # the adapter that was tested, with what the test gave
            name = BEST_ADAPTER if self.valid_splits else LATEST_ADAPTER
            epoch = self.best_epoch if self.valid_splits else tested
            self._save_adapter(name, epoch, results)
        return results

    def evaluate(self, cur_epoch="best", skip_reload=False):
        if self.evaluate_only:
            self._start_log()
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
        if results is None:
            return None
        return self.task.after_evaluation(
            val_result=results, split_name=split_name, epoch=cur_epoch
        )

    def train_epoch(self, epoch: int) -> dict[str, float]:
        """One pass over the training split; returns mean losses, the rate and the seconds.

        Raises:
            FloatingPointError: if a loss is not finite.
        """
        self.model.train()
        loader = self.train_loader
        loader.sampler.set_epoch(epoch)
        steps, accumulate = len(loader), self.accum_grad_iters
        totals: dict[str, Tensor] = {}
        started = time.perf_counter()
        progress = tqdm(
            loader,
            desc=f"epoch {epoch + 1}/{self.max_epoch}",
            disable=not is_main_process(),
            leave=False,
            mininterval=0.5,
        )
        for i, samples in enumerate(progress):
            samples = apply_to_sample(lambda x: x.to(self.device, non_blocking=True), samples)
            samples.update(epoch=epoch, iters=i, num_iters_per_epoch=steps)
            self.lr_scheduler.step(cur_epoch=epoch, cur_step=i)
            # The last batches of an epoch may be fewer than those that are usually accumulated.
            first = i - i % accumulate
            window = min(accumulate, steps - first)
            updates = i + 1 == first + window
            with self._no_sync(unless=updates):
                losses = self._losses(samples)
                loss = losses["loss"] / window
                (self.scaler.scale(loss) if self.scaler else loss).backward()
            if updates:
                self._update()
            for name, value in losses.items():
                value = value.detach().float()
                totals[name] = totals[name] + value if name in totals else value
            if i % self.log_freq == 0 or i + 1 == steps:
                self._require_finite(totals, epoch, i)
                progress.set_postfix({k: f"{float(v) / (i + 1):.3f}" for k, v in totals.items()})
        means = torch.stack(list(totals.values())) / steps
        dist.all_reduce(means)
        means = (means / get_world_size()).tolist()
        return {
            **dict(zip(totals, means, strict=True)),
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": time.perf_counter() - started,
        }

    def _losses(self, samples: dict[str, Any]) -> dict[str, Tensor]:
        with self._autocast():
            return lavis_versions.losses(self.task, self.model, samples)

    def _no_sync(self, unless: bool):
        if unless or not isinstance(self.model, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _update(self) -> None:
        max_norm = self.config.run_cfg.get("max_grad_norm")
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        if max_norm is not None:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(trained, float(max_norm))
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _require_finite(self, totals: dict[str, Tensor], epoch: int, step: int) -> None:
        for name, value in totals.items():
            if not torch.isfinite(value):
                raise FloatingPointError(
                    f"'{name}' is not finite at or before step {step} of epoch {epoch}. Lower "
                    "run.init_lr, or set run.amp to null."
                )

    # --- checkpoints ----------------------------------------------------------------------------

    def _save_checkpoint(self, cur_epoch: int, is_best: bool = False) -> None:
        """Write the latest state, and the best beside it; every rank takes part."""
        rng_states: list = [None] * get_world_size()
        dist.all_gather_object(rng_states, _rng_state(self.device))
        if not is_main_process():
            return
        model = self.unwrap_dist_model(self.model)
        frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
        content = {
            "model": {k: v for k, v in model.state_dict().items() if k not in frozen},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "config": self.config.to_dict(),
            "epoch": cur_epoch,
            "best": {
                "metric": self.best_metric,
                "value": self.best_value,
                "epoch": self.best_epoch,
            },
            "rng": rng_states,
        }
        # The best one first: whoever resumes from the latest must find the best that it speaks of.
        names = {**({BEST: BEST_ADAPTER} if is_best else {}), LATEST: LATEST_ADAPTER}
        for name, adapter_name in names.items():
            _save_atomically(content, self.output_dir / name)
            if self._has_adapter():
                self._save_adapter(adapter_name, cur_epoch)

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

    def _load_checkpoint(self, url_or_filename) -> None:
        """Go on where a checkpoint stopped: weights, averages, queues, optimizer, RNG, best."""
        content = self._read_checkpoint(url_or_filename)
        theirs, ours = (
            section.get("model", {}).get("tuning")
            for section in (content.get("config") or {}, self.config.to_dict())
        )
        if theirs != ours:
            raise CheckpointError(
                f"'{url_or_filename}' is of a run with model.tuning '{theirs}', and this one has "
                f"'{ours}'. Set model.tuning: {theirs} to go on with it."
            )
        self._load_model_state(content["model"], url_or_filename)
        self.optimizer.load_state_dict(content["optimizer"])
        if self.scaler and content.get("scaler"):
            self.scaler.load_state_dict(content["scaler"])
        self.start_epoch = content["epoch"] + 1
        best = content.get("best") or {}
        self.best_metric = best.get("metric", float("-inf"))
        self.best_value = best.get("value")
        self.best_epoch = best.get("epoch")
        self._take_over_best(Path(url_or_filename).parent)
        if len(content.get("rng", [])) == get_world_size():
            _restore_rng(content["rng"][get_rank()], self.device)
        logger.info("Resumed from %s: epoch %d follows.", url_or_filename, self.start_epoch + 1)

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
        self._load_model_state(self._read_checkpoint(path)["model"], path)
        return model

    def _read_checkpoint(self, path) -> dict[str, Any]:
        if not Path(path).is_file():
            raise CheckpointError(f"No checkpoint at '{path}' (run.resume_ckpt_path).")
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
            content["model"], content["optimizer"], content["epoch"]
        except Exception as error:
            raise CheckpointError(
                f"'{path}' is not a whole checkpoint of a runner: {error}"
            ) from error
        return content

    def _load_model_state(self, state: dict[str, Tensor], source) -> None:
        model = self.unwrap_dist_model(self.model)
        if hasattr(model, "load_trained_state"):
            model.load_trained_state(state, str(source))
            return
        # One of LAVIS's own models: what it froze is not in its checkpoints.
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        own = {k: v for k, v in model.state_dict().items() if k in trained or k in state}
        if problems := describe_mismatch(own, state):
            raise CheckpointError(f"'{source}' does not fit {type(model).__name__}: {problems}.")
        model.load_state_dict(state, strict=False)

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
    def _start_log(self) -> None:
        """Note the configuration; a run that does not go on from a checkpoint starts anew."""
        if self.resume_ckpt_path is None:
            (self.output_dir / "log.txt").unlink(missing_ok=True)
        (self.output_dir / "config.json").write_text(
            json.dumps(self.config.to_dict(), indent=2) + "\n"
        )


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
        for split in run_cfg.get(kind) or ():
            if split not in available:
                raise ConfigError(
                    f"run.{kind} names '{split}', and the datasets have "
                    f"{', '.join(available)}.{nearest(split, available)}"
                )
    if run_cfg.evaluate:
        return
    if not run_cfg.get("train_splits"):
        raise ConfigError("run.train_splits is empty, and run.evaluate is not True.")
    valid_splits = run_cfg.get("valid_splits") or ()
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


def _save_atomically(content: dict[str, Any], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _rng_state(device: torch.device) -> dict[str, Any]:
    kind, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "numpy": [kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, torch.tensor(internal), gauss],
    }


def _restore_rng(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal.tolist()), gauss))
