"""Process groups: one process or many, on CPU (gloo) or CUDA (NCCL).

LAVIS's ``init_distributed_mode`` knows NCCL alone, and parts of LAVIS call collectives even in
one process; so there is always a group here, if need be of size 1.
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

# How long ranks wait for each other: in what all of them do at once, and while the main process
# works for all (it may download weights or open every file).
TIMEOUT = datetime.timedelta(minutes=30)
PATIENCE = datetime.timedelta(hours=24)
T = TypeVar("T")

_patient_group: dist.ProcessGroup | None = None  # None: the default group


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device(requested: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where there is any.

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
    if launched_by_torchrun():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=TIMEOUT)
        _patient_group = dist.new_group(backend="gloo", timeout=PATIENCE)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def destroy_process_group() -> None:
    """Leave the group, and end its threads.

    A distributed model holds the group in a reference cycle. Were it left to the interpreter's
    shutdown, gloo's threads could outlive the object that joins them, which aborts the process.
    """
    global _patient_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _patient_group = None
        gc.collect()


def from_main_process(value: T) -> T:
    """The main process's value, on every rank; without a group, this process's own.

    Ranks wait up to ``PATIENCE`` for the main process. If that ends, they notice at once.
    """
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0, group=_patient_group)
    return holder[0]


def on_main_process(do: Callable[..., T], *args: Any, errors: tuple[type[Exception], ...]) -> T:
    """Do something once for all ranks: its result, or its error, reaches every one of them.

    Args:
        errors: kinds that all ranks raise; another kind ends the main process alone.
    """
    result = error = None
    if not dist.is_initialized() or is_main_process():
        try:
            result = do(*args)
        except errors as raised:
            error = raised
    result, error = from_main_process((result, error))
    if error is not None:
        raise error
    return result


class Votes:
    """Numbers that ranks give, of which every one learns the largest; between CPUs alone.

    Cheap enough for every training step: nothing waits for a GPU.
    """

    def __init__(self) -> None:
        alone = get_world_size() == 1
        on_cpu = dist.is_initialized() and dist.get_backend() == "gloo"
        self._alone = alone
        self._group = None if alone or on_cpu else dist.new_group(backend="gloo", timeout=TIMEOUT)

    def largest(self, number: int) -> int:
        if self._alone:
            return number
        vote = torch.tensor(number)
        dist.all_reduce(vote, dist.ReduceOp.MAX, group=self._group)
        return int(vote)


def gather_to_main(value: T) -> list[T] | None:
    """Every rank's value, by rank, on the main process; None on the others."""
    if get_world_size() == 1:
        return [value]
    values: list = [None] * get_world_size()
    dist.all_gather_object(values, value)
    return values if get_rank() == 0 else None
