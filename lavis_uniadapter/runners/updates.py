"""Optimizer steps, of which the device leaves out those without finite numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset

from lavis_uniadapter.common.host_copy import HostCopy
from lavis_uniadapter.datasets.reading import BatchReport
from lavis_uniadapter.runners.faults import FaultLog

if TYPE_CHECKING:
    from lavis_uniadapter.runners.runner import EpochProgress


def take_step(
    optimizer: torch.optim.AdamW,
    loss: Tensor,
    scaler: torch.amp.GradScaler | None = None,
    max_norm: float | None = None,
) -> HostCopy:
    """Take an optimizer step, unless the loss or the gradient is not finite, on any rank.

    The device decides, and the host does not wait for it.

    Args:
        optimizer: a fused AdamW, which changes nothing where its ``found_inf`` is 1.
        loss: sum of the losses of the step's batches, not scaled.
        scaler: that the gradient is scaled with.
        max_norm: to which the gradient is clipped.

    Returns:
        Three numbers, the same on all ranks: whether the gradient is finite, whether the loss is,
        and the scale (1 without a scaler).
    """
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    scale = torch.ones_like(loss)
    if scaler is not None:
        scaler.unscale_(optimizer)
        scale = scaler.scale(scale)
    if max_norm is not None:
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


@dataclass(frozen=True)
class _Pending:
    """A step whose outcome the host has not looked at yet."""

    found: HostCopy
    number: int
    losses: Mapping[str, Tensor]
    reports: Sequence[BatchReport]


class Updates:
    """The optimizer steps of an epoch. Skipped ones are counted, and noted with their items.

    Args:
        optimizer, scaler, max_norm: see ``take_step``.
        faults: where skipped steps are noted.
        dataset: that the reports of batches are about.
        most_in_a_row: so many skipped steps end the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        scaler: torch.amp.GradScaler | None,
        max_norm: float | None,
        *,
        faults: FaultLog,
        dataset: Dataset,
        most_in_a_row: int,
    ):
        self._optimizer = optimizer
        self._scaler = scaler
        self._max_norm = max_norm
        self._faults = faults
        self._dataset = dataset
        self._most_in_a_row = most_in_a_row
        self._pending: _Pending | None = None

    def take(
        self,
        progress: EpochProgress,
        loss: Tensor,
        losses: Mapping[str, Tensor],
        reports: Sequence[BatchReport],
    ) -> None:
        """Take a step, and settle the one before, which the device has done by now.

        Args:
            progress: of the epoch, the step's batches included.
            loss: see ``take_step``.
            losses: of the last batch, by name.
            reports: of the step's batches.
        """
        found = take_step(self._optimizer, loss, self._scaler, self._max_norm)
        self.settle(progress)
        losses = {name: value.detach() for name, value in losses.items()}
        self._pending = _Pending(found, progress.step - 1, losses, reports)

    def settle(self, progress: EpochProgress) -> None:
        """Count and note the last step if it was skipped. Call it before progress is saved.

        Raises:
            FloatingPointError: after too many in a row, naming where their items are noted.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        finite_gradient, finite_loss, scale = step.found.tolist()
        if finite_gradient and finite_loss:
            progress.skipped_in_a_row = 0
            return
        if finite_loss and scale > 1:
            # The loss was scaled too much for float16, and the scaler has lowered its scale.
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        losses = {name: float(value) for name, value in step.losses.items()}
        path = self._faults.skipped_step(
            progress.epoch, step.number, losses, step.reports, self._dataset
        )
        if progress.skipped_in_a_row >= self._most_in_a_row:
            raise FloatingPointError(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not "
                f"finite (run.max_skipped_steps), the last at step {step.number} of epoch "
                f"{progress.epoch + 1}. Their items are in {path}. Lower run.init_lr, set "
                "run.max_grad_norm, or set run.amp to null."
            )
