"""Stand-ins for what LAVIS's runner has on CUDA alone, so that it runs on a CPU."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import torch
from lavis.common import logger
from lavis.datasets.datasets import dataloader_utils
from lavis.models.base_model import BaseModel
from lavis.runners import runner_base
from torch.nn.parallel import DistributedDataParallel

from lavis_uniadapter.runners import stock_runners


class _Torch:
    """``torch``, whose CUDA stream does nothing and whose new tensors are on the CPU."""

    _stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda = SimpleNamespace(
        Stream=lambda: _Torch._stream,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=lambda: _Torch._stream,
        is_available=lambda: False,
    )

    @staticmethod
    def tensor(*args, device=None, **kwargs):
        return torch.tensor(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(torch, name)


def _on_cpu(module, device_ids):
    assert device_ids == [int(os.environ["LOCAL_RANK"])]
    return DistributedDataParallel(module)


def stand_in_for_cuda(replace=setattr) -> None:
    """Replace the CUDA stream of ``PrefetchLoader``, DDP's ``device_ids`` and CUDA devices.

    These are the device that this package checks for, that of the loss log's tensors and, as
    ``RunnerBase`` wraps a model only when it moves it to another device, that of the model.

    Args:
        replace: sets an attribute, as ``monkeypatch.setattr`` does.
    """
    replace(stock_runners, "DEVICE", "cpu")
    replace(dataloader_utils, "torch", _Torch())
    replace(dataloader_utils, "move_to_cuda", lambda sample: sample)
    replace(dataloader_utils, "record_cuda_stream", lambda batch: None)
    replace(runner_base, "DDP", _on_cpu)
    replace(logger, "torch", _Torch())
    replace(BaseModel, "device", property(lambda model: torch.device("cpu:0")))


def stand_in_for_nccl() -> None:
    """Let LAVIS's ``init_distributed_mode`` make a gloo group, and choose no GPU."""
    init = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend, **options: init("gloo", **options)
    torch.cuda.set_device = lambda gpu: None
