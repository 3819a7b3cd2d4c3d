"""Kill a training run with SIGKILL at random moments, resume it each time, compare the end.

    python tests/kill_and_resume.py --kills 20

The run trains a tiny model on the embedded example, with dropout, random frames and data workers,
and saves its state every step. Moments are drawn over the whole of it; of every second kill the
moment is inside the writing of a checkpoint. The weights, averages, queues, moments and random
numbers that it ends with must be those of a run that was not killed, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from lavis_uniadapter.runners import launch, run_checkpoints
from lavis_uniadapter.runners.run_checkpoints import LATEST

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "projects/uniadapter/train/shapes_retrieval.yaml"
DATASET = "datasets.shapes_retrieval"
OPTIONS = (
    *(f"{DATASET}.generate.num_train=16", f"{DATASET}.generate.num_val=4"),
    *(f"{DATASET}.generate.num_test=4", f"{DATASET}.generate.num_frames=6"),
    *(f"{DATASET}.vis_processor.train.n_frms=2", f"{DATASET}.vis_processor.eval.n_frms=2"),
    *("model.vit.depth=1", "model.queue_size=10", "model.adapter.dropout=0.1"),
    *("run.batch_size_train=2", "run.batch_size_eval=4", "run.k_test=3", "run.device=cpu"),
    *("run.max_epoch=3", "run.warmup_steps=4", "run.num_workers=1", "run.accum_grad_iters=2"),
    *("run.checkpoint_freq=2", "run.resume=auto"),
)


def train(folder: Path, job_id: str) -> None:
    """What a killed process was: the whole command, in a process of its own."""
    os.chdir(folder)
    sys.stdout = sys.stderr = open(folder / f"{job_id}.log", "a")
    torch.set_num_threads(1)
    # shows from outside whether a checkpoint is being written
    atomic = run_checkpoints.atomic

    @contextlib.contextmanager
    def atomic_and_marked(path):
        (folder / "writing").touch()
        try:
            with atomic(path) as temporary:
                yield temporary
        finally:
            (folder / "writing").unlink(missing_ok=True)

    run_checkpoints.atomic = atomic_and_marked
    launch.log_to_console()
    cache = f"run.cache_root={folder / 'cache'}"
    launch.run(CONFIG, [*OPTIONS, cache, f"run.job_id={job_id}"])


def run_until(
    folder: Path, job_id: str, seconds: float | None = None, while_writing: bool = False
) -> tuple[bool, float]:
    """Run in a process of its own; kill it after some seconds, if it is not done before.

    Returns:
        Whether it was killed, and how long it ran.
    """
    (folder / "writing").unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(target=train, args=(folder, job_id))
    process.start()
    started = time.monotonic()
    while process.is_alive():
        due = seconds is not None and time.monotonic() - started >= seconds
        if due and (not while_writing or (folder / "writing").exists()):
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            return True, time.monotonic() - started
        time.sleep(0.0005)
    if process.exitcode != 0:
        log = (folder / f"{job_id}.log").read_text()[-3000:]
        raise RuntimeError(f"the run failed (exit {process.exitcode}):\n{log}")
    return False, time.monotonic() - started


def first_difference(first, second, where: str = "") -> str | None:
    """Where two nested containers of tensors differ in any bit, or None."""
    if torch.is_tensor(first):
        same = torch.is_tensor(second) and first.shape == second.shape
        return None if same and torch.equal(first, second) else where
    if isinstance(first, dict):
        if not isinstance(second, dict) or first.keys() != second.keys():
            return where
        pairs = [(f"{where}/{k}", first[k], second[k]) for k in first]
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            return where
        pairs = [(f"{where}/{i}", a, b) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        return None if first == second else where
    return next((d for name, a, b in pairs if (d := first_difference(a, b, name))), None)


def end_of(folder: Path, job_id: str) -> dict:
    """What a run ended with, but for what tells one run from another."""
    content = run_checkpoints.read(folder / "output/shapes_retrieval" / job_id / LATEST)
    del content["config"]
    return content


def kill_and_resume(folder: Path, kills: int, seed: int) -> list[str]:
    """Kill a run so many times; returns a line for each kill.

    Raises:
        AssertionError: if it ends with anything else than a run that was not killed.
    """
    draw = random.Random(seed)
    _, whole = run_until(folder, "whole")
    lines = []
    while len(lines) < kills:
        while_writing = len(lines) % 2 == 1
        # A resumed run has less to do, so most moments are early ones.
        moment = draw.uniform(0.0, whole * draw.choice((0.3, 0.7)))
        killed, ran = run_until(folder, "killed", moment, while_writing)
        if killed:
            where = "while it wrote a checkpoint" if while_writing else "wherever it was"
            lines.append(f"kill {len(lines) + 1}: after {ran:.2f} s, {where}")
        else:  # done before its moment came: once more from the start
            _compare(folder)
            shutil.rmtree(folder / "output/shapes_retrieval/killed")
    run_until(folder, "killed")
    _compare(folder)
    return lines


def _compare(folder: Path) -> None:
    difference = first_difference(end_of(folder, "whole"), end_of(folder, "killed"))
    assert difference is None, f"the resumed run ended differently: {difference}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # nothing but this thread, when processes are forked
    with tempfile.TemporaryDirectory() as folder:
        for line in kill_and_resume(Path(folder), args.kills, args.seed):
            print(line)
    print(f"{args.kills} of {args.kills}: resumed, and ended as the run that was not killed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
