"""Optimizer steps, of which the device skips those without finite numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from lavis_uniadapter.common.host_copy import HostCopy

if TYPE_CHECKING:
    from lavis_uniadapter.runners.epoch import EpochProgress


def take_step(
    optimizer: torch.optim.AdamW,
    scaler: torch.amp.GradScaler | None,
    max_norm: float,
    loss: Tensor,
) -> HostCopy:
    """Take an optimizer step, unless the loss or the gradient is not finite on some rank.

    The device decides, and the host does not wait for it.

    Args:
        optimizer: a fused AdamW, which changes nothing where its ``found_inf`` is 1.
        scaler: that the gradient is scaled with, if it is.
        max_norm: to which the gradient is clipped; 0: not at all.
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
    optimizer.found_inf = 1 - found[0] * found[1]
    optimizer.step()
    if scaler is not None:
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return HostCopy(found)


class Updates:
    """The optimizer steps of an epoch; counts skipped ones and logs them with their items.

    Args:
        step: `take_step`, given all but the loss.
        log_skipped: `FaultLog.skipped_step`, given the dataset.
        max_skipped: so many skipped steps in a row end the run.
    """

    def __init__(
        self,
        step: Callable[..., HostCopy],
        log_skipped: Callable[..., Path],
        max_skipped: int,
    ):
        self._step = step
        self._log_skipped = log_skipped
        self._max_skipped = max_skipped
        self._pending: tuple[HostCopy, int, Mapping[str, Tensor], Sequence[int]] | None = None

    def take(
        self,
        progress: EpochProgress,
        loss: Tensor,
        losses: Mapping[str, Tensor],
        indices: Sequence[int],
    ) -> None:
        """Take a step and settle the one before, which the device has finished by now.

        Args:
            progress: of the epoch, the step's batches included.
            loss: see `take_step`.
            losses: of the last batch, by name.
            indices: of the items in the step's batches.
        """
        found = self._step(loss)
        self.settle(progress)
        losses = {name: value.detach() for name, value in losses.items()}
        self._pending = (found, progress.step - 1, losses, indices)

    def settle(self, progress: EpochProgress) -> None:
        """Count and log the last step if it was skipped. Call it before progress is saved.

        Raises:
            FloatingPointError: after too many in a row, naming the file that lists their items.
        """
        if self._pending is None:
            return
        (found, step, losses, indices), self._pending = self._pending, None
        finite_gradient, finite_loss, scale = found.tolist()
        if finite_gradient and finite_loss:
            progress.skipped_in_a_row = 0
            return
        if finite_loss and scale > 1:
            return  # the scale was too large for float16, and the scaler has lowered it
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        path = self._log_skipped(progress.epoch, step, losses, indices)
        if progress.skipped_in_a_row >= self._max_skipped:
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (run.max_skipped_steps), the last at step {step} of epoch "
                f"{progress.epoch + 1}. Their items are in {path}. Lower run.init_lr, set "
                "run.max_grad_norm, or set run.amp to null."
            )
