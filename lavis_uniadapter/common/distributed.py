"""Process groups: one process or many, on CPU (gloo) or CUDA (NCCL).

Parts of LAVIS call collectives even in one process, so there is always a group, of size 1 if need
be. Several processes also have a gloo group, in which they exchange numbers and wait for the main
process without occupying a GPU.
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

TIMEOUT = datetime.timedelta(minutes=30)
# The main process may download weights or open every file while the others wait.
HOST_TIMEOUT = datetime.timedelta(hours=24)
T = TypeVar("T")

_host_group: Any = None  # None: the default group


def choose_device(requested: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` is CUDA where it is available."""
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError("run.device is cuda, and PyTorch finds no CUDA device. Set it to auto.")
    return "cuda" if requested != "cpu" and available else "cpu"


def gpu_memory(device: str) -> int | None:
    """Bytes of the GPU that this process computes on; None without one."""
    if device != "cuda":
        return None
    index = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.cuda.get_device_properties(index).total_memory


def init_process_group(device: str) -> None:
    """Join torchrun's group, or make one of size 1. Does nothing where there is one."""
    global _host_group
    if dist.is_initialized():
        if _host_group is None and dist.get_backend() != "gloo":  # the caller's own group
            _host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
        return
    backend = "nccl" if device == "cuda" else "gloo"
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=TIMEOUT)
        _host_group = dist.new_group(backend="gloo", timeout=HOST_TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def destroy_process_group() -> None:
    """Leave the group and end its threads."""
    global _host_group
    if dist.is_initialized():
        dist.destroy_process_group()
        _host_group = None
        # A distributed model holds the group in a reference cycle. Without the collection, gloo's
        # threads may outlive the object that joins them, which aborts the interpreter at its exit.
        gc.collect()


def on_main_process(do: Callable[..., T], *args: Any, errors: tuple[type[Exception], ...]) -> T:
    """Call a function on the main process; every rank gets its result or its error.

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
    dist.broadcast_object_list(outcome, src=0, group=_host_group)
    result, error = outcome
    if error is not None:
        raise error
    return result


def largest(number: int) -> int:
    """The largest of the ranks' numbers; every rank must call it."""
    if get_world_size() == 1:
        return number
    numbers = torch.tensor(number)
    work = dist.all_reduce(numbers, dist.ReduceOp.MAX, group=_host_group, async_op=True)
    work.wait(TIMEOUT)
    return int(numbers)


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
