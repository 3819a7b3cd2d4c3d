"""LAVIS's ``train.py``, which its wheel does not have, with the line that adds this package."""

from __future__ import annotations

import argparse
import random

import lavis.runners  # noqa: F401
import lavis.tasks as tasks
import numpy as np
import torch
from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, init_distributed_mode
from lavis.common.logger import setup_logger
from lavis.common.optims import LinearWarmupCosineLRScheduler  # noqa: F401
from lavis.common.registry import registry
from lavis.common.utils import now

import lavis_uniadapter  # noqa: F401


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg-path", required=True)
    parser.add_argument("--options", nargs="+")
    job_id = now()
    cfg = Config(parser.parse_args())
    init_distributed_mode(cfg.run_cfg)
    seed = cfg.run_cfg.seed + get_rank()
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    setup_logger()
    cfg.pretty_print()
    task = tasks.setup_task(cfg)
    datasets = task.build_datasets(cfg)
    model = task.build_model(cfg)
    runner_cls = registry.get_runner_class(cfg.run_cfg.get("runner", "runner_base"))
    runner_cls(cfg=cfg, job_id=job_id, task=task, model=model, datasets=datasets).train()


if __name__ == "__main__":
    main()
