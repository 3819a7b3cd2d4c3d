"""A pass over the training split, from its start or from where a saved run stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_world_size, is_main_process
from lavis.datasets.data_utils import apply_to_sample
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lavis_uniadapter.datasets.loading import Batch
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.runners.signals import Interrupted
from lavis_uniadapter.runners.updates import Updates, take_step

if TYPE_CHECKING:
    from lavis_uniadapter.runners.runner import RunnerUniAdapter


class AnotherRankFailed(RuntimeError):
    """This rank stops because another one has to; that one reports why."""


class Vote(IntEnum):
    """What a rank wants all of them to do; the largest vote decides."""

    CONTINUE = 0
    STOP = 1
    FAIL = 2


@dataclass
class EpochProgress:
    """How far this rank is in an epoch; part of the saved state.

    Attributes:
        epoch: counted from 0.
        step: batches done.
        sums, counts: of each finite loss.
        seconds: spent on the epoch, earlier processes included.
        unreadable: items that were replaced by others.
        skipped: steps that were not taken.
        skipped_in_a_row: of them, since the last one taken; carried over to the next epoch.
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
        """Count a batch's losses where they are finite."""
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
        means = (both[0] / both[1]).tolist()  # NaN where no loss was finite
        return dict(zip(self.sums, means, strict=True))


class TrainingEpoch:
    """An epoch, or the rest of one.

    Args:
        runner: with the model, the loader, the optimizer and the settings.
        progress: where to begin; updated as the epoch advances.
    """

    def __init__(self, runner: RunnerUniAdapter, progress: EpochProgress):
        self._runner = runner
        self._progress = progress
        self._loader = runner.train_loader
        run = runner.config.run_cfg
        self._updates = Updates(
            partial(take_step, runner.optimizer, runner.scaler, run.max_grad_norm),
            partial(runner.faults.skipped_step, self._loader.dataset),
            run.max_skipped_steps,
        )
        self._saved_at = progress.step
        self._started = time.perf_counter() - progress.seconds
        # of the batches whose gradients are accumulated
        self._loss = torch.zeros((), device=runner.device)
        self._indices: list[int] = []

    def run(self) -> dict[str, float]:
        """Train; returns the epoch's line of ``log.txt``.

        Raises:
            FloatingPointError, DatasetError, Interrupted: see ``RunnerUniAdapter.train``.
            AnotherRankFailed: if another rank raised a DatasetError.
        """
        runner, progress = self._runner, self._progress
        runner.model.train()
        self._loader.start(progress.epoch, progress.step)
        steps = len(self._loader)
        batches = iter(self._loader)
        bar = tqdm(
            desc=f"epoch {progress.epoch + 1}/{runner.max_epoch}",
            total=steps,
            initial=progress.step,
            disable=not is_main_process(),
            leave=False,
            mininterval=0.5,
        )
        with bar:
            for step in range(progress.step, steps):
                self._train_batch(step, batches)
                bar.update()
                if step % runner.log_freq == 0 or step + 1 == steps:
                    counts, sums = progress.counts, progress.sums
                    bar.set_postfix({k: f"{float(v / counts[k]):.3f}" for k, v in sums.items()})
        self._updates.settle(progress)
        self._note_time()
        return self._statistics()

    def _train_batch(self, step: int, batches: Iterator[Batch]) -> None:
        runner, progress = self._runner, self._progress
        steps, accumulate = len(self._loader), runner.accum_grad_iters
        # The last batches of an epoch may be fewer than those that are usually accumulated.
        first = step - step % accumulate
        window = min(accumulate, steps - first)
        updates = step + 1 == first + window
        self._note_time()
        batch = self._next_batch(batches, may_save=step == first)
        self._indices += batch.indices
        samples = apply_to_sample(lambda x: x.to(runner.device, non_blocking=True), batch.samples)
        samples.update(epoch=progress.epoch, iters=step, num_iters_per_epoch=steps)
        runner.lr_scheduler.step(cur_epoch=progress.epoch, cur_step=step)
        synchronised = updates or not isinstance(runner.model, DistributedDataParallel)
        with contextlib.nullcontext() if synchronised else runner.model.no_sync():
            losses = runner.losses(samples)
            loss = losses["loss"] / window
            (runner.scaler.scale(loss) if runner.scaler else loss).backward()
        self._loss = self._loss + loss.detach()
        progress.add(losses)
        progress.step = step + 1
        if updates:
            self._updates.take(progress, self._loss, losses, self._indices)
            self._loss, self._indices = torch.zeros_like(self._loss), []
            self._note_time()
            self._save_now_and_then()

    def _note_time(self) -> None:
        self._progress.seconds = time.perf_counter() - self._started

    def _next_batch(self, batches: Iterator[Batch], may_save: bool) -> Batch:
        """The next batch, unless some rank has to stop or cannot read its own: then all stop."""
        runner, batch, failure, vote = self._runner, None, None, Vote.CONTINUE
        try:
            batch = next(batches)
            self._count_unreadable(batch)
        except DatasetError as error:
            # a signal to the whole process group may have ended the data workers first
            interrupted = runner.watch.requested_within(1.0)
            failure, vote = (None, Vote.STOP) if interrupted else (error, Vote.FAIL)
        if vote is Vote.CONTINUE and runner.watch.requested and may_save:
            vote = Vote.STOP
        verdict = runner.votes.largest(vote)
        if verdict == Vote.CONTINUE:
            return batch
        if may_save:
            self._updates.settle(self._progress)
            runner.save_latest(self._progress)
        if failure is not None:
            raise failure
        if verdict == Vote.FAIL:
            raise AnotherRankFailed("Another rank cannot read its data.")
        raise Interrupted(runner.watch.requested or "a signal to another rank")

    def _count_unreadable(self, batch: Batch) -> None:
        runner, progress = self._runner, self._progress
        runner.faults.unreadable(batch.unreadable, progress.epoch, progress.step)
        number = progress.unreadable + len(batch.unreadable)
        threshold = runner.config.run_cfg.unreadable_threshold
        items = len(self._loader) * self._loader.batch_size
        if batch.unreadable and number > threshold * items:
            last = batch.unreadable[-1]
            raise DatasetError(
                f"{number} of the {items} items of this epoch could not be read, more than "
                f"run.unreadable_threshold {threshold:g} allows; the last: '{last.file}' "
                f"({last.reason}). All are listed in {runner.output_dir}. Is the disk mounted? "
                "uniadapter prepare check checks a folder."
            )
        progress.unreadable = number

    def _save_now_and_then(self) -> None:
        frequency, progress = self._runner.config.run_cfg.checkpoint_freq, self._progress
        due = frequency and progress.step - self._saved_at >= frequency
        if not due or progress.step == len(self._loader):
            return
        self._updates.settle(progress)
        if progress.skipped_in_a_row:
            return  # the weights may be the cause; the states on disk are better
        self._saved_at = progress.step
        self._runner.save_latest(progress)

    def _statistics(self) -> dict[str, float]:
        progress = self._progress
        faults = torch.tensor([progress.unreadable, progress.skipped], device=self._runner.device)
        dist.all_reduce(faults)
        unreadable, skipped = faults.tolist()
        return {
            **progress.means(),
            "lr": self._runner.optimizer.param_groups[0]["lr"],
            "seconds": progress.seconds,
            "unreadable": unreadable,
            "skipped_steps": skipped // get_world_size(),
        }
