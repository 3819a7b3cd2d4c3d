"""A pass over the training split, from its start or from where a saved run stopped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from lavis.common.dist_utils import is_main_process
from lavis.datasets.data_utils import apply_to_sample
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lavis_uniadapter.common.distributed import gather, largest
from lavis_uniadapter.common.host_copy import HostCopy
from lavis_uniadapter.common.signals import Interrupted
from lavis_uniadapter.datasets.loading import Batch
from lavis_uniadapter.datasets.reading import describe_item
from lavis_uniadapter.datasets.records import DatasetError
from lavis_uniadapter.runners.faults import SKIPPED_STEPS, UNREADABLE

if TYPE_CHECKING:
    from lavis_uniadapter.runners.runner import RunnerUniAdapter


_Losses = list[dict[str, Tensor]]  # of batches, by name


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
        step: batches done.
        losses: by name, (2,): the sum over the batches of the steps taken, and their number.
        seconds: spent on the epoch, earlier processes included.
        unreadable: items that were replaced by others.
        skipped: steps that were not taken.
        skipped_in_a_row: of them, since the last one taken; carried over to the next epoch.
    """

    epoch: int
    step: int = 0
    losses: dict[str, Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    unreadable: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def add(self, losses: Mapping[str, Tensor]) -> None:
        """Count the losses of a batch whose step was taken."""
        for name, value in losses.items():
            counted = torch.stack([value, torch.ones_like(value)])
            self.losses[name] = self.losses[name] + counted if name in self.losses else counted

    def means(self) -> dict[str, float]:
        """Mean losses of all ranks so far, none if no step was taken; every rank must call it."""
        if not self.losses:
            return {}
        sums = torch.stack(list(self.losses.values()))
        dist.all_reduce(sums)
        return dict(zip(self.losses, (sums[:, 0] / sums[:, 1]).tolist(), strict=True))


def take_step(
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    max_norm: float | None,
    loss: Tensor,
) -> HostCopy:
    """Take an optimizer step, unless the loss or the gradient is not finite on some rank.

    The device decides, and the host does not wait for it.

    Args:
        optimizer: a fused AdamW, which changes nothing where its ``found_inf`` is 1.
        max_norm: to which the gradient is clipped; None: not at all.
        loss: sum of the losses of the step's batches, not scaled.

    Returns:
        Three numbers, the same on all ranks: whether the gradient is finite, whether the loss is,
        and the scale (1 without a scaler).
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scale = torch.ones_like(loss)
    if scaler is not None:
        scaler.unscale_(optimizer)
        scale = scaler.scale(scale)
    if max_norm:
        norm = torch.nn.utils.clip_grad_norm_(trained, max_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
    found = torch.stack([torch.isfinite(norm), torch.isfinite(loss), scale]).float()
    dist.all_reduce(found, dist.ReduceOp.MIN)
    optimizer.found_inf = 1 - found[0] * found[1]  # type: ignore[attr-defined]
    optimizer.step()
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return HostCopy(found)


class TrainingEpoch:
    """An epoch, or the rest of one; updates ``progress`` as it advances."""

    def __init__(self, runner: RunnerUniAdapter, progress: EpochProgress):
        self._runner = runner
        self._run_cfg = runner.config.run_cfg
        self._progress = progress
        self._loader = runner.train_loader
        self._saved_at = progress.step
        self._started = time.perf_counter() - progress.seconds
        # A step that the device may not have finished: what `take_step` returned, the number of
        # its last batch, and the losses and indices of its batches.
        self._pending: tuple[HostCopy, int, _Losses, Sequence[int]] | None = None
        # of the batches whose gradients are accumulated
        self._loss = torch.zeros((), device=runner.device)
        self._losses: _Losses = []
        self._indices: list[int] = []

    def run(self) -> dict[str, float]:
        """Train; returns the epoch's line of ``log.txt``. Raises as ``RunnerUniAdapter.train``."""
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
                    bar.set_postfix({k: f"{v[0] / v[1]:.3f}" for k, v in progress.losses.items()})
        self._settle()
        return {
            **progress.means(),
            "lr": runner.optimizer.param_groups[0]["lr"],
            "seconds": progress.seconds,
            "unreadable": sum(gather(progress.unreadable)),
            "skipped_steps": progress.skipped,
        }

    def _train_batch(self, step: int, batches: Iterator[Batch]) -> None:
        runner, progress = self._runner, self._progress
        steps, accumulate = len(self._loader), runner.accum_grad_iters
        # The last batches of an epoch may be fewer than those that are usually accumulated.
        first = step - step % accumulate
        window = min(accumulate, steps - first)
        updates = step + 1 == first + window
        batch = self._next_batch(batches, may_save=step == first)
        progress.unreadable += len(batch.unreadable)
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
        self._losses.append({name: value.detach().float() for name, value in losses.items()})
        progress.step = step + 1
        runner.watch.deferred = not updates
        if updates:
            max_norm = self._run_cfg.max_grad_norm
            found = take_step(runner.optimizer, runner.scaler, max_norm, self._loss)
            self._settle()  # the step before, which the device has finished by now
            self._pending = (found, step, self._losses, self._indices)
            self._loss, self._losses, self._indices = torch.zeros_like(self._loss), [], []
        progress.seconds = time.perf_counter() - self._started
        frequency = self._run_cfg.checkpoint_freq
        if updates and progress.step < steps and 0 < frequency <= progress.step - self._saved_at:
            self._save()

    def _next_batch(self, batches: Iterator[Batch], may_save: bool) -> Batch:
        """The next batch, unless some rank has to stop or cannot read its own: then all stop."""
        vote, watch = Vote.CONTINUE, self._runner.watch
        failure: DatasetError | None = None
        try:
            batch = next(batches)
            self._log_unreadable(batch)
        except Interrupted:
            vote = Vote.STOP
        except DatasetError as error:
            failure = error
            vote = Vote.STOP if watch.requested_within(1.0) else Vote.FAIL
        verdict = largest(vote)
        if verdict == Vote.CONTINUE:
            return batch
        if may_save:
            self._settle()
            self._runner.save_latest(self._progress)
        if failure is not None and vote == Vote.FAIL:
            raise failure
        if verdict == Vote.FAIL:
            raise AnotherRankFailed("Another rank cannot read its data.")
        raise Interrupted(watch.requested or "a signal to another rank")

    def _log_unreadable(self, batch: Batch) -> None:
        runner, progress = self._runner, self._progress
        for fault in batch.unreadable:
            runner.faults.add(
                UNREADABLE,
                f"'{fault.file}' cannot be read and is replaced in its batch: {fault.reason}",
                epoch=progress.epoch,
                step=progress.step,
                **asdict(fault),
            )
        threshold = self._run_cfg.unreadable_threshold
        items = len(self._loader) * self._loader.batch_size
        number = progress.unreadable + len(batch.unreadable)
        if batch.unreadable and number > threshold * items:
            last = batch.unreadable[-1]
            raise DatasetError(
                f"{number} of the {items} items of this epoch could not be read, more than "
                f"run.unreadable_threshold {threshold:g} allows; the last: '{last.file}' "
                f"({last.reason}). All are listed in {runner.output_dir}. Is the disk mounted? "
                "uniadapter prepare check checks a folder."
            )

    def _save(self) -> None:
        self._settle()
        if self._progress.skipped_in_a_row == 0:  # else the weights may be the cause
            self._saved_at = self._progress.step
            self._runner.save_latest(self._progress)

    def _settle(self) -> None:
        """Count the losses of the last step, or log that it was skipped."""
        if self._pending is None:
            return
        progress = self._progress
        (found, step, losses, indices), self._pending = self._pending, None
        finite_gradient, finite_loss, scale = found.tolist()
        if finite_gradient and finite_loss:
            progress.skipped_in_a_row = 0
            for of_batch in losses:
                progress.add(of_batch)
            return
        if finite_loss and scale > 1:
            return  # the scale was too large for float16, and the scaler has lowered it
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        path = self._runner.faults.add(
            SKIPPED_STEPS,
            f"step {step} of epoch {progress.epoch + 1}: loss or gradient not finite, the step is "
            "skipped",
            epoch=progress.epoch,
            step=step,
            losses={name: str(float(value)) for name, value in losses[-1].items()},
            items=[describe_item(self._loader.dataset, index) for index in indices],
        )
        if progress.skipped_in_a_row >= self._run_cfg.max_skipped_steps:
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (run.max_skipped_steps), the last at step {step} of epoch "
                f"{progress.epoch + 1}. Their items are in {path}. Lower run.init_lr, set "
                "run.max_grad_norm, or set run.amp to null."
            )
