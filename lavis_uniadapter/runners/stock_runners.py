"""LAVIS's own runners, ``runner_base`` and ``runner_iter``, in runs of this package.

They run unchanged. They need settings that LAVIS's ``train.py`` makes, ignore settings that they do
not know, and do not return what they measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lavis.common.dist_utils import get_rank, is_main_process
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from omegaconf import DictConfig

from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.schema.run import OURS
from lavis_uniadapter.runners.run_checkpoints import BEST

TO_TEST = "To test it: uniadapter evaluate RECIPE run.resume_ckpt_path"
DEVICE = "cuda"  # to which LAVIS's PrefetchLoader moves batches, whatever run.device says


def is_stock(run: Mapping[str, Any]) -> bool:
    """Whether a ``run:`` section asks for one of LAVIS's runners, which is LAVIS's default."""
    return run.get("runner", "runner_base") != OURS


def prepare(run: DictConfig) -> None:
    """Set what LAVIS's ``train.py`` sets, once the process group exists."""
    if run.device != DEVICE:
        raise ConfigError(
            f"run.runner is {run.runner}, whose loader needs CUDA, and run.device is {run.device}. "
            f"Set run.runner: {OURS}."
        )
    run.rank = get_rank()
    run.gpu = int(os.environ.get("LOCAL_RANK", "0"))
    # A relative folder would be below the installed LAVIS.
    run.output_dir = str(Path.cwd() / run.output_dir)
    for name in ("output_dir", "result_dir"):  # which LAVIS registers once in a process
        registry.mapping["paths"].pop(name, None)


def returning_metrics(runner_cls: type[RunnerBase]) -> type[RunnerBase]:
    """One of LAVIS's runners, whose ``train`` returns the metrics as ours does.

    It raises CheckpointError where LAVIS's has no epoch to test and fails with a traceback.
    """

    class Returning(runner_cls):
        def train(self):
            super().train()
            return self._metrics

        def evaluate(self, *args, **kwargs):
            logs = super().evaluate(*args, **kwargs) or {}
            measured = {split: log for split, log in logs.items() if log is not None}
            self._metrics = measured if is_main_process() else None
            return self._metrics

        def _load_checkpoint(self, path):
            super()._load_checkpoint(path)
            if self.start_epoch >= self.max_epoch and not self.valid_splits:
                raise CheckpointError(f"'{path}' is of the last epoch. {TO_TEST}={path}")

        def _reload_best_model(self, model):
            if not (self.output_dir / BEST).is_file():
                path = self.output_dir / f"checkpoint_{self.max_epoch - 1}.pth"
                self._save_checkpoint(self.max_epoch - 1)
                dist.barrier()  # a rank that fails ends the others
                raise CheckpointError(
                    f"'{self.output_dir}' has no {BEST}: LAVIS keeps an epoch only if agg_metrics "
                    f"of 'val' is above 0. The last epoch is kept. {TO_TEST}={path}"
                )
            return super()._reload_best_model(model)

    return Returning
