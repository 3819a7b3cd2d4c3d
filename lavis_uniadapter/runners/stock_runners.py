"""LAVIS's own runners, ``runner_base`` and ``runner_iter``, in runs of this package.

They run unchanged. They need settings that LAVIS's ``train.py`` makes, ignore settings that they do
not know, and do not return what they measured.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lavis.common.dist_utils import get_rank, is_main_process
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from omegaconf import DictConfig

from lavis_uniadapter.common.errors import CheckpointError, ConfigError
from lavis_uniadapter.common.schema.run import OURS, unread
from lavis_uniadapter.runners.run_checkpoints import BEST
from lavis_uniadapter.runners.run_folders import BestEpoch

DEVICE = "cuda"  # to which LAVIS's PrefetchLoader moves batches, whatever run.device says


def is_stock(run: Mapping[str, Any]) -> bool:
    """Whether a ``run:`` section asks for one of LAVIS's runners, which is LAVIS's default."""
    return run.get("runner", "runner_base") != OURS


def check(run: Mapping[str, Any]) -> None:
    """Check a ``run:`` section that LAVIS's own train script has read, unchecked.

    Raises:
        ConfigError: naming the key and what to do.
    """
    if problem := unread(run, run.get("runner", "runner_base")):
        raise ConfigError(f"run.{problem}")


def prepare(run: DictConfig) -> None:
    """Set what LAVIS's ``train.py`` sets, once the process group exists; changes ``run``.

    Raises:
        ConfigError: if LAVIS's loader does not put batches on the run's device.
    """
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


def recording(runner_cls: type[RunnerBase]) -> type[RunnerBase]:
    """One of LAVIS's runners that returns what it measured.

    Its ``train`` and ``evaluate`` return the metrics by test split on the main process and None on
    the others; ``best`` describes the best checkpoint that it saved.
    """

    class Recording(runner_cls):
        best = BestEpoch()

        def train(self):
            super().train()
            return self._results

        def evaluate(self, *args, **kwargs):
            logs = super().evaluate(*args, **kwargs) or {}
            measured = {split: log for split, log in logs.items() if log is not None}
            self._results = measured if is_main_process() else None
            return self._results

        def eval_epoch(self, *args, **kwargs):
            self._log = super().eval_epoch(*args, **kwargs)
            return self._log

        def _save_checkpoint(self, epoch, is_best=False):
            super()._save_checkpoint(epoch, is_best)
            if is_best:
                self.best = BestEpoch(self._log["agg_metrics"], epoch=epoch)

        def _load_checkpoint(self, path):
            super()._load_checkpoint(path)
            if self.start_epoch >= self.max_epoch and not self.valid_splits:
                raise CheckpointError(  # LAVIS's train has no epoch to test then
                    f"'{path}' is of the last epoch (run.max_epoch {self.max_epoch}). Test it by "
                    "evaluate.py, or raise run.max_epoch."
                )

        def _reload_best_model(self, model):
            if not (self.output_dir / BEST).is_file():
                raise CheckpointError(
                    f"'{self.output_dir}' has no {BEST}: LAVIS saves an epoch only if agg_metrics "
                    "of 'val' is above 0. Set run.valid_splits=[] to save every one."
                )
            return super()._reload_best_model(model)

    return Recording
