"""What a run prints and logs."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from lavis.common.config import Config
from lavis.common.dist_utils import get_rank, get_world_size, is_main_process, main_process
from lavis.runners.runner_base import RunnerBase
from tqdm import tqdm

from lavis_uniadapter.runners import precision

logger = logging.getLogger("lavis_uniadapter")


class _TqdmHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def log_to_console() -> None:
    """Print this package's messages on the main process; LAVIS's go to the log file."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    handler = _TqdmHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.setLevel(logging.INFO if int(os.environ.get("RANK", "0")) == 0 else logging.ERROR)
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    # LAVIS calls logging.info, which would otherwise give the root logger a console handler
    logging.getLogger().addHandler(logging.NullHandler())
    logging.raiseExceptions = False  # a full disk is reported once, by what has to be saved


@contextlib.contextmanager
def logged_to_file(folder: Path) -> Iterator[None]:
    """Log all messages of LAVIS and this package to ``run.log`` (``run.rankN.log``)."""
    root = logging.getLogger()
    name = "run.log" if is_main_process() else f"run.rank{get_rank()}.log"
    handler = logging.FileHandler(folder / name, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s [%(levelname)s] %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


@main_process
def describe_start(runner: RunnerBase, config: Config) -> None:
    """Log where a run goes, and what it computes with."""
    model, run = runner._model, config.run_cfg
    logger.info("run folder %s", runner.output_dir)
    if not run.evaluate:
        world = get_world_size()
        batch = run.batch_size_train * world * run.accum_grad_iters
        queue = getattr(model, "queue_size", "none")
        where = f"{run.device}, {world} process(es)"
        logger.info("%s, global batch %d, queue %s", where, batch, queue)
    logger.info("precision %s", precision.describe(run))
    if hasattr(model, "base_name"):  # this package's own
        logger.info("base checkpoint: %s (%s)", model.base_name, model.base_fingerprint[:8])
        if config.model_cfg.get("adapter_ckpt"):
            logger.info("adapter: %s", config.model_cfg.adapter_ckpt)
        if model.randomly_initialised:
            logger.info("randomly initialised: %s", ", ".join(model.randomly_initialised))
        for line in model.adapter_summary().splitlines():
            logger.info("%s", line)


def metrics_table(metrics: dict[str, dict[str, float]]) -> str:
    """The metrics of each split, a line each; for retrieval a line per direction."""
    lines = []
    for split, values in metrics.items():
        rows: dict[str, list[str]] = {}
        for name, value in values.items():
            if name != "agg_metrics" or len(values) == 1:
                direction = name[:3] if re.match("[tvi]2[tvi]_", name) else ""
                metric = name[4:] if direction else name
                rows.setdefault(direction, []).append(f"{metric} {value:.2f}")
        if not rows:
            lines.append(f"{split}: not measured; the predictions are in the folder result")
        lines += [f"{split} {row}".strip() + f": {'  '.join(rows[row])}" for row in rows]
    return "\n".join(lines)
