"""Runs of LAVIS's ``runner_base`` in one and two processes: trained, killed, resumed, evaluated.

    python tests/stock_runs.py FOLDER

Once through this package's launcher, and once as LAVIS's own ``train.py`` starts them. They leave
their folders in FOLDER/launcher and FOLDER/lavis, and each process leaves its model after each
epoch, as rank<r>_epoch<e>.pt. tests/runners/test_stock_runners.py looks at both.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import lavis_train
import torch
from forked_ranks import in_ranks
from lavis.common.registry import registry
from lavis.runners.runner_base import RunnerBase
from lavis.tasks.base_task import BaseTask
from lavis_stand_ins import stand_in_for_cuda, stand_in_for_nccl
from tiny_runs import TRAIN, options_of

from lavis_uniadapter.checkpoints import blip_files
from lavis_uniadapter.common.config import load_config
from uniadapter_cli.main import main as uniadapter

CONFIG = TRAIN / "shapes_retrieval.yaml"
OPTIONS = (
    *("run.runner=runner_base", "run.batch_size_train=2", "run.k_test=20"),
    "datasets.shapes_retrieval.generate.num_test=20",
)
EPOCH = 3  # steps: 12 captions on two processes


def in_processes(number: int, do: Callable[[], None], folder: Path, kill_at: int | None = None):
    """Do something in processes; all are killed at a training step, or come to their end."""

    def patch_and_do() -> None:
        train_epoch, train_step = RunnerBase.train_epoch, BaseTask.train_step
        steps = []

        def train_epoch_and_save(runner, epoch):
            stats = train_epoch(runner, epoch)
            torch.save(runner._model.state_dict(), f"rank{os.environ['RANK']}_epoch{epoch}.pt")
            return stats

        def train_step_or_die(task, model, samples):
            if len(steps) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            steps.append(None)
            return train_step(task, model, samples)

        RunnerBase.train_epoch, BaseTask.train_step = train_epoch_and_save, train_step_or_die
        do()

    in_ranks(number, patch_and_do, folder, 0 if kill_at is None else -signal.SIGKILL)


def through_launcher(*options: str, evaluate: bool = False) -> Callable[[], None]:
    def do() -> None:
        if uniadapter(["evaluate" if evaluate else "train", str(CONFIG), *options]):
            raise RuntimeError("the run failed")

    return do


def through_lavis(*options: str) -> Callable[[], None]:
    def do() -> None:
        sys.argv = ["train.py", "--cfg-path", str(CONFIG), "--options", *options]
        stand_in_for_nccl()
        lavis_train.main()

    return do


def save_base(path: Path, options: Sequence[str]) -> None:
    """Write the BLIP that all runs start from."""
    config = load_config(CONFIG, options)
    torch.manual_seed(0)
    model = registry.get_model_class(config.model_cfg.arch).from_config(config.model_cfg)
    torch.save({"model": blip_files.base_state_dict(model)}, path)


def main(folder: Path) -> None:
    torch.set_num_threads(1)  # nothing but this thread, when processes are forked
    options = [*options_of("shapes_retrieval", folder / "cache"), *OPTIONS]
    save_base(folder / "base.pth", options)
    options.append(f"model.pretrained={folder / 'base.pth'}")
    stand_in_for_cuda()
    for name in ("launcher", "lavis"):
        (folder / name).mkdir()

    there = folder / "launcher"
    options_there = (*options, "run.output_dir=output", "run.resume=auto")
    in_processes(2, through_launcher(*options_there), there, kill_at=EPOCH + 1)
    in_processes(2, through_launcher(*options_there), there)
    (run,) = (there / "output").iterdir()
    tested = (f"run.resume_ckpt_path={run / 'checkpoint_best.pth'}", "run.output_dir=evaluated")
    in_processes(2, through_launcher(*options, *tested, evaluate=True), there)

    # What LAVIS's train.py asks for and this package's launcher sets; LAVIS names the folders of
    # runs within ten minutes alike.
    there = folder / "lavis"
    registry.mapping["paths"]["cache_root"] = str(folder / "cache")
    options += ["run.dist_url=env://", "run.evaluate=False", "run.valid_splits=[]"]

    def output(name: str) -> str:
        return f"run.output_dir={there / name}"

    def saved(name: str, epoch: int) -> Path:
        (run,) = (there / name).iterdir()
        return run / f"checkpoint_{epoch}.pth"

    in_processes(2, through_lavis(*options, output("killed")), there, kill_at=EPOCH + 1)
    resumed = f"run.resume_ckpt_path={saved('killed', 0)}"
    in_processes(2, through_lavis(*options, output("resumed"), resumed), there)
    trained = ("model.load_finetuned=True", f"model.finetuned={saved('resumed', 1)}")
    evaluated = (output("evaluated"), "run.evaluate=True")
    in_processes(1, through_lavis(*options, *trained, *evaluated), there)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
