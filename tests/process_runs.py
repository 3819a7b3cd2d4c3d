"""Runs of ``runner_uniadapter`` in several processes, for tests/runners/test_processes.py.

python tests/process_runs.py FOLDER
"""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from tiny_runs import TRAIN, options_of

from lavis_uniadapter.common import distributed
from lavis_uniadapter.common.signals import EXIT_INTERRUPTED
from lavis_uniadapter.runners.run_checkpoints import LATEST
from lavis_uniadapter.runners.runner import RunnerUniAdapter
from uniadapter_cli.main import main as uniadapter

CONFIG = str(TRAIN / "shapes_retrieval.yaml")
LONGER = (
    *("run.max_epoch=2", "run.batch_size_train=1", "run.num_workers=1", "run.accum_grad_iters=2"),
    *("run.checkpoint_freq=0", "run.valid_splits=[]", "run.test_splits=[]"),
    *("model.adapter.dropout=0.1", "datasets.shapes_retrieval.generate.num_train=5"),
)


def command(name: str, *options: str) -> None:
    """Run a command; a rank of several that fails ends in it."""
    if uniadapter([name, CONFIG, *options]):
        raise RuntimeError("the run failed")


def train_and_list_threads(*options: str) -> None:
    """Train, then write which of gloo's threads are left.

    The interpreter's shutdown aborts now and then if there are any.
    """
    command("train", *options)
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    left = [name for name in names if "gloo" in name]
    Path(f"left{os.environ['RANK']}.txt").write_text(str(left))


def train_and_signal(*options: str) -> None:
    """Train; the last rank gets a SIGTERM at its third step."""
    losses, steps = RunnerUniAdapter.losses, []

    def losses_and_signal(runner, samples):
        steps.append(None)
        if len(steps) == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return losses(runner, samples)

    RunnerUniAdapter.losses = losses_and_signal
    command("train", *options)


def wait_for_the_main_process() -> None:
    """The main process works alone for longer than ranks wait for each other."""
    distributed.TIMEOUT = datetime.timedelta(seconds=1)
    distributed.init_process_group("cpu")

    def work() -> str:
        time.sleep(3)
        return "the work is done"

    found = distributed.on_main_process(work, errors=())
    total = torch.ones(())
    dist.all_reduce(total)  # the default group still works
    print(f"{found}, {int(total)} ranks")
    distributed.destroy_process_group()


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # nothing but this thread, when processes are forked
    tiny = options_of("shapes_retrieval", folder / "cache")
    for number, shards in ((2, False), (3, True)):
        job_id = f"run.job_id={number}"
        options = (*tiny, f"run.use_dist_eval_sampler={shards}", job_id)
        in_ranks(number, lambda: command("evaluate", *options), folder)  # noqa: B023
    there, options = folder / "resumed", (*options_of("shapes_retrieval", folder / "own"), *LONGER)
    whole, stopped = ((*options, f"run.job_id={name}") for name in ("whole", "stopped"))
    in_ranks(2, lambda: train_and_list_threads(*whole), there)
    in_ranks(2, lambda: train_and_signal(*stopped), there, ends_with=EXIT_INTERRUPTED)
    run = there / "output/shapes_retrieval/stopped"
    shutil.copy(run / LATEST, there / "stopped.pth")
    in_ranks(2, lambda: command("train", *stopped, "run.resume=auto"), there)
    in_ranks(2, wait_for_the_main_process, folder / "waiting")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
