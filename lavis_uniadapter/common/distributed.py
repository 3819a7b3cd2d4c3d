"""Process groups: one process or many, on CPU (gloo) or CUDA (NCCL).

LAVIS's ``init_distributed_mode`` supports NCCL alone, and parts of LAVIS call collectives even in
one process. So there is always a group here, of size 1 if need be.
"""

from __future__ import annotations

import datetime
import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process

from lavis_uniadapter.common.errors import ConfigError

# How long ranks wait for each other in a collective, and while the main process works for all of
# them (it may download weights or open every file).
TIMEOUT = datetime.timedelta(minutes=30)
MAIN_PROCESS_TIMEOUT = datetime.timedelta(hours=24)
T = TypeVar("T")

_patient_group: dist.ProcessGroup | None = None  # None: the default group


def choose_device(requested: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where it is available.

    Raises:
        ConfigError: for CUDA where there is none.
    """
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError("run.device is cuda, and PyTorch finds no CUDA device. Set it to auto.")
    return "cuda" if requested != "cpu" and available else "cpu"


def init_process_group(device: str) -> None:
    """Join torchrun's group, or make one of size 1. Does nothing where there is one."""
    global _patient_group
    if dist.is_initialized():
        return
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=TIMEOUT)
        _patient_group = dist.new_group(backend="gloo", timeout=MAIN_PROCESS_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def destroy_process_group() -> None:
    """Leave the group and end its threads.

    A distributed model holds the group in a reference cycle. Without the collection, gloo's threads
    could outlive the object that joins them, which aborts the interpreter at its exit.
    """
    global _patient_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _patient_group = None
        gc.collect()


def on_main_process(do: Callable[..., T], *args: Any, errors: tuple[type[Exception], ...]) -> T:
    """Call a function on the main process; every rank gets its result, or its error.

    Other ranks wait for up to `MAIN_PROCESS_TIMEOUT`. Without a group, this process calls it.

    Args:
        errors: kinds of errors that every rank raises; others end the main process alone.
    """
    if not dist.is_initialized():
        return do(*args)
    outcome: list[Any] = [None, None]  # the result and the error
    if is_main_process():
        try:
            outcome[0] = do(*args)
        except errors as raised:
            outcome[1] = raised
    dist.broadcast_object_list(outcome, src=0, group=_patient_group)
    result, error = outcome
    if error is not None:
        raise error
    return result


class Votes:
    """The largest of the ranks' numbers, exchanged between CPUs so that nothing waits for a GPU."""

    def __init__(self) -> None:
        self._alone = get_world_size() == 1
        on_cpu = dist.is_initialized() and dist.get_backend() == "gloo"
        needs_group = not self._alone and not on_cpu
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT) if needs_group else None

    def largest(self, number: int) -> int:
        """Every rank must call it."""
        if self._alone:
            return number
        vote = torch.tensor(number)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        return int(vote)


def gather_to_main(value: T) -> list[T] | None:
    """Every rank's value, by rank, on the main process; None on the others."""
    values = gather(value)
    return values if get_rank() == 0 else None


def gather(value: T) -> list[T]:
    """Every rank's value, by rank, on every rank."""
    if get_world_size() == 1:
        return [value]
    values: list = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values
