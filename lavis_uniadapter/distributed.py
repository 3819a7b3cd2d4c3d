"""Process groups: one process or many, on CPU (gloo) or CUDA (NCCL).

LAVIS's ``init_distributed_mode`` knows NCCL alone, and parts of LAVIS call collectives even in
one process; so there is always a group here, if need be of size 1.
"""

from __future__ import annotations

import datetime
import gc
import os
from typing import TypeVar

import torch
import torch.distributed as dist

from lavis_uniadapter.errors import ConfigError

TIMEOUT = datetime.timedelta(minutes=30)
T = TypeVar("T")


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device(requested: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA where there is any.

    Raises:
        ConfigError: for another word, or CUDA where there is none.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"run.device is '{requested}'; it must be auto, cpu or cuda.")
    available = torch.cuda.is_available()
    if requested == "cuda" and not available:
        raise ConfigError("run.device is cuda, and PyTorch finds no CUDA device. Set it to auto.")
    return "cuda" if requested != "cpu" and available else "cpu"


def init_process_group(device: str) -> None:
    """Join torchrun's group, or make one of size 1. Does nothing where there is one."""
    if dist.is_initialized():
        return
    backend = "nccl" if device == "cuda" else "gloo"
    if launched_by_torchrun():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def destroy_process_group() -> None:
    """Leave the group, and end its threads.

    A distributed model holds the group in a reference cycle. Were it left to the interpreter's
    shutdown, gloo's threads could outlive the object that joins them, which aborts the process.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
        gc.collect()


def from_main_process(value: T) -> T:
    """The main process's value, on every rank; without a group, this process's own."""
    if not dist.is_initialized():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, src=0)
    return holder[0]
